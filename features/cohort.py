"""Run a folder of slides: the queue, what is done already, failures, and the report.

Three stages run at once, each in its own thread: slides are prepared (opened, tissue found, grid written), tiles of the
slide before are decoded, and tiles of the slide before that are encoded. So the encoder does not wait for a slide to open.
"""

import json
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from features.encoder import Encoder, EncoderRequest, EncoderRunner, load_encoder
from features.extract import encode_batch, prefetch
from features.keys import slide_key
from features.lease import Lease
from features.prepare import Prepared, PrepareOptions, is_current, prepare_slide
from features.store import UNREADABLE, FeatureStore, SlideStore
from features.writing import FeatureWriter, check_encoder, check_writable, sweep
from wsi._files import write_atomically
from wsi.discover import Discovery, SlideSource, discover
from wsi.errors import (
    EncoderChangedError,
    EnvironmentFaultError,
    SlideBusyError,
    StoreCorruptError,
    TooManyBadTilesError,
    UsageError,
    WsiError,
)
from wsi.stream import TileBatch, TileStream, default_read_threads

__all__ = [
    "ExtractOptions",
    "NullObserver",
    "Observer",
    "Outcome",
    "Report",
    "extract_cohort",
    "extract_found",
    "extract_slides",
    "feature_dtype",
    "stored_identity",
]

