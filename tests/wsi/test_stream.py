"""TileStream: every tile, in order, whatever the threads; bounded; bad tiles marked."""

import gc
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from tests.wsi.test_readers import corrupt_one_tile, picture, write_tiff
from wsi import Annotation, Slide, TileStream, Tiling
from wsi.errors import NotASlideError
from wsi.readers import ArrayReader
from wsi.resolution import Mpp
from wsi.stream import TileJob, _Cell, _drop_one, stream_jobs

EVERYTHING = [Annotation(shapely.box(0, 0, 10_000, 10_000))]


def collect(stream: Any) -> Any:
    batches = list(stream)
    return np.concatenate([b.pixels for b in batches]), np.concatenate([b.readable for b in batches])


@pytest.mark.parametrize(("batch_size", "threads", "ahead"), [(1, 1, 1), (7, 3, 2), (64, 2, 3), (1000, 4, 1)])
def test_order_and_values_depend_on_the_grid_alone(batch_size: Any, threads: Any, ahead: Any) -> None:
    slide = Slide.from_array(picture(), mpp=0.25)
    grid = slide.grid(Tiling(mpp=0.5, tile_px=32, overlap_px=8), tissue=EVERYTHING)
    stream = TileStream(slide, grid, batch_size=batch_size, threads=threads, ahead=ahead)
    pixels, readable = collect(stream)
    assert readable.all()
    expected = np.stack([slide.read_tile(grid, i) for i in range(len(grid))])
    np.testing.assert_array_equal(pixels, expected)
    assert [b.start for b in stream] == list(range(0, len(grid), batch_size))


def test_it_begins_where_it_is_told() -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    grid = slide.grid(Tiling(tile_px=64), tissue=EVERYTHING)
    rest = list(TileStream(slide, grid, batch_size=10, first=13))
    assert rest[0].start == 13
    assert sum(len(b) for b in rest) == len(grid) - 13
    np.testing.assert_array_equal(rest[0].pixels[0], slide.read_tile(grid, 13))


def test_tiles_that_cannot_be_read_are_marked_and_the_others_go_on(tmp_path: Path) -> None:
    slide = Slide.open(corrupt_one_tile(write_tiff(tmp_path / "a.tif", picture(), compression="jpeg")))
    grid = slide.grid(Tiling(tile_px=64), tissue=EVERYTHING)
    pixels, readable = collect(TileStream(slide, grid, batch_size=16, threads=3))
    touches = [bool(x < 384 and x + 64 > 256 and y < 256 and y + 64 > 128) for x, y in grid.xy]
    assert readable.tolist() == [not t for t in touches]
    intact = Slide.open(write_tiff(tmp_path / "b.tif", picture(), compression="jpeg"))
    for index in np.flatnonzero(readable):
        np.testing.assert_array_equal(pixels[index], intact.read_tile(grid, int(index)))


class Watched(ArrayReader):
    """Notes which boxes are read; ``fault`` may raise."""

    def __init__(self, image: Any, fault: Any = lambda place: None) -> None:
        super().__init__([image])
        self.fault = fault
        self.boxes: list[tuple[int, ...]] = []

    def read(self, level: int, x: int, y: int, w: int, h: int) -> Any:
        self.boxes.append((x, y, w, h))
        self.fault((x, y))
        return super().read(level, x, y, w, h)


class Tiled(Watched):
    """As if the picture lay in a file in tiles of 48 x 32 pixels."""

    def tile_size(self, level: int) -> tuple[int, int]:
        return 48, 32

    def read_stored(self, level: int, x: int, y: int, out: Any = None) -> Any:
        return self.read(level, x, y, 48, 32)


def slide_of(reader: Watched) -> Slide:
    return Slide(reader, name="test", path=None, mpp=Mpp(0.25, 0.25, "flag"))


