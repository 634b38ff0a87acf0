"""Progress: bars on a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from cli.console import WithBars
from wsi.discover import SlideSource

if TYPE_CHECKING:
    from features.outcome import Outcome  # would load torch for every --help

__all__ = ["CohortProgress"]

_LINE_EVERY_S = 30.0
_MARKS = {"done": "done", "empty": "empty", "skipped": "there already", "busy": "busy", "failed": "FAILED"}


@dataclass
class _Running:
    """A slide whose tiles are being encoded; ``first`` were done in an earlier run."""

    total: int
    first: int
    began: float
    bar: TaskID
    done: int = 0


class CohortProgress(WithBars):
    """Shows a cohort's progress; an ``Observer`` of ``features.cohort``.

    Time left is judged by bytes of slides, the one measure of work that is known before slides are opened.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            console, TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        self._slides = self.bars.add_task("slides", rate="", left="")
        self._running: dict[str, _Running] = {}  # by path: several devices have several at once
        self._n_slides = self._n_finished = 0
        self._bytes_total = self._bytes_done = self._bytes_worked = 0
        self._tiles_run = 0
        self._began = self._last_line = time.monotonic()

    def started(self, sources: int, total_bytes: int) -> None:
        self._n_slides, self._bytes_total = sources, total_bytes
        self._began = self._last_line = time.monotonic()
        self.bars.update(self._slides, total=sources)
        if not self.shown:
            self._console.print(f"{sources} slides, {total_bytes / 1e9:.2f} GB", highlight=False)

    def slide_started(self, source: SlideSource, tiles: int, first: int) -> None:
        self._take_down(source)  # its bar, if it begins again because the process that had it died
        bar = self.bars.add_task(_short(source.relpath), total=tiles, completed=first, rate="", left="")
        self._running[source.relpath] = _Running(tiles, first, time.monotonic(), bar)

    def tiles_done(self, source: SlideSource, count: int) -> None:
        slide, now = self._running[source.relpath], time.monotonic()
        self._tiles_run += count
        slide.done += count
        rate = slide.done / max(1e-6, now - slide.began)
        left = _left((slide.total - slide.first - slide.done) / max(rate, 1e-6))
        self.bars.update(slide.bar, advance=count, rate=f"{rate:.0f} tiles/s", left=left)
        if not self.shown and now - self._last_line > _LINE_EVERY_S:
            self._last_line = now
            done = slide.first + slide.done
            self._line(f"{source.relpath}: {done} of {slide.total} tiles, {rate:.0f} tiles/s, {left}")

    def slide_finished(self, source: SlideSource, outcome: "Outcome") -> None:
        self._take_down(source)
        self._n_finished += 1
        self._bytes_done += source.bytes
        if outcome.status in ("done", "empty"):
            self._bytes_worked += source.bytes
        elapsed = time.monotonic() - self._began
        # Slides that were there already cost nothing: only the pace of those worked on says how long the rest takes.
        left_s = (self._bytes_total - self._bytes_done) * elapsed / self._bytes_worked if self._bytes_worked else None
        left = "" if left_s is None else _left(left_s)
        rate = f"{self._tiles_run / max(elapsed, 1e-6):.0f} tiles/s"
        self.bars.update(self._slides, advance=1, rate=rate, left=left)
        words = [_MARKS.get(outcome.status, outcome.status)]
        if outcome.status == "done":
            words.append(f"{outcome.facts['n_tiles']} tiles, {outcome.facts['tiles_per_s']:.0f} tiles/s")
        if outcome.status == "failed":
            words.append(f"{outcome.code}: {outcome.message}")
        tail = f" ({left})" if left and not self.shown and self._n_finished < self._n_slides else ""
        self._line(f"[{self._n_finished}/{self._n_slides}] {source.relpath}: {', '.join(words)}{tail}")

    def _take_down(self, source: SlideSource) -> None:
        slide = self._running.pop(source.relpath, None)
        if slide is not None:
            self.bars.remove_task(slide.bar)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _left(seconds: float) -> str:
    seconds = int(max(0.0, seconds))
    if seconds < 60:
        return f"{seconds} s left"
    if seconds < 5400:
        return f"{round(seconds / 60)} min left"
    return f"{seconds / 3600:.1f} h left"


def _short(path: str, length: int = 32) -> str:
    return path if len(path) <= length else "…" + path[1 - length :]
