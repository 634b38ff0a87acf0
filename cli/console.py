"""The console every verb prints to."""

import os
import sys

from rich.console import Console

__all__ = ["PatientConsole", "say"]


class PatientConsole(Console):
    """A console whose reader may leave: ``wsi-extract … | head`` goes on working, in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
