"""What the verbs that give slides a vector share: a bar, and what is said in the end."""

from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from cli.console import PatientConsole, WithBars, say
from features.keys import slide_path

if TYPE_CHECKING:
    from mil.embedding import EmbedReport  # would load torch for every --help

__all__ = ["Bar", "tell"]


class Bar(WithBars):
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, console: PatientConsole, what: str, total: int, unit: str) -> None:
        super().__init__(
            console, TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TextColumn("{task.fields[said]}"), TimeElapsedColumn(),
        )  # fmt: skip
        self._task = self.bars.add_task(what, total=total, said="")

    def step(self, completed: int | None = None, said: str = "") -> None:
        """One more is done, or so many."""
        advance = 1 if completed is None else None
        self.bars.update(self._task, advance=advance, completed=completed, said=said)


def tell(console: PatientConsole, report: "EmbedReport") -> int:
    """Say what came of it; the exit code: 0, 3 where some slides failed, 4 where all did."""
    for left in report.left_out:
        say(console, f"{slide_path(left.slide)}: left out, {left.reason}")
    for failure in report.failed:
        say(console, f"{slide_path(failure.slide)}: FAILED, {failure.code}: {failure.message}")
    counts = f"{len(report.done)} slides embedded, {len(report.skipped)} there already"
    counts += f", {len(report.left_out)} left out" if report.left_out else ""
    counts += f", {len(report.failed)} failed" if report.failed else ""
    say(console, f"{report.name}: {counts}")
    if report.failed:
        return 3 if report.done or report.skipped else 4
    return 0
