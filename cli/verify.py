"""wsi verify: is a store still what was written?"""

from pathlib import Path

import click
from rich.progress import track

from cli.console import PatientConsole
from features.store import FeatureStore, Problem

__all__ = ["verify"]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Read every byte and every value, not only names and sizes.")
def verify(out: Path, deep: bool) -> int:
    """Check every slide in the store OUT against what was promised when it was written.

    Exit code 0: all is well. 3: something is damaged or missing; each is a line "slide, part, what is wrong".
    """
    console = PatientConsole()
    store = FeatureStore(out)
    problems: list[Problem] = []
    for key in track(store.keys, "verifying", console=console, transient=True, disable=not console.is_terminal):
        found = store.verify_slide(key, deep=deep)
        problems += found
        for problem in found:
            console.print(
                f"{problem.slide}: {problem.part}: {problem.what}", markup=False, highlight=False, soft_wrap=True
            )
    depth = "every byte" if deep else "names and sizes; --deep reads every byte"
    bad = len({problem.slide for problem in problems})
    console.print(
        f"{len(store)} slides checked ({depth}): {'all as written' if not bad else f'{bad} damaged'}", highlight=False
    )
    return 3 if bad else 0