@given(
    st.sampled_from([Watched, Tiled]),
    st.integers(1, 40),
    st.floats(0.25, 1.6),
    st.floats(0, 0.9),
    st.sampled_from(["drop", "pad"]),
    st.integers(0, 30),
)
def test_every_tile_is_what_reading_it_alone_gives(
    kind: Any, tile_px: int, mpp: float, overlap: float, edge: Any, first: int
) -> None:
    slide = slide_of(kind(picture()[:150, :200]))
    tiling = Tiling(mpp=mpp, tile_px=tile_px, overlap_px=int(overlap * (tile_px - 1)), edge=edge, mpp_tolerance=1)
    grid = slide.lattice(tiling)
    chosen = np.random.default_rng(tile_px).random(len(grid)) < 0.1
    grid = replace(grid, xy=grid.xy[chosen][:60], tissue=grid.tissue[chosen][:60])
    batches = list(TileStream(slide, grid, batch_size=7, first=min(first, len(grid))))
    got = [pixels for batch in batches for pixels in batch.pixels]
    expected = [slide.read_tile(grid, i) for i in range(min(first, len(grid)), len(grid))]
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("kind", "overlap_px"), [(Watched, 0), (Watched, 32), (Tiled, 0), (Tiled, 32), (Tiled, 13)])
@pytest.mark.parametrize("first", [0, 5])
def test_each_piece_of_the_file_is_decoded_once(kind: Any, overlap_px: int, first: int) -> None:
    reader = kind(picture())
    slide = slide_of(reader)
    job = TileJob(slide, slide.lattice(Tiling(mpp=0.5, tile_px=64, overlap_px=overlap_px)), first)
    assert sum(len(batch) for batch in stream_jobs([job], batch_size=4, threads=3)) == len(job.grid) - first
    assert len(reader.boxes) == len(set(reader.boxes)) == job.cells_decoded == job.cells_needed > 0


@pytest.mark.parametrize("overlap_px", [0, 8])
def test_cells_are_let_go_when_no_tile_needs_them_any_more(overlap_px: int) -> None:
    image = np.tile(picture()[:128, :192], (40, 1, 1))  # far more rows than tiles have
    slide = slide_of(Tiled(image))
    job = TileJob(slide, slide.lattice(Tiling(mpp=0.5, tile_px=16, overlap_px=overlap_px)))
    alive = []
    for batch in stream_jobs([job], batch_size=6, threads=1, ahead=2):
        alive.append(sum(type(thing) is _Cell for thing in gc.get_objects()))
        batch.release()
    assert job.cells_needed > 500
    assert max(alive) < 80


