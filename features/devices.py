"""Devices: one process for each, all pulling slides from one queue, the largest first."""

import multiprocessing
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from features.encoder import EncoderRequest, load_encoder
from features.keys import slide_key
from features.outcome import Ledger, Observer, Outcome, Report, failure
from features.pipeline import ExtractOptions, Pipeline
from features.runner import EncoderRunner
from features.store import FeatureStore
from features.timing import Timing
from wsi.discover import Discovery, SlideSource
from wsi.errors import DeviceError, UsageError, WorkerDiedError, WsiError
from wsi.stream import default_read_threads

__all__ = ["devices_of", "extract_on_devices"]

_END_WITHIN_S = 30.0
_TRIES = 2  # of a slide that was at work when a process died: which of several was the cause the second tells, alone


def devices_of(requests: Sequence[EncoderRequest]) -> list[str]:
    """Names of the devices to run on, one process each if there are several: ``cuda`` is all GPUs, ``a,b`` a list.

    Raises:
        UsageError: the requests name different devices.
    """
    names = {request.device for request in requests}
    if len(names) != 1:
        raise UsageError(f"encoders of one run share their devices, got {' and '.join(sorted(names))}")
    (name,) = names
    if name == "cuda" and torch.cuda.device_count() > 1:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [part.strip() for part in name.split(",")]


def extract_on_devices(
    found: Discovery,
    store: FeatureStore,
    requests: Sequence[EncoderRequest],
    options: ExtractOptions,
    observer: Observer,
) -> Report:
    """As ``features.cohort.extract_cohort``, with a process for each device of the requests.

    A process that dies (a decoder that crashes, memory that the system takes back) is started again; each slide it had
    at work is tried once more, in a process of its own, and fails when that dies too.

    Raises:
        EnvironmentFaultError: a device's process cannot work; everything finished stays.
    """
    devices = devices_of(requests)
    crew = _Crew(found, store.root, list(requests), _share_threads(options, len(devices)), devices)
    ledger = Ledger(found, store.root / "report.jsonl", crew.timing, options.describe)
    observer.started(len(found.sources), sum(source.bytes for source in found.sources))
    with ledger, closing(crew):
        for kind, *what in crew.events():
            if kind == "finished":
                ledger.add(what[1])
            getattr(observer, _TELLS[kind])(*what)
    return ledger.report()


_TELLS = {"began": "slide_started", "tiles": "tiles_done", "finished": "slide_finished"}

Event = tuple[Any, ...]


@dataclass(eq=False)
class _Worker:
    """A process, the line to it, and the slides it has taken and not finished.

    ``is_for_one``: it has a slide that was at work when a process died, and gets no other beside it.
    """

    device: str
    process: BaseProcess
    line: "Connection[Any, Any]"
    at_work: dict[str, SlideSource] = field(default_factory=dict)
    took_any: bool = False
    is_for_one: bool = False
    has_ended: bool = False
    timing: Timing = field(default_factory=Timing)


