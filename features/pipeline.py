"""Pipeline: slides in, stored features out. Four stages at once, so that the encoder waits for nothing.

1. Slides are prepared: opened, tissue found, grid written.
2. Tiles of prepared slides are decoded into batches; a batch may hold the end of one slide and the beginning of the next.
3. Batches are encoded, by each encoder that a slide lacks.
4. Vectors are written, whole shards at a time, and finished slides verified and put into place.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from features.extract import Conveyor, prefetch
from features.keys import slide_key
from features.lease import Lease
from features.outcome import Observer, Outcome, failure
from features.prepare import Prepared, PrepareOptions, is_current, prepare_slide
from features.runner import EncodedBatch, EncoderRunner, Encoding, batch_memory
from features.store import GOOD, NONFINITE, UNREADABLE, FeatureStore, SlideStore
from features.timing import Timing, peak_memory_bytes
from features.writing import FeatureWriter, check_encoder
from wsi.discover import SlideSource
from wsi.errors import (
    EncoderChangedError,
    EnvironmentFaultError,
    SlideBusyError,
    StoreCorruptError,
    TooManyBadTilesError,
    UsageError,
)
from wsi.stream import TileBatch, TileJob, TileSpan, available_cores, default_read_threads, stream_jobs

__all__ = ["ExtractOptions", "Pipeline", "feature_dtype", "stored_identity"]

Result = TypeVar("Result")

_PREPARED_AHEAD = 2  # slides that are open and gridded before their tiles are wanted
_WRITES_AHEAD = 4  # encoded batches that wait to be written


@dataclass(frozen=True)
class ExtractOptions:
    """How a cohort is run. None of this changes what the vectors are, but ``prepare`` and ``dtype``.

    Attributes:
        prepare: tiling, tissue and reading.
        batch_size: tiles per forward pass; halved by itself when the GPU's memory is too small.
        read_threads: threads that decode tiles, for each device.
        dtype: ``float32``, ``float16``, or ``auto``: as precise as the encoder's own arithmetic.
        name: what the features are called in the store, where it is not to be the encoder's own name.
        max_unreadable: a slide of which a larger share of tiles cannot be read fails.
    """

    prepare: PrepareOptions = field(default_factory=PrepareOptions)
    batch_size: int = 64
    read_threads: int = field(default_factory=default_read_threads)
    dtype: Literal["auto", "float16", "float32"] = "auto"
    name: str | None = None
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.read_threads < 1:
            raise ValueError("batch_size and read_threads are at least 1")
        if self.dtype not in ("auto", "float16", "float32"):
            raise ValueError(f"dtype is auto, float16 or float32, got {self.dtype!r}")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable is from 0 to 1, got {self.max_unreadable}")

    def describe(self, timing: Timing) -> str:
        """Where a run's time went, in plain words."""
        return timing.sentence(self.read_threads, available_cores())


def stored_identity(runner: EncoderRunner, options: ExtractOptions) -> dict[str, Any]:
    """What decides the vectors, under the name they are stored by."""
    return runner.encoder.identity | ({"name": options.name} if options.name else {})


def feature_dtype(runner: EncoderRunner, options: ExtractOptions) -> str:
    """float32 for vectors computed in fp32, float16 for bf16 and fp16, unless the options say otherwise."""
    if options.dtype != "auto":
        return options.dtype
    return "float32" if runner.encoder.precision == "fp32" else "float16"


@dataclass(eq=False)
class _Lane:
    """One encoder's way through the pipeline."""

    runner: EncoderRunner
    identity: dict[str, Any]
    dtype: str

    @property
    def name(self) -> str:
        return str(self.identity["name"])


