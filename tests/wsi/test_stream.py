"""TileStream: every tile, in order, whatever the threads; bounded; bad tiles marked."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from tests.wsi.test_readers import corrupt_one_tile, picture, write_tiff
from wsi import Annotation, Slide, TileStream, Tiling
from wsi.errors import NotASlideError

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


def test_never_more_batches_are_in_memory_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    grid = slide.grid(Tiling(tile_px=16), tissue=EVERYTHING)
    started, lock = [], threading.Lock()
    read = slide.read_tile

    def counting(of: Any, index: Any) -> Any:
        with lock:
            started.append(index)
        return read(of, index)

    monkeypatch.setattr(slide, "read_tile", counting)
    for taken, _ in enumerate(TileStream(slide, grid, batch_size=10, threads=4, ahead=2)):
        assert max(started) < (taken + 1 + 2) * 10


def test_leaving_early_stops_the_threads() -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    grid = slide.grid(Tiling(tile_px=16), tissue=EVERYTHING)
    batches: Any = iter(TileStream(slide, grid, batch_size=4))
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


def test_errors_that_are_not_about_one_tile_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    grid = slide.grid(Tiling(tile_px=64), tissue=EVERYTHING)

    def gone(of: Any, index: Any) -> None:
        raise NotASlideError("a.svs: the file went away")

    monkeypatch.setattr(slide, "read_tile", gone)
    with pytest.raises(NotASlideError):
        list(TileStream(slide, grid))


def test_an_empty_grid_is_an_empty_stream() -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    assert list(TileStream(slide, slide.grid(Tiling(), tissue=[]))) == []