class _Crew:
    """The processes of a run, seen from the one that started them.

    Each has a line of its own: a queue that all share would stay locked when one of them dies in it.
    """

    def __init__(
        self, found: Discovery, root: Path, requests: list[EncoderRequest], options: ExtractOptions, devices: list[str]
    ) -> None:
        self._job = root, requests, options
        self._todo = deque(sorted(found.sources, key=lambda source: -source.bytes))
        self._suspects: deque[SlideSource] = deque()  # at work when a process died
        self._tries: dict[str, int] = {}
        self._devices = devices
        self._workers: list[_Worker] = []

    def timing(self) -> Timing:
        """Tiles of all devices, seconds as the mean over devices."""
        total = Timing()
        for worker in self._workers:
            total.add(worker.timing)
        return total.over(len(self._devices))

    def events(self) -> Iterator[Event]:
        """Start the processes; what they tell, until all have ended."""
        for device in self._devices:
            self._start(device)
        while lines := {worker.line: worker for worker in self._workers if not worker.has_ended}:
            for line in wait(list(lines)):
                worker = lines[line]  # type: ignore[index]  # one of those that were waited for
                try:
                    kind, *what = worker.line.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    yield from self._bury(worker)
                    continue
                match kind:
                    case "next":
                        self._send_next(worker)
                    case "finished":
                        worker.at_work.pop(what[0].relpath)
                        worker.timing = what.pop()
                        yield kind, *what
                    case "ended":
                        worker.has_ended, worker.timing = True, what[0]
                        self._replace(worker)
                    case "fault":
                        raise what[0]
                    case _:
                        yield kind, *what

    def close(self) -> None:
        """Stop what still runs and wait for it."""
        for worker in self._workers:
            if not worker.has_ended:
                worker.process.terminate()
            worker.line.close()  # or it might wait for an answer
        for worker in self._workers:
            worker.process.join(_END_WITHIN_S)
            if worker.process.is_alive():  # stuck in a driver or a network disk
                worker.process.kill()

    def _start(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child would inherit CUDA and decoders half alive
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, device, *self._job), name=f"wsi {device}", daemon=True)
        process.start()
        theirs.close()  # so that its end is seen here
        self._workers.append(_Worker(device, process, ours))

    def _send_next(self, worker: _Worker) -> None:
        source = self._next_for(worker)
        if source is not None:
            worker.at_work[source.relpath], worker.took_any = source, True
        with suppress(OSError):  # it has died; the next look at its line says so
            worker.line.send(source)

    def _next_for(self, worker: _Worker) -> SlideSource | None:
        if self._suspects and not worker.took_any:
            worker.is_for_one = True
            return self._suspects.popleft()
        return None if worker.is_for_one or not self._todo else self._todo.popleft()

    def _replace(self, worker: _Worker) -> None:
        """Start another process in an ended one's place, if there is something left to do."""
        if self._todo or self._suspects:
            self._start(worker.device)

    def _bury(self, worker: _Worker) -> Iterator[Event]:
        """A process has died: have its slides tried again, and start another in its place."""
        worker.has_ended = True
        code = worker.process.exitcode
        if not worker.took_any:
            raise DeviceError(
                f"{worker.device}: its process died with exit code {code} before it took a slide; see what it printed"
            )
        for source in worker.at_work.values():
            tries = self._tries[source.relpath] = self._tries.get(source.relpath, 0) + 1
            if tries < _TRIES:
                self._suspects.append(source)
                continue
            error = WorkerDiedError(
                f"{source.location}: a process that had it at work died {_TRIES} times (exit code {code}); try it alone, or "
                f"leave it out"
            )
            yield "finished", source, failure(source, slide_key(source.relpath), error, "process")
        self._replace(worker)


def _share_threads(options: ExtractOptions, devices: int) -> ExtractOptions:
    """The cores shared out, unless somebody asked for a number of reading threads: that is for each device."""
    asked = options.read_threads != default_read_threads()
    return options if asked else replace(options, read_threads=default_read_threads(devices))


# --- in the processes ---


def _work(
    line: "Connection[Any, Any]", device: str, root: Path, requests: list[EncoderRequest], options: ExtractOptions
) -> None:
    """A device's process: load the encoders, then bring slides through the pipeline until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    teller = _Teller(line)
    try:
        runners = [EncoderRunner(load_encoder(replace(request, device=device))) for request in requests]
        pipeline = Pipeline(FeatureStore(root), runners, options, teller)
        try:
            with closing(pipeline.run(teller.sources())) as finished:
                for source, outcome in finished:
                    teller.tell("finished", source, outcome, pipeline.timing)
        finally:
            pipeline.release_all()
        teller.tell("ended", pipeline.timing)
    except WsiError as error:  # not about a slide, so about the run
        teller.tell("fault", error)


class _Teller:
    """An ``Observer`` that passes on to the parent, and asks it for slides."""

    def __init__(self, line: "Connection[Any, Any]") -> None:
        self._line = line
        self._lock = threading.Lock()

    def tell(self, kind: str, *what: object) -> None:
        with self._lock:
            self._line.send((kind, *what))

    def sources(self) -> Iterator[SlideSource]:
        """Slides from the parent's queue, each asked for when it is wanted."""
        while True:
            self.tell("next")
            source = self._line.recv()
            if source is None:
                return
            yield source

    def started(self, sources: int, total_bytes: int) -> None: ...

    def slide_started(self, source: SlideSource, tiles: int, first: int) -> None:
        self.tell("began", source, tiles, first)

    def tiles_done(self, source: SlideSource, count: int) -> None:
        self.tell("tiles", source, count)

    def slide_finished(self, source: SlideSource, outcome: Outcome) -> None: ...
