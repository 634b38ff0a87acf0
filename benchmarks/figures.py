"""Figures: what every benchmark prints as a table and writes as JSON."""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

# A script's own folder comes first on the path, and here mil.py would hide the package of that name.
_HERE = str(Path(__file__).resolve().parent)
if sys.path and sys.path[0] == _HERE:
    sys.path.append(sys.path.pop(0))


@dataclass(frozen=True)
class Figure:
    """One measured number; ``reach`` is what it should at least (or at most) be, None where nothing is promised.

    ``interval`` is where it lies with 95% confidence, where that was asked.
    """

    name: str
    value: float
    unit: str
    reach: float | None = None
    higher_is_better: bool = True
    interval: tuple[float, float] | None = None


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="under a minute on two cores")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return options


def report(title: str, figures: list[Figure], file: Path | None) -> None:
    """Print the table; write ``{"figures": […], "machine", "date"}``."""
    table = Table(title=title)
    for column in ("figure", "value", "unit", "reach"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for figure in figures:
        sign = "≥" if figure.higher_is_better else "≤"
        reach = "" if figure.reach is None else f"{sign} {figure.reach:g}"
        value = f"{figure.value:.4g}"
        if figure.interval is not None:
            value += " [{:.3g}, {:.3g}]".format(*figure.interval)
        table.add_row(figure.name, value, figure.unit, reach)
    Console().print(table)
    if file is not None:
        machine = (
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        content = {
            "figures": [asdict(figure) for figure in figures],
            "machine": machine,
            "date": datetime.now(UTC).date().isoformat(),
        }
        file.write_text(json.dumps(content, indent=1))
