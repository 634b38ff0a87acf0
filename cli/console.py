"""The console every verb prints to, and the bars on it."""

import os
import sys
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn

__all__ = ["PatientConsole", "WithBars", "say"]


class PatientConsole(Console):
    """A console whose reader may leave: ``wsi-extract … | head`` goes on working, in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())


class WithBars:
    """Something with progress bars while it is entered: on a terminal; elsewhere nobody sees them.

    Attributes:
        shown: whether anybody sees them.
        bars: take tasks and updates in either case.
    """

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self._console = console
        self.shown = console.is_terminal
        self.bars = Progress(*columns, console=console, transient=True, disable=not self.shown)

    def __enter__(self) -> Self:
        if self.shown:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.bars.stop()

    def clear(self) -> None:
        """Take all bars down."""
        for task in self.bars.task_ids:
            self.bars.remove_task(task)


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
