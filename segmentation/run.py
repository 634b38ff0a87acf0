"""Run a model over a cohort: slides in, outlines and areas out; what is there already is not done again."""

import ctypes
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from features.extract import prefetch
from features.keys import slide_key
from features.lease import Lease
from features.outcome import Ledger, NullObserver, Observer, Outcome, Report, failure
from features.prepare import read_outlines, tissue_file
from features.timing import Timing, peak_memory_bytes
from features.writing import check_writable, disk_errors
from segmentation.heat import ProbabilityMap
from segmentation.measure import ClassSummary, write_areas_csv
from segmentation.results import ResultOptions, outlines_of, tissue_area_mm2, write_results
from segmentation.segmenter import Found, Segmenter
from wsi._files import file_sha256, write_atomically
from wsi.annotation import Annotation
from wsi.discover import Discovery, SlideSource
from wsi.errors import (
    EnvironmentFaultError,
    RunMismatchError,
    SlideBusyError,
    StoreCorruptError,
    StoreFormatError,
    TooManyBadTilesError,
    UsageError,
)
from wsi.readers import is_remote
from wsi.slide import Slide, fingerprint
from wsi.stream import available_cores, default_read_threads

__all__ = ["AREAS_FILE", "RunOptions", "give_memory_back", "segment_found"]

AREAS_FILE: Final = "areas.csv"
_RUN_FILE: Final = "run.json"
_DONE: Final = ".result.json"
_AHEAD = 1  # slides opened while the one before is looked at


@dataclass(frozen=True)
class RunOptions:
    """How a model is run; what of it decides about results is saved with them.

    Attributes:
        results: what is written of a slide.
        slide_mpp: (x, y) of level 0 of all slides, where files are silent or wrong.
        reader: as ``wsi.readers``.
        tissue_dir: folder of GeoJSON outlines to use instead of looking for tissue; slides without a file there are looked at.
        max_unreadable: a slide of which a larger share of patches cannot be read fails.
    """

    results: ResultOptions = field(default_factory=ResultOptions)
    slide_mpp: tuple[float, float] | None = None
    reader: str = "auto"
    tissue_dir: Path | None = None
    max_unreadable: float = 0.01


_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of glibc's mallopt
_LARGE_BYTES: Final = 1 << 20