@dataclass(eq=False)
class _Work:
    """One slide on its way through the stages.

    ``writers`` has, for each encoder whose features the slide lacks, who writes them; ``begin`` the tile to begin with;
    ``errors`` what ended it; ``unwritten`` those whose writer failed, while rows from before another error are written.
    """

    source: SlideSource
    key: str
    lease: Lease
    prepared: Prepared
    writers: dict[_Lane, FeatureWriter]
    begin: dict[_Lane, int]
    job: TileJob
    timing: Timing
    errors: dict[_Lane, Exception] = field(default_factory=dict)
    unwritten: set[_Lane] = field(default_factory=set)

    def wants(self, lane: _Lane) -> bool:
        return lane in self.writers and lane not in self.errors

    def behind(self, lane: _Lane, span: TileSpan) -> int:
        """How many of a span's tiles the encoder has done in an earlier run."""
        return min(max(0, self.begin[lane] - span.first), len(span))

    def fail(self, lane: _Lane, error: Exception) -> None:
        """End one encoder's part; the others go on."""
        self.errors[lane] = error
        if len(self.errors) == len(self.writers):
            self.job.cancel()


@dataclass(frozen=True)
class _Finished:
    source: SlideSource
    outcome: Outcome


@dataclass(frozen=True)
class _Passed:
    """Tiles of a slide are through, by all encoders."""

    work: _Work
    span: TileSpan


@dataclass(frozen=True)
class _Rows:
    """Vectors of consecutive tiles of one slide by one encoder."""

    work: _Work
    lane: _Lane
    vectors: NDArray[np.float32]
    status: NDArray[np.uint8]


@dataclass(frozen=True)
class _Ended:
    work: _Work


@dataclass(frozen=True)
class _Flight:
    """A batch on its way through one encoder; ``rows`` (B,) are those of its tiles that are."""

    batch: TileBatch
    lane: _Lane
    rows: NDArray[np.bool_]
    encoding: Encoding | Exception


_Item = _Finished | _Rows | _Passed | _Ended