Status = Literal["done", "empty", "skipped", "busy", "failed", "ignored"]
_REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class ExtractOptions:
    """How a cohort is run. None of this changes what the vectors are, but ``prepare`` and ``dtype``.

    Attributes:
        prepare: tiling, tissue and reading.
        batch_size: tiles per forward pass; halved by itself when the GPU's memory is too small.
        read_threads: threads that decode tiles.
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
    """Outcomes of all slides of a run, in path order."""

    outcomes: tuple[Outcome, ...]
    seconds: float = 0.0

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
        """``report.jsonl``: one line per slide, the whole file at once."""
        write_atomically(path, "".join(outcome.as_json() + "\n" for outcome in self.outcomes).encode())


class Observer(Protocol):
    """Is told how a run goes; the command line draws progress from it."""

    def started(self, sources: int, total_bytes: int) -> None: ...
    def slide_started(self, source: SlideSource, tiles: int, first: int) -> None: ...
    def tiles_done(self, count: int) -> None: ...
    def slide_finished(self, source: SlideSource, outcome: Outcome) -> None: ...


class NullObserver:
    """Tells nobody."""

    def started(self, sources: int, total_bytes: int) -> None: ...
    def slide_started(self, source: SlideSource, tiles: int, first: int) -> None: ...
    def tiles_done(self, count: int) -> None: ...
    def slide_finished(self, source: SlideSource, outcome: Outcome) -> None: ...


@dataclass(eq=False)
class _Work:
    """One slide on its way through the stages."""

    source: SlideSource
    key: str
    lease: Lease
    began: float
    prepared: Prepared
    writer: FeatureWriter


@dataclass(frozen=True)
class _Finished:
    source: SlideSource
    outcome: Outcome


@dataclass(frozen=True)
class _End:
    work: _Work
    error: Exception | None = None


def extract_slides(
    slides: str | Path,
    out: str | Path,
    encoder: str | EncoderRequest | Encoder,
    options: ExtractOptions | None = None,
    *,
    table: str | Path | None = None,
    pattern: str | None = None,
    observer: Observer | None = None,
) -> Report:
    """Features of a folder of slides, of one, or of a table of them, into a store at ``out``.

    >>> extract_slides("slides/", "out", "uni2-h").count("done")

    Args:
        encoder: a name that ``wsi encoders`` lists, a request with weights and device, or an encoder of your own.
        table, pattern: see ``wsi.discover.discover``.

    Raises:
        UsageError, SlideNotFoundError: nothing has been touched.
        EnvironmentFaultError: the run cannot begin, or go on.
    """
    table, out = None if table is None else Path(table), Path(out)
    return extract_found(discover(slides, table=table, pattern=pattern, out=out), out, encoder, options, observer)


def extract_found(
    found: Discovery,
    out: Path,
    encoder: str | EncoderRequest | Encoder,
    options: ExtractOptions | None = None,
    observer: Observer | None = None,
) -> Report:
    """``extract_slides`` for slides that were looked for already."""
    options = options or ExtractOptions()
    if not found.sources:
        raise UsageError(f"no slides found ({len(found.unlisted)} other files); check SLIDES, --slides and --pattern")
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(EncoderRequest(encoder) if isinstance(encoder, str) else encoder)
    check_writable(out)
    store = FeatureStore.create(out, options.prepare.tiling)
    sweep(store)
    return extract_cohort(found, store, EncoderRunner(encoder), options, observer)


def extract_cohort(
    found: Discovery,
    store: FeatureStore,
    runner: EncoderRunner,
    options: ExtractOptions | None = None,
    observer: Observer | None = None,
) -> Report:
    """Bring every slide's features into ``store``; what is complete there already is not touched.

    A slide that fails is recorded with its code and the others go on. Faults of the machine (no space, no device) stop
    the run. ``report.jsonl`` in the store is kept up to date all along.

    Raises:
        EnvironmentFaultError: the run cannot go on; everything finished stays.
    """
    observer = observer or NullObserver()
    began = time.monotonic()
    outcomes = [Outcome(item.relpath, "", "ignored", "IGNORED", item.reason) for item in found.unlisted]
    observer.started(len(found.sources), sum(source.bytes for source in found.sources))
    path = store.root / "report.jsonl"
    last_written = began

    def report() -> Report:
        return Report(tuple(sorted(outcomes, key=lambda outcome: outcome.slide)), time.monotonic() - began)

    pipeline = _Pipeline(store, runner, options or ExtractOptions(), observer)
    try:
        with closing(pipeline.run(found.sources)) as finished:
            for source, outcome in finished:
                outcomes.append(outcome)
                observer.slide_finished(source, outcome)
                if time.monotonic() - last_written > _REPORT_EVERY_S:
                    report().write(path)
                    last_written = time.monotonic()
    except BaseException:
        with suppress(OSError):  # a full disk may be what ended the run; that is the error to show, not this one
            report().write(path)
        raise
    finally:
        pipeline.release_all()
    report().write(path)
    return report()


def stored_identity(encoder: Encoder, options: ExtractOptions) -> dict[str, Any]:
    """What decides the vectors, under the name they are stored by."""
    return encoder.identity | ({"name": options.name} if options.name else {})


def feature_dtype(runner: EncoderRunner, options: ExtractOptions) -> str:
    """float32 for vectors computed in fp32, float16 for bf16 and fp16, unless the options say otherwise."""
    if options.dtype != "auto":
        return options.dtype
    return "float32" if runner.encoder.precision == "fp32" else "float16"


class _Pipeline:
    """The three stages over one cohort. Each is a generator; ``prefetch`` runs the first two in threads."""

    def __init__(self, store: FeatureStore, runner: EncoderRunner, options: ExtractOptions, observer: Observer) -> None:
        self._store = store
        self._runner = runner
        self._options = options
        self._observer = observer
        self._identity = stored_identity(runner.encoder, options)
        self._held: set[_Work] = set()

    def release_all(self) -> None:
        """Give back what an aborted run still holds."""
        for work in list(self._held):
            self._release(work)

    def run(self, sources: Sequence[SlideSource]) -> Generator[tuple[SlideSource, Outcome], None, None]:
        """The third stage: encode, write, finish."""
        failed: _Work | None = None
        with closing(prefetch(lambda: self._decoded(sources), depth=2)) as items:
            for item in items:
                match item:
                    case _Finished():
                        yield item.source, item.outcome
                    case _Work():
                        self._observer.slide_started(item.source, len(item.prepared.store.grid), item.writer.rows_done)
                    case _End(work, error):
                        if work is not failed:
                            yield work.source, self._finish(work, error)
                        self._release(work)
                    case (work, batch):
                        if work is failed:
                            continue
                        try:
                            encode_batch(batch, self._runner, work.writer)
                        except EnvironmentFaultError:
                            raise
                        except Exception as error:  # noqa: BLE001 - recorded, as `_failure`
                            failed = work
                            yield work.source, _failure(work.source, work.key, error, "encode")
                        else:
                            self._observer.tiles_done(len(batch))

    def _decoded(
        self, sources: Sequence[SlideSource]
    ) -> "Iterator[_Finished | _Work | tuple[_Work, TileBatch] | _End]":
        """The second stage: tiles of prepared slides, one slide after the other."""
        with closing(prefetch(lambda: self._prepared(sources), depth=1)) as items:
            for item in items:
                yield item
                if isinstance(item, _Work):
                    yield from self._tiles(item)

    def _tiles(self, work: _Work) -> "Iterator[tuple[_Work, TileBatch] | _End]":
        stream = TileStream(
            work.prepared.slide,
            work.prepared.store.grid,
            batch_size=self._options.batch_size,
            threads=self._options.read_threads,
            first=work.writer.rows_done,
        )
        error: Exception | None = None
        batches = iter(stream)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception as fault:  # noqa: BLE001 - recorded, as `_failure`
                error = fault
                break
            yield work, batch
        yield _End(work, error)

    def _prepared(self, sources: Sequence[SlideSource]) -> Iterator[_Finished | _Work]:
        """The first stage: what needs work, opened and gridded; slides that others hold are tried again at the end."""
        postponed: list[SlideSource] = []
        for source in sources:
            item = self._prepare(source)
            if isinstance(item, _Finished) and item.outcome.status == "busy":
                postponed.append(source)
            else:
                yield item
        for source in postponed:
            yield self._prepare(source)

    def _prepare(self, source: SlideSource) -> _Finished | _Work:
        key = slide_key(source.relpath)
        began = time.monotonic()
        lease = Lease(self._store.root / ".locks", key)
        prepared: Prepared | None = None
        work: _Work | None = None
        try:
            done = self._complete(source, key)
            if done is not None:
                return _Finished(source, done)
            lease.acquire()
            done = self._complete(source, key)  # another process may have finished it meanwhile
            if done is not None:
                return _Finished(source, done)
            prepared = prepare_slide(source, key, self._store, self._options.prepare)
            writer = FeatureWriter(
                self._store,
                prepared.store,
                self._identity,
                self._runner.encoder.provenance,
                dtype=feature_dtype(self._runner, self._options),
            )
            work = _Work(source, key, lease, began, prepared, writer)
            self._held.add(work)
        except SlideBusyError as error:
            return _Finished(source, Outcome(source.relpath, key, "busy", error.code, str(error)))
        except EnvironmentFaultError:
            raise
        except Exception as error:  # noqa: BLE001 - recorded, as `_failure`
            return _Finished(source, _failure(source, key, error, "prepare"))
        finally:
            if work is None:
                if prepared is not None:
                    prepared.slide.close()
                lease.release()
        return work

    def _complete(self, source: SlideSource, key: str) -> Outcome | None:
        """The outcome of a slide that needs nothing, found without opening it.

        Raises:
            StoreCorruptError: its files are not all there; damage is reported, never silently written over.
        """
        slide = self._store.find(key)
        if slide is None or not is_current(slide, source, self._options.prepare):
            return None
        if not check_encoder(slide, self._identity):
            return None
        stored = slide.features(self._identity["name"]).manifest["arrays"]["features"]["dtype"]
        if self._options.dtype not in ("auto", stored):
            raise EncoderChangedError(
                f"{slide.path}: holds these features as {stored}, not {self._options.dtype}; write to another OUT, or under "
                f"another name with --name"
            )
        for problem in slide.verify():
            raise StoreCorruptError(
                f"{slide.path}: {problem.part}: {problem.what}; take the slide out with wsi remove and run again"
            )
        return Outcome(source.relpath, key, "skipped", "OK", "complete already", self._facts(slide))

    def _finish(self, work: _Work, error: Exception | None) -> Outcome:
        try:
            if error is not None:
                raise error
            status = work.writer.status
            unreadable = int((status == UNREADABLE).sum())
            if unreadable > self._options.max_unreadable * len(status):
                work.writer.discard()
                raise TooManyBadTilesError(
                    f"{work.source.location}: {unreadable} of {len(status)} tiles cannot be read, more than "
                    f"{self._options.max_unreadable:.1%}: fetch the slide again, or allow more with --max-unreadable"
                )
            seconds = time.monotonic() - work.began
            work.writer.finish({"seconds": round(seconds, 3)})
            facts = self._facts(work.prepared.store) | {
                "seconds": round(seconds, 3),
                "tiles_per_s": round(len(status) / seconds, 1),
                "notes": list(work.prepared.notes),
            }
        except EnvironmentFaultError:
            raise
        except Exception as fault:  # noqa: BLE001 - recorded, as `_failure`
            return _failure(work.source, work.key, fault, "read" if error else "write")
        if len(status) == 0:
            return Outcome(work.source.relpath, work.key, "empty", "EMPTY", "no tile holds enough tissue", facts)
        return Outcome(work.source.relpath, work.key, "done", "OK", "", facts)

    def _facts(self, slide: SlideStore) -> dict[str, Any]:
        features = slide.features(self._identity["name"])
        about = slide.manifest["slide"]
        return {
            "n_tiles": features.shape[0],
            "n_unreadable": features.manifest["n_unreadable"],
            "n_nonfinite": features.manifest["n_nonfinite"],
            "mpp": slide.manifest["grid"]["mpp"],
            "slide_mpp": about["mpp"],
            "slide_mpp_source": about["mpp_source"],
            "slide_mpp_estimated": about["mpp_estimated"],
            "reader": about["reader"],
            "encoder": features.manifest["encoder"]["name"],
            "dim": features.shape[1],
        }

    def _release(self, work: _Work) -> None:
        work.prepared.slide.close()
        work.lease.release()
        self._held.discard(work)  # last: a signal may end this anywhere, and then `release_all` does it again


def _failure(source: SlideSource, key: str, error: Exception, stage: str) -> Outcome:
    facts: dict[str, Any] = {"stage": stage}
    if isinstance(error, WsiError):
        return Outcome(source.relpath, key, "failed", error.code, str(error), facts)
    if isinstance(error, MemoryError):
        return Outcome(source.relpath, key, "failed", "OUT_OF_MEMORY", f"{source.location}: not enough memory", facts)
    facts["traceback"] = "".join(traceback.format_exception(error))
    message = f"{source.location}: {type(error).__name__}: {error}".splitlines()[0]
    return Outcome(source.relpath, key, "failed", "UNEXPECTED", message, facts)
