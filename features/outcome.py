"""Outcome: what became of one slide; Report, of all of them; and Ledger, which keeps the report of a run."""

import json
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from features.timing import Timing
from wsi._files import write_atomically
from wsi.discover import Discovery, SlideSource
from wsi.errors import WsiError

__all__ = ["Ledger", "NullObserver", "Observer", "Outcome", "Report", "Status", "failure"]

_REPORT_EVERY_S = 5.0

Status = Literal["done", "empty", "skipped", "busy", "failed", "ignored"]


@dataclass(frozen=True)
class Outcome:
    """What became of one slide; one line of ``report.jsonl``.

    ``code`` is ``OK``, ``EMPTY``, ``BUSY``, ``IGNORED`` or the code of an error of ``wsi.errors``; ``UNEXPECTED`` for an
    error that nobody foresaw, whose traceback is in ``facts``.
    """

    slide: str
    key: str
    status: Status
    code: str
    message: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        row = {"slide": self.slide, "key": self.key, "status": self.status, "code": self.code, "message": self.message}
        return json.dumps(row | dict(self.facts))


@dataclass(frozen=True)
class Report:
    """Outcomes of all slides of a run, in path order, and where its time went."""

    outcomes: tuple[Outcome, ...]
    seconds: float = 0.0
    timing: Timing = field(default_factory=Timing)
    sentence: str = ""

    def count(self, *statuses: Status) -> int:
        return sum(outcome.status in statuses for outcome in self.outcomes)

    @property
    def exit_code(self) -> int:
        """0 all well, 3 some slides failed, 4 all failed."""
        failed = self.count("failed")
        if not failed:
            return 0
        return 4 if failed == len(self.outcomes) - self.count("ignored") else 3

    def write(self, path: Path) -> None:
        """``report.jsonl``: a line per slide and one of status ``run``, the whole file at once."""
        run = {"slide": "", "key": "", "status": "run", "code": "OK", "message": self.sentence}
        run |= {"seconds": round(self.seconds, 3), "n_tiles": self.timing.tiles} | self.timing.facts()
        lines = [*(outcome.as_json() for outcome in self.outcomes), json.dumps(run)]
        write_atomically(path, "".join(line + "\n" for line in lines).encode())


class Observer(Protocol):
    """Is told how a run goes; the command line draws progress from it."""

    def started(self, sources: int, total_bytes: int) -> None: ...
    def slide_started(self, source: SlideSource, tiles: int, first: int) -> None: ...
    def tiles_done(self, source: SlideSource, count: int) -> None: ...
    def slide_finished(self, source: SlideSource, outcome: Outcome) -> None: ...


class NullObserver:
    """Tells nobody."""

    def started(self, sources: int, total_bytes: int) -> None: ...
    def slide_started(self, source: SlideSource, tiles: int, first: int) -> None: ...
    def tiles_done(self, source: SlideSource, count: int) -> None: ...
    def slide_finished(self, source: SlideSource, outcome: Outcome) -> None: ...


class Ledger:
    """Keeps the report of a run: ``report.jsonl`` has at any time what is known so far.

    Args:
        found: the slides of the run.
        path: of ``report.jsonl``.
        timing: tells where the time went so far.
        describe: puts that into words.
    """

    def __init__(
        self, found: Discovery, path: Path, timing: Callable[[], Timing], describe: Callable[[Timing], str]
    ) -> None:
        self._outcomes = [Outcome(item.relpath, "", "ignored", "IGNORED", item.reason) for item in found.unlisted]
        self._path = path
        self._timing = timing
        self._describe = describe
        self._began = self._last_written = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        if time.monotonic() - self._last_written > _REPORT_EVERY_S:
            self.report().write(self._path)
            self._last_written = time.monotonic()

    def report(self) -> Report:
        timing = self._timing()
        outcomes = tuple(sorted(self._outcomes, key=lambda outcome: outcome.slide))
        return Report(outcomes, time.monotonic() - self._began, timing, self._describe(timing))

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with (
            suppress(OSError) if error else nullcontext()
        ):  # a full disk may be what ended the run: that is to be shown
            self.report().write(self._path)


def failure(source: SlideSource, key: str, error: Exception, stage: str) -> Outcome:
    """The outcome of a slide that an error ended."""
    facts: dict[str, Any] = {"stage": stage}
    if isinstance(error, WsiError):
        return Outcome(source.relpath, key, "failed", error.code, str(error), facts)
    if isinstance(error, MemoryError):
        return Outcome(source.relpath, key, "failed", "OUT_OF_MEMORY", f"{source.location}: not enough memory", facts)
    facts["traceback"] = "".join(traceback.format_exception(error))
    message = f"{source.location}: {type(error).__name__}: {error}".splitlines()[0]
    return Outcome(source.relpath, key, "failed", "UNEXPECTED", message, facts)
