"""Plan: what a run would do, without doing it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from features.keys import slide_key
from features.pipeline import ExtractOptions, feature_dtype, stored_identity
from features.prepare import grid_slide, is_current
from features.runner import EncoderRunner
from features.store import FeatureStore
from features.writing import check_encoder
from wsi.discover import Discovery, SlideSource
from wsi.errors import NotExtractedError, WsiError
from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.stream import TileStream

__all__ = ["Plan", "PlannedSlide", "plan_cohort"]

_SAMPLE_TILES = 64


@dataclass(frozen=True)
class PlannedSlide:
    """One slide: how many tiles it has, whether they are there already, or the code of what is wrong with it."""

    slide: str
    n_tiles: int = 0
    done: bool = False
    code: str = "OK"
    message: str = ""
    seconds_per_tile: float | None = None


@dataclass(frozen=True)
class Plan:
    """All slides, and the bytes and seconds that the missing ones would take."""

    slides: tuple[PlannedSlide, ...]
    bytes: int
    seconds: float | None

    @property
    def tiles(self) -> int:
        """Tiles to encode."""
        return sum(slide.n_tiles for slide in self.slides if not slide.done)


def plan_cohort(
    found: Discovery,
    out: Path,
    runner: EncoderRunner,
    options: ExtractOptions,
    judged: Callable[[PlannedSlide], None] = lambda _: None,
) -> Plan:
    """What ``extract_cohort`` would do. Nothing is written; ``judged`` is told of each slide as it is looked at.

    Tissue is found for real, so tiles are exact. The time is judged from reading and encoding a few tiles of the first
    slides on this machine; reading and encoding run at once, so the slower of the two counts.
    """
    try:
        store: FeatureStore | None = (
            FeatureStore.create(out, options.prepare.tiling, options.prepare.select_facts)
            if (out / "slides").exists()
            else None
        )
    except NotExtractedError:
        store = None
    slides: list[PlannedSlide] = []
    paces: list[float] = []
    for source in found.sources:
        planned = _plan_slide(source, store, runner, options, measure=len(paces) < 3)
        if planned.seconds_per_tile is not None:
            paces.append(planned.seconds_per_tile)
        slides.append(planned)
        judged(planned)
    tiles = sum(slide.n_tiles for slide in slides if not slide.done)
    itemsize = 4 if feature_dtype(runner, options) == "float32" else 2
    pace = sum(paces) / len(paces) if paces else None
    return Plan(tuple(slides), tiles * runner.encoder.dim * itemsize, None if pace is None else pace * tiles)


def _plan_slide(
    source: SlideSource, store: FeatureStore | None, runner: EncoderRunner, options: ExtractOptions, *, measure: bool
) -> PlannedSlide:
    try:
        there = store.find(slide_key(source.relpath)) if store is not None else None
        if there is not None and is_current(there, source, options.prepare):
            identity = stored_identity(runner, options)
            n_tiles = there.manifest["grid"]["n_tiles"]
            return PlannedSlide(source.relpath, n_tiles, done=check_encoder(there, identity))
        prepare = options.prepare
        with Slide.open(source.location, mpp=prepare.slide_mpp, csv_mpp=source.mpp, reader=prepare.reader) as slide:
            grid = grid_slide(slide, source, prepare).grid
            pace = _seconds_per_tile(slide, grid, runner, options) if measure and len(grid) else None
            return PlannedSlide(source.relpath, len(grid), seconds_per_tile=pace)
    except WsiError as error:
        return PlannedSlide(source.relpath, code=error.code, message=str(error))


def _seconds_per_tile(slide: Slide, grid: TileGrid, runner: EncoderRunner, options: ExtractOptions) -> float:
    size = min(options.batch_size, _SAMPLE_TILES)
    stream = TileStream(slide, grid, batch_size=size, threads=options.read_threads, first=max(0, len(grid) // 2 - size))
    begun = time.perf_counter()
    batch = next(iter(islice(stream, 1)))
    read_s = time.perf_counter() - begun
    pixels = batch.pixels[batch.readable]
    runner.encode(pixels[:1])  # the first call also loads kernels
    begun = time.perf_counter()
    runner.encode(pixels)
    return max(read_s, time.perf_counter() - begun) / len(batch)