class Pipeline:
    """The stages over one queue of slides.

    Attributes:
        timing: where the time went so far.
    """

    def __init__(
        self, store: FeatureStore, runners: Sequence[EncoderRunner], options: ExtractOptions, observer: Observer
    ) -> None:
        if store.tiling != options.prepare.tiling:
            raise UsageError(f"{store.root}: this store's tiling is {store.tiling}, not {options.prepare.tiling}")
        if store.select != options.prepare.select_facts:
            raise UsageError(f"{store.root}: this store's tiles are {store.select}, not {options.prepare.select_facts}")
        self._store = store
        names = Counter(str(stored_identity(each, options)["name"]) for each in runners)
        for name, count in names.items():
            if count > 1:
                raise UsageError(
                    f"{count} encoders would store their features as {name}; ask for each once, without --name"
                )
        self._lanes = [_Lane(each, stored_identity(each, options), feature_dtype(each, options)) for each in runners]
        self._options = options
        self._observer = observer
        self._held: set[_Work] = set()
        self._works: dict[TileJob, _Work] = {}
        self.timing = Timing()
        self._last = 0.0
        self._busy_s = self._busy_so_far()

    def release_all(self) -> None:
        """Give back what an aborted run still holds."""
        for work in list(self._held):
            self._release(work)

    def run(self, sources: Iterable[SlideSource]) -> Generator[tuple[SlideSource, Outcome], None, None]:
        """Slides and what became of them, in the order in which they are through; the fourth stage runs in here.

        Raises:
            EnvironmentFaultError: the run cannot go on; everything finished stays.
        """
        conveyor: Conveyor[_Item] = Conveyor(_WRITES_AHEAD)
        with closing(conveyor):
            conveyor.feed(lambda: self._encoded(sources, conveyor.put))
            for item in conveyor:
                match item:
                    case _Finished(source, outcome):
                        yield source, outcome
                    case _Passed(work, span):
                        if span.first == work.job.first:
                            self._observer.slide_started(work.source, len(work.job.grid), work.job.first)
                        self._observer.tiles_done(work.source, len(span))
                    case _Rows():
                        self._write(item)
                    case _Ended(work):
                        outcome = self._finish(work)
                        self._release(work)
                        yield work.source, outcome

    # --- 1: prepare ---

    def _prepared(self, sources: Iterable[SlideSource], put: Callable[[_Item], bool]) -> Iterator[_Work]:
        """What needs work, opened and gridded; slides that others hold are tried again at the end."""
        postponed: list[SlideSource] = []
        for source in sources:
            item = self._prepare(source)
            if isinstance(item, _Work):
                yield item
            elif item.outcome.status == "busy":
                postponed.append(source)
            elif not put(item):
                return
        for source in postponed:
            item = self._prepare(source)
            if isinstance(item, _Work):
                yield item
            elif not put(item):
                return

    def _prepare(self, source: SlideSource) -> _Finished | _Work:
        key = slide_key(source.relpath)
        began = time.perf_counter()
        lease = Lease(self._store.root / ".locks", key)
        prepared: Prepared | None = None
        work: _Work | None = None
        try:
            missing = self._missing(source, key)
            if missing:
                lease.acquire()
                missing = self._missing(source, key)  # another process may have finished it meanwhile
            if not missing:
                slide = self._store.slide(key)
                return _Finished(
                    source, Outcome(source.relpath, key, "skipped", "OK", "complete already", self._facts(slide))
                )
            prepared = prepare_slide(source, key, self._store, self._options.prepare)
            writers = {lane: self._writer(lane, prepared.store) for lane in missing}
            begin = {lane: writer.rows_done for lane, writer in writers.items()}
            job = TileJob(prepared.slide, prepared.store.grid, min(begin.values()))
            timing = Timing(prepare_s=time.perf_counter() - began)
            work = _Work(source, key, lease, prepared, writers, begin, job, timing)
            self._held.add(work)
        except SlideBusyError as error:
            return _Finished(source, Outcome(source.relpath, key, "busy", error.code, str(error)))
        except EnvironmentFaultError:
            raise
        except Exception as error:  # noqa: BLE001 - recorded, as `failure`
            return _Finished(source, failure(source, key, error, "prepare"))
        finally:
            if work is None:
                if prepared is not None:
                    prepared.slide.close()
                lease.release()
        return work

    def _missing(self, source: SlideSource, key: str) -> list[_Lane]:
        """The encoders whose features a slide lacks, found without opening it.

        Raises:
            StoreCorruptError: its files are not all there; damage is reported, never silently written over.
            EncoderChangedError: the features of this name are not of this kind.
        """
        slide = self._store.find(key)
        if slide is None or not is_current(slide, source, self._options.prepare):
            return list(self._lanes)
        missing = [lane for lane in self._lanes if not check_encoder(slide, lane.identity)]
        for lane in self._lanes:
            if lane in missing:
                continue
            stored = slide.features(lane.name).manifest["arrays"]["features"]["dtype"]
            if self._options.dtype not in ("auto", stored):
                raise EncoderChangedError(
                    f"{slide.path}: holds these features as {stored}, not {self._options.dtype}; write to another OUT, or "
                    f"under another name with --name"
                )
        if not missing:
            for problem in slide.verify():
                raise StoreCorruptError(
                    f"{slide.path}: {problem.part}: {problem.what}; take the slide out with wsi remove and run again"
                )
        return missing

    def _writer(self, lane: _Lane, slide: SlideStore) -> FeatureWriter:
        return FeatureWriter(self._store, slide, lane.identity, lane.runner.encoder.provenance, dtype=lane.dtype)

    # --- 2: decode ---

    def _jobs(self, sources: Iterable[SlideSource], put: Callable[[_Item], bool]) -> Iterator[TileJob]:
        with closing(prefetch(lambda: self._prepared(sources, put), depth=_PREPARED_AHEAD)) as works:
            for work in works:
                self._works[work.job] = work
                yield work.job

    # --- 3: encode ---

    def _encoded(self, sources: Iterable[SlideSource], put: Callable[[_Item], bool]) -> Iterator[_Item]:
        """Vectors of batches, in order; for each slide what begins and ends it around them."""
        batches = stream_jobs(
            self._jobs(sources, put),
            batch_size=self._options.batch_size,
            threads=self._options.read_threads,
            allocate=batch_memory(self._lanes[0].runner.encoder.device),
        )
        in_flight = max(lane.runner.in_flight for lane in self._lanes)
        flying: deque[tuple[TileBatch, list[_Flight], float]] = deque()
        self._last = time.perf_counter()
        with closing(batches):
            asked = self._last
            while (batch := next(batches, None)) is not None:
                waited_s = time.perf_counter() - asked
                flying.append((batch, [self._start(batch, lane) for lane in self._lanes], waited_s))
                while len(flying) >= in_flight:
                    yield from self._land(*flying.popleft())
                asked = time.perf_counter()
            self._account((), time.perf_counter() - asked)
        while flying:
            yield from self._land(*flying.popleft())

    def _start(self, batch: TileBatch, lane: _Lane) -> _Flight:
        """Send those tiles of a batch through an encoder that can be read and whose slides lack its features."""
        rows = np.zeros(len(batch), np.bool_)
        for span in batch.spans:
            work = self._works[span.job]
            if work.wants(lane):
                rows[span.start + work.behind(lane, span) : span.stop] = True
        rows &= batch.readable
        pixels = batch.pixels if rows.all() else batch.pixels[rows]
        return _Flight(batch, lane, rows, _caught(lambda: lane.runner.start(pixels)))

    def _land(self, batch: TileBatch, flights: list[_Flight], waited_s: float) -> Iterator[_Item]:
        """The vectors of a batch by all encoders, and the slides that end with it."""
        for flight in flights:
            yield from self._landed(flight)
        batch.release()
        self._account(batch.spans, waited_s)
        yield from (_Passed(self._works[span.job], span) for span in batch.spans)
        for job in batch.ended:
            work = self._works.pop(job)
            counts = Timing(
                cells_needed=job.cells_needed, cells_decoded=job.cells_decoded,
                peak_bytes=peak_memory_bytes(), peak_gpu_bytes=max(lane.runner.peak_bytes for lane in self._lanes),
            )  # fmt: skip
            work.timing.add(counts)
            self.timing.add(counts)
            self.timing.prepare_s += work.timing.prepare_s
            yield _Ended(work)

    def _landed(self, flight: _Flight) -> Iterator[_Rows]:
        batch, lane = flight.batch, flight.lane
        encoded = _caught(flight.encoding.result) if isinstance(flight.encoding, Encoding) else flight.encoding
        place = np.concatenate([[0], np.cumsum(flight.rows)])  # of each tile among those that were encoded
        for span in batch.spans:
            work = self._works[span.job]
            if not work.wants(lane) or span.job.error is not None:
                continue  # an error leaves tiles undone that may well be readable: they are not to be kept as if not
            part: EncodedBatch | Exception
            if isinstance(encoded, EncodedBatch):
                rows = slice(place[span.start], place[span.stop])
                part = EncodedBatch(encoded.vectors[rows], encoded.finite[rows])
            elif len(batch.spans) == 1:
                part = encoded
            else:  # another slide's tiles may have been what failed
                pixels = batch.pixels[span.at][flight.rows[span.at]]
                part = _caught(lambda pixels=pixels: lane.runner.encode(pixels))  # type: ignore[misc]
            if isinstance(part, EncodedBatch):
                yield _rows(work, lane, flight.rows[span.at][work.behind(lane, span) :], part)
            else:
                work.fail(lane, part)

    def _account(self, spans: Sequence[TileSpan], waited_s: float) -> None:
        """Put the time since the last call to the run, and to slides by their part in the batch."""
        now, busy = time.perf_counter(), self._busy_so_far()
        loop_s, busy_s = now - self._last, busy - self._busy_s
        self._last, self._busy_s = now, busy
        tiles = sum(len(span) for span in spans)
        self.timing.add(Timing(tiles, loop_s, waited_s, busy_s))
        for span in spans:
            share = len(span) / tiles
            part = Timing(len(span), loop_s * share, waited_s * share, busy_s * share)
            self._works[span.job].timing.add(part)

    def _busy_so_far(self) -> float:
        return sum(lane.runner.busy_s for lane in self._lanes)

    # --- 4: write ---

    def _write(self, rows: _Rows) -> None:
        work, lane = rows.work, rows.lane
        if lane in work.unwritten:
            return
        try:
            work.writers[lane].write(rows.vectors, rows.status)
        except EnvironmentFaultError:
            raise
        except Exception as error:  # noqa: BLE001 - recorded, as `failure`
            work.unwritten.add(lane)
            work.fail(lane, error)

    def _finish(self, work: _Work) -> Outcome:
        stage = "read"
        try:
            if work.job.error is not None:
                raise work.job.error
            stage = "write"
            for lane, writer in work.writers.items():
                if lane not in work.errors:
                    self._seal(work, writer)
            stage = "encode"
            for error in work.errors.values():  # what the other encoders made is in place
                raise error
            facts = self._facts(work.prepared.store) | work.timing.facts() | {"notes": list(work.prepared.notes)}
        except EnvironmentFaultError:
            raise
        except Exception as fault:  # noqa: BLE001 - recorded, as `failure`
            return failure(work.source, work.key, fault, stage)
        if len(work.job.grid) == 0:
            chosen = work.prepared.store.manifest.get("selection", {}).get("of_tiles")
            why = f"none of {chosen} tiles was chosen" if chosen else "no tile holds enough tissue"
            return Outcome(work.source.relpath, work.key, "empty", "EMPTY", why, facts)
        return Outcome(work.source.relpath, work.key, "done", "OK", "", facts)

    def _seal(self, work: _Work, writer: FeatureWriter) -> None:
        status = writer.status
        unreadable = int((status == UNREADABLE).sum())
        if unreadable > self._options.max_unreadable * len(status):
            for each in work.writers.values():
                each.discard()
            raise TooManyBadTilesError(
                f"{work.source.location}: {unreadable} of {len(status)} tiles cannot be read, more than "
                f"{self._options.max_unreadable:.1%}: fetch the slide again, or allow more with --max-unreadable"
            )
        writer.finish({"seconds": round(work.timing.loop_s, 3)})

    def _facts(self, slide: SlideStore) -> dict[str, Any]:
        about = slide.manifest["slide"]
        features = {lane.name: slide.features(lane.name) for lane in self._lanes}
        return {
            "n_tiles": slide.manifest["grid"]["n_tiles"],
            "n_unreadable": max(each.manifest["n_unreadable"] for each in features.values()),
            "mpp": slide.manifest["grid"]["mpp"],
            "slide_mpp": about["mpp"],
            "slide_mpp_source": about["mpp_source"],
            "slide_mpp_estimated": about["mpp_estimated"],
            "reader": about["reader"],
            "encoders": {
                name: {"dim": each.shape[1], "n_nonfinite": each.manifest["n_nonfinite"]}
                for name, each in features.items()
            },
        }

    def _release(self, work: _Work) -> None:
        work.prepared.slide.close()
        work.lease.release()
        self._held.discard(work)  # last: a signal may end this anywhere, and then `release_all` does it again


def _rows(work: _Work, lane: _Lane, encoded_rows: NDArray[np.bool_], encoded: EncodedBatch) -> _Rows:
    """Vectors and status of consecutive tiles, of which ``encoded`` has those that could be read."""
    status = np.full(len(encoded_rows), UNREADABLE, np.uint8)
    status[encoded_rows] = np.where(encoded.finite, GOOD, NONFINITE)
    if encoded_rows.all():
        return _Rows(work, lane, encoded.vectors, status)
    vectors = np.full((len(encoded_rows), lane.runner.encoder.dim), np.nan, np.float32)
    vectors[encoded_rows] = encoded.vectors
    return _Rows(work, lane, vectors, status)


def _caught(run: Callable[[], Result]) -> Result | Exception:
    """What ``run`` returns, or the error it raises that concerns a slide and not the machine."""
    try:
        return run()
    except EnvironmentFaultError:
        raise
    except Exception as error:  # noqa: BLE001 - recorded, as `failure`
        return error