def test_memory_that_does_not_suffice_costs_decoding_twice_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi.stream._KEPT_CELLS", 6)
    monkeypatch.setattr("wsi.stream._KEPT_BYTES", 6 * 48 * 32 * 3 // 4)
    slide = slide_of(Tiled(picture()))
    job = TileJob(slide, slide.lattice(Tiling(mpp=0.5, tile_px=64, overlap_px=32)))
    pixels = np.concatenate([batch.pixels for batch in stream_jobs([job])])
    np.testing.assert_array_equal(pixels, [slide.read_tile(job.grid, i) for i in range(len(job.grid))])
    assert 1 < job.cells_decoded / job.cells_needed < 4  # without any keeping it would be 9


def test_when_memory_is_short_the_cell_that_is_needed_last_goes_first() -> None:
    """The newest of those not in use: its next tile is a whole row away, the older ones' come before."""
    source: Any = None
    kept = {(x, 0): _Cell(source, (x, 0)) for x in (0, 48, 96, 144)}
    _drop_one(kept, [(144, 0)])
    assert list(kept) == [(0, 0), (48, 0), (144, 0)]


def test_jobs_follow_each_other_in_full_batches() -> None:
    """A batch is filled up with the next slide's tiles; spans say whose is which; ends come in order."""
    slides = [slide_of(Tiled(picture()[: 64 * n, :])) for n in (1, 2, 3)]
    jobs = [
        TileJob(slide, slide.lattice(Tiling(mpp=0.25, tile_px=32)), first)
        for slide, first in zip(slides, (0, 3, 1), strict=True)
    ]
    empty = TileJob(slides[0], replace(jobs[0].grid, xy=jobs[0].grid.xy[:0], tissue=jobs[0].grid.tissue[:0]))
    asked = [empty, jobs[0], empty, jobs[1], jobs[2]]
    batches = list(stream_jobs(iter(asked), batch_size=11))
    assert {len(batch) for batch in batches[:-1] if len(batch)} == {11}
    assert [job for batch in batches for job in batch.ended] == asked
    seen: dict[TileJob, list[int]] = {job: [] for job in jobs}
    for batch in batches:
        for span in batch.spans:
            seen[span.job] += range(span.first, span.first + len(span))
            for row, index in zip(batch.pixels[span.at], range(span.first, span.first + len(span)), strict=True):
                np.testing.assert_array_equal(row, span.job.slide.read_tile(span.job.grid, index))
    assert all(tiles == list(range(job.first, len(job.grid))) for job, tiles in seen.items())


def test_memory_that_is_given_back_serves_one_later_batch() -> None:
    """Also after a slide without tiles, and where it is given back twice."""
    slide = slide_of(Tiled(picture()))
    job = TileJob(slide, slide.lattice(Tiling(mpp=0.25, tile_px=32)))
    empty = TileJob(slide, replace(job.grid, xy=job.grid.xy[:0], tissue=job.grid.tissue[:0]))
    expected = [slide.read_tile(job.grid, index) for index in range(len(job.grid))]
    memory, held = set(), None
    for batch in stream_jobs([empty, job], batch_size=8, ahead=2):
        if held is not None:  # the last one is looked at again before its memory is free
            np.testing.assert_array_equal(held.pixels, expected[held.start : held.start + len(held)])
            held.release()
            held.release()
        held = batch if len(batch) else None
        if held is None:
            batch.release()
        else:
            memory.add(batch.pixels.ctypes.data)
    assert 2 <= len(memory) <= 5


def test_memory_that_is_released_serves_later_batches_and_ends_alone_give_none() -> None:
    """A slide without tiles, all that was there being taken, comes as a batch of nothing but its end."""
    slide = slide_of(Tiled(picture()))
    grid = slide.lattice(Tiling(mpp=0.25, tile_px=32))
    ended, shapes = threading.Event(), []

    def jobs() -> Any:
        yield TileJob(slide, replace(grid, xy=grid.xy[:0], tissue=grid.tissue[:0]))
        assert ended.wait(10)
        yield TileJob(slide, grid)

    def allocate(shape: Any) -> Any:
        shapes.append(shape)
        return np.empty(shape, np.uint8)

    done = 0
    for batch in stream_jobs(jobs(), batch_size=8, ahead=2, allocate=allocate):
        for row, index in zip(batch.pixels, range(done, done + len(batch)), strict=True):
            np.testing.assert_array_equal(row, slide.read_tile(grid, index))
        done += len(batch)
        batch.release()
        ended.set()
    assert done == len(grid)
    assert set(shapes) == {(8, 32, 32, 3)}
    assert len(shapes) <= 4


def test_a_job_that_fails_leaves_the_others_alone() -> None:
    def gone(place: Any) -> None:
        if place == (96, 64):
            raise NotASlideError("a.svs: the file went away")

    bad, good = slide_of(Tiled(picture(), gone)), slide_of(Tiled(picture()))
    jobs = [TileJob(slide, slide.lattice(Tiling(mpp=0.25, tile_px=32))) for slide in (bad, good)]
    done = dict.fromkeys(jobs, 0)
    for batch in stream_jobs(jobs, batch_size=8):
        for span in batch.spans:
            done[span.job] += int(batch.readable[span.at].sum())
    assert isinstance(jobs[0].error, NotASlideError)
    assert done[jobs[0]] < len(jobs[0].grid)
    assert (jobs[1].error, done[jobs[1]]) == (None, len(jobs[1].grid))


def test_a_job_of_another_tile_size_is_an_error_and_not_wrong_pixels() -> None:
    slide = slide_of(Tiled(picture()))
    jobs = [TileJob(slide, slide.lattice(Tiling(mpp=0.25, tile_px=px))) for px in (32, 24, 32)]
    done = dict.fromkeys(jobs, 0)
    for batch in stream_jobs(jobs, batch_size=8):
        for span in batch.spans:
            done[span.job] += len(span)
    assert isinstance(jobs[1].error, ValueError)
    assert [done[job] for job in jobs] == [len(jobs[0].grid), 0, len(jobs[2].grid)]


def test_after_an_error_little_more_of_the_job_is_read() -> None:
    def gone(place: Any) -> None:
        if place == (48, 0):
            raise NotASlideError("a.svs: the file went away")

    reader = Tiled(np.tile(picture()[:128, :192], (10, 1, 1)), gone)
    slide = slide_of(reader)
    job = TileJob(slide, slide.lattice(Tiling(mpp=0.25, tile_px=32)))
    list(stream_jobs([job], batch_size=8, ahead=2))
    assert isinstance(job.error, NotASlideError)
    assert len(reader.boxes) < job.cells_needed / 2


@pytest.mark.parametrize("compression", ["jpeg", "deflate", None])
def test_beyond_the_edge_a_files_own_tiles_are_background(tmp_path: Path, compression: Any) -> None:
    path = write_tiff(tmp_path / "a.tif", picture()[:200, :300], compression=compression)
    with Slide.open(path, reader="tiff") as slide:
        grid = slide.lattice(Tiling(tile_px=90, edge="pad"))
        pixels, readable = collect(TileStream(slide, grid, batch_size=5))
        assert readable.all()
        np.testing.assert_array_equal(pixels, [slide.read_tile(grid, index) for index in range(len(grid))])
        assert (pixels[-1, 200 - grid.xy[-1, 1] :] == slide.reader.background).all()


def test_a_cancelled_job_ends_soon() -> None:
    reader = Tiled(picture())
    slide = slide_of(reader)
    job = TileJob(slide, slide.lattice(Tiling(mpp=0.25, tile_px=8)))
    batches = stream_jobs([job], batch_size=10, ahead=1)
    next(batches)
    job.cancel()
    assert sum(len(batch) for batch in batches) <= 30
    assert len(reader.boxes) < job.cells_needed / 2


def test_what_makes_the_jobs_fail_is_raised() -> None:
    def jobs() -> Any:
        yield from ()
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(stream_jobs(jobs()))


def test_no_further_than_the_batches_ahead_is_decoded() -> None:
    reader = Watched(picture())
    slide = slide_of(reader)
    grid = slide.lattice(Tiling(mpp=0.25, tile_px=16))
    columns = len(np.unique(grid.xy[:, 0]))
    for taken, _ in enumerate(TileStream(slide, grid, batch_size=10, threads=4, ahead=2)):
        time.sleep(0.002)
        assert max(x // 16 + y // 16 * columns for x, y, _, _ in list(reader.boxes)) < (taken + 1 + 2) * 10


def test_leaving_early_stops_the_threads() -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    grid = slide.grid(Tiling(tile_px=16), tissue=EVERYTHING)
    batches: Any = iter(TileStream(slide, grid, batch_size=4))
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


def test_leaving_early_takes_no_more_jobs_and_ends_what_makes_them() -> None:
    slide = slide_of(Tiled(picture()))
    asked: list[TileJob] = []
    closed = []

    def jobs() -> Any:
        try:
            while True:
                asked.append(TileJob(slide, slide.lattice(Tiling(mpp=0.25, tile_px=32))))
                yield asked[-1]
        finally:
            closed.append(len(asked))

    batches = stream_jobs(jobs(), batch_size=4, ahead=1)
    next(batches)
    batches.close()
    assert closed == [1]


def test_errors_that_are_not_about_one_tile_are_raised() -> None:
    def gone(place: Any) -> None:
        raise NotASlideError("a.svs: the file went away")

    slide = slide_of(Watched(picture(), gone))
    with pytest.raises(NotASlideError):
        list(TileStream(slide, slide.lattice(Tiling(mpp=0.25, tile_px=64))))


def test_an_empty_grid_is_an_empty_stream() -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    assert list(TileStream(slide, slide.grid(Tiling(), tissue=[]))) == []