def give_memory_back() -> None:
    """Have large arrays go back to the system as soon as they are free: 200 MB less at the peak of a large slide.

    glibc keeps ever larger ones for reuse otherwise, and some for each thread. Elsewhere nothing happens. For models that
    ONNX Runtime runs, which has memory of its own: PyTorch asks for its tensors anew all the time, and takes twice as long.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
            libc.mallopt(_ARENA_MAX, 1)


def segment_found(
    found: Discovery,
    out: Path,
    segmenter: Segmenter,
    options: RunOptions | None = None,
    observer: Observer | None = None,
) -> Report:
    """Segment slides that ``wsi.discover.discover`` found into the folder ``out``.

    For ``sub/case.svs`` there will be ``sub/case.geojson``, ``.ome.tif``, ``.jpg`` and, last, ``.result.json`` with areas and
    seconds; ``areas.csv`` has those of all slides in ``out``, ``report.jsonl`` what became of each. A slide that fails is
    recorded with its code and the others go on. Several processes may work on one ``out``.

    Raises:
        UsageError: there are no slides.
        RunMismatchError: ``out`` holds results of another model or other settings.
        EnvironmentFaultError: the run cannot go on; everything finished stays.
    """
    options, observer = options or RunOptions(), observer or NullObserver()
    if not found.sources:
        raise UsageError(f"no slides found ({len(found.unlisted)} other files); check SLIDES, --slides and --pattern")
    check_writable(out)
    _claim(out, segmenter, options)
    work = _Run(out, segmenter, options, observer, _names(found.sources))
    ledger = Ledger(found, out / "report.jsonl", lambda: work.timing, work.describe)
    observer.started(len(found.sources), sum(source.bytes for source in found.sources))
    try:
        with disk_errors(out), ledger, closing(prefetch(lambda: work.prepared(found.sources), _AHEAD)) as prepared:
            for item in prepared:
                outcome = item.outcome if isinstance(item, _Settled) else work.segment(item)
                ledger.add(outcome)
                observer.slide_finished(item.source, outcome)
            write_areas_csv(out / AREAS_FILE, _areas(out, work.stems))
    finally:
        work.release_all()
    return ledger.report()


def _claim(out: Path, segmenter: Segmenter, options: RunOptions) -> None:
    """Note whose results ``out`` holds; refuse a mixture."""
    made_by = {"model": segmenter.about["files"], "results": asdict(options.results), "slide_mpp": options.slide_mpp}
    wanted = json.loads(json.dumps(made_by))
    path = out / _RUN_FILE
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differs = [key for key in wanted if found.get(key) != wanted[key]]
        except (OSError, ValueError, AttributeError) as error:
            raise StoreFormatError(f"{path}: cannot be read ({error}); remove it, or choose another OUT") from error
        if differs:
            what = {
                "model": "another model",
                "results": "other settings of outlines or files",
                "slide_mpp": "another mpp",
            }
            raise RunMismatchError(
                f"{out}: holds results of {' and '.join(what[key] for key in differs)}; choose another OUT, or remove it"
            )
    else:
        write_atomically(path, json.dumps(wanted, indent=1).encode())


def _names(sources: Sequence[SlideSource]) -> dict[str, str]:
    """A file name without suffix for each slide, by its path: without its own suffix where that is clear enough."""
    paths = {
        each.relpath: PurePosixPath(PurePosixPath(each.relpath).name if is_remote(each.location) else each.relpath)
        for each in sources
    }
    local = {
        key: PurePosixPath(*(part for part in path.parts if part not in ("/", ".."))) for key, path in paths.items()
    }
    short = {key: str(path.with_suffix("")) for key, path in local.items()}
    often = Counter(name.casefold() for name in short.values())
    named = {key: short[key] if often[short[key].casefold()] == 1 else str(path) for key, path in local.items()}
    again = Counter(name.casefold() for name in named.values())
    return {key: name if again[name.casefold()] == 1 else slide_key(key) for key, name in named.items()}


def _areas(out: Path, stems: Mapping[str, Path]) -> Iterator[tuple[str, ClassSummary]]:
    """Those of all slides that ``out`` has results of, whichever run they are from; under one name each."""
    for path in sorted(out.rglob(f"*{_DONE}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        stem = stems.get(facts["slide"])
        if stem is not None and path != stem.with_name(stem.name + _DONE):
            continue  # of an earlier run, when no other slide had its name
        for area in facts["areas"]:
            yield facts["slide"], ClassSummary.of_json(area)


@dataclass(frozen=True)
class _Settled:
    """A slide for which nothing, or no more, is to be done."""

    source: SlideSource
    outcome: Outcome


@dataclass(frozen=True)
class _Prepared:
    """A slide that is open, its tissue found."""

    source: SlideSource
    key: str
    lease: Lease
    slide: Slide
    tissue: tuple[Annotation, ...]
    identity: Mapping[str, object]
    notes: tuple[str, ...]
    seconds: float


class _Run:
    """One pass of a model over slides."""

    def __init__(
        self, out: Path, segmenter: Segmenter, options: RunOptions, observer: Observer, names: Mapping[str, str]
    ) -> None:
        self.timing = Timing()
        self._out = out
        self._segmenter = segmenter
        self._options = options
        self._observer = observer
        self._names = names
        self.stems = {relpath: out / name for relpath, name in names.items()}
        self._held: dict[str, _Prepared] = {}

    def release_all(self) -> None:
        """Give back what an aborted run still holds: the slides that were opened ahead."""
        for item in list(self._held.values()):
            self._release(item)

    def _release(self, item: _Prepared) -> None:
        item.slide.close()
        item.lease.release()
        self._held.pop(item.key, None)  # last: a signal may end this anywhere, and then `release_all` does it again

    @staticmethod
    def describe(timing: Timing) -> str:
        return timing.sentence(default_read_threads(), available_cores())

    def prepared(self, sources: Sequence[SlideSource]) -> Iterator[_Prepared | _Settled]:
        for source in sources:
            item = self._prepare(source)
            if isinstance(item, _Prepared):
                self._held[item.key] = item
            yield item

    def _prepare(self, source: SlideSource) -> _Prepared | _Settled:
        began, key = time.perf_counter(), slide_key(source.relpath)
        lease = Lease(self._out / ".locks", key)
        slide: Slide | None = None
        try:
            lease.acquire()
            identity: dict[str, object] = {
                **fingerprint(source.location), "mpp": list(source.mpp) if source.mpp else None,
            }  # fmt: skip
            given = tissue_file(self._options.tissue_dir, source)
            if given is not None:
                identity["tissue_sha256"] = file_sha256(given)
            known = self._done(source, identity)
            if known is not None:
                lease.release()
                return _Settled(source, Outcome(source.relpath, key, "skipped", "OK", "complete already", known))
            slide = Slide.open(
                source.location, mpp=self._options.slide_mpp, csv_mpp=source.mpp, reader=self._options.reader
            )
            tissue, notes = (slide.tissue(), []) if given is None else read_outlines(given, slide)
            return _Prepared(source, key, lease, slide, tissue, identity, tuple(notes), time.perf_counter() - began)
        except SlideBusyError as error:
            return _Settled(source, Outcome(source.relpath, key, "busy", error.code, str(error)))
        except EnvironmentFaultError:
            lease.release()
            raise
        except Exception as error:  # noqa: BLE001 - recorded, as `failure`
            if slide is not None:
                slide.close()
            lease.release()
            return _Settled(source, failure(source, key, error, "prepare"))

    def _done(self, source: SlideSource, identity: Mapping[str, object]) -> dict[str, Any] | None:
        """What an earlier run noted of this very file, if all that it wrote is there."""
        stem = self.stems[source.relpath]
        try:
            facts: dict[str, Any] = json.loads(stem.with_name(stem.name + _DONE).read_text(encoding="utf-8"))
            whole = all((stem.parent / name).exists() for name in facts["files"])
            return facts if whole and facts["source"] == dict(identity) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def segment(self, item: _Prepared) -> Outcome:
        """Look at a slide, and write what is found."""
        stage = ["patches"]
        seconds = {"prepare": item.seconds}
        try:
            with disk_errors(self._out):
                return self._segment(item, seconds, stage)
        except EnvironmentFaultError:
            raise
        except Exception as error:  # noqa: BLE001 - recorded, as `failure`
            return failure(item.source, item.key, error, stage[0])
        finally:
            self._release(item)

    def _segment(self, item: _Prepared, seconds: dict[str, float], stage: list[str]) -> Outcome:
        slide, source = item.slide, item.source

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            stage[0], began = name, time.perf_counter()
            yield
            seconds[name] = time.perf_counter() - began

        with timed("patches"):
            heat, busy_s = self._heat(item)
        with timed("refinement"):
            found: Found = self._segmenter.find(slide, heat)
        with timed("polygons"):
            annotations = outlines_of(found, self._options.results.polygons)
        stem = self.stems[source.relpath]
        with timed("writing"):
            written = write_results(
                stem, slide, found, annotations, self._options.results,
                tissue_mm2=tissue_area_mm2(item.tissue, slide.frame),
            )  # fmt: skip
        n_patches = 0 if heat is None else int(heat.facts["patches"])
        timing = Timing(
            tiles=n_patches, loop_s=seconds["patches"], waited_s=max(0.0, seconds["patches"] - busy_s),
            encoder_busy_s=busy_s, prepare_s=item.seconds, peak_bytes=peak_memory_bytes(),
        )  # fmt: skip
        self.timing.add(timing)
        facts: dict[str, Any] = {
            "n_tiles": n_patches,
            **timing.facts(),
            "unreadable": 0 if heat is None else len(heat.unreadable),
            "seconds": {name: round(value, 3) for name, value in (*seconds.items(), ("encoding", busy_s))},
            "n_objects": written.n_objects,
            "areas": [area.as_json() for area in written.areas],
            "files": list(written.files),
            "notes": list(item.notes),
            "source": dict(item.identity),
        }
        done = {"slide": source.relpath, **facts}
        write_atomically(stem.with_name(stem.name + _DONE), json.dumps(done, indent=1).encode())
        empty = heat is not None and not n_patches
        if empty:
            return Outcome(source.relpath, item.key, "empty", "EMPTY", "no patch holds enough tissue", facts)
        return Outcome(source.relpath, item.key, "done", "OK", "", facts)

    def _heat(self, item: _Prepared) -> tuple[ProbabilityMap | None, float]:
        """The first stage's map, of this run or an earlier one, and the seconds its network worked."""
        segmenter = self._segmenter
        if segmenter.first is None:
            self._observer.slide_started(item.source, 1, 0)
            return None, 0.0
        path = self._out / "heat" / f"{self._names[item.source.relpath]}-{segmenter.heat_name(item.identity)}"
        busy, heat = segmenter.busy_s, _map_of_before(path)
        if heat is None:
            grid = segmenter.grid(item.slide, item.tissue)
            self._observer.slide_started(item.source, len(grid), 0)
            heat = segmenter.score(
                item.slide, path, grid=grid, watch=lambda count: self._observer.tiles_done(item.source, count)
            )
        else:
            self._observer.slide_started(item.source, heat.facts["patches"], heat.facts["patches"])
        bad, total = len(heat.unreadable), int(heat.facts["patches"])
        if bad > self._options.max_unreadable * total:
            raise TooManyBadTilesError(
                f"{item.source.location}: {bad} of {total} patches cannot be read; raise --max-unreadable to go on all the same"
            )
        return heat, segmenter.busy_s - busy


def _map_of_before(path: Path) -> ProbabilityMap | None:
    """The map that an earlier run left; one that cannot be read is taken away, to be made again."""
    if not path.exists():
        return None
    try:
        heat = ProbabilityMap.open(path)
        heat.check()
    except (StoreFormatError, StoreCorruptError):
        shutil.rmtree(path)
        return None
    return heat
