"""Blending: what all tiles agree on is what the map says, at any overlap and edge; what none scored is NaN."""

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from segmentation.blend import Blend, hann_window, tile_corners
from segmentation.place import MapPlace
from wsi.errors import UsageError
from wsi.grid import Tiling, cover
from wsi.pyramid import Pyramid


def _corners(size: tuple[int, int], tile: int, stride: int, start: int = 0) -> np.ndarray:
    width, height = size
    return np.array([(x, y) for y in range(start, height, stride) for x in range(start, width, stride)])


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    tile=st.integers(1, 24),
    share=st.floats(0, 0.95),
    start=st.integers(-20, 0),
    batch=st.integers(1, 7),
    value=st.floats(0, 1, width=32),
)
def test_a_model_that_answers_the_same_everywhere_gives_it_everywhere(
    size: tuple[int, int], tile: int, share: float, start: int, batch: int, value: float
) -> None:
    stride = max(1, round(tile * (1 - share)))
    xy = _corners(size, tile, stride, start)
    out = np.full((2, size[1], size[0]), 7, np.float32)
    with Blend(out, hann_window(tile)) as blend:
        for i in range(0, len(xy), batch):
            part = xy[i : i + batch]
            blend.add(
                part, np.broadcast_to(np.array([value, 0.9], np.float32)[:, None, None], (len(part), 2, tile, tile))
            )
    reach = max(xy.max() + tile, 0)
    assert np.allclose(out[0, :reach, :reach], value, atol=1e-6)
    assert np.allclose(out[1, :reach, :reach], 0.9, atol=1e-6)
    assert blend.uncovered == np.count_nonzero(np.isnan(out[0]))


@given(seed=st.integers(0, 1 << 32), tile=st.integers(1, 12), stride=st.integers(1, 14), chunk=st.integers(1, 30))
def test_the_map_is_the_weighted_mean_of_all_predictions(seed: int, tile: int, stride: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    width, height = (int(value) for value in rng.integers(1, 40, 2))
    xy = _corners((width, height), tile, stride, -int(rng.integers(0, tile)))
    xy = xy[rng.random(len(xy)) < 0.8]
    tiles = rng.random((len(xy), 1, tile, tile)).astype(np.float32)
    tiles[rng.random(len(tiles)) < 0.1] = np.nan
    window = rng.uniform(0.1, 1, (tile, tile)).astype(np.float32)
    total, weight = np.zeros((height, width)), np.zeros((height, width))
    for (x, y), values in zip(xy.tolist(), tiles[:, 0], strict=True):  # pixel by pixel
        for i in range(tile):
            for j in range(tile):
                if 0 <= y + i < height and 0 <= x + j < width and not np.isnan(values[i, j]):
                    total[y + i, x + j] += window[i, j] * values[i, j]
                    weight[y + i, x + j] += window[i, j]
    out = zarr.create_array(
        zarr.storage.MemoryStore(), shape=(1, height, width), chunks=(1, chunk, chunk), dtype="f4", fill_value=0
    )
    with Blend(out, window) as blend:
        blend.add(xy, tiles)
    with np.errstate(invalid="ignore"):
        assert np.allclose(out[0], total / weight, atol=1e-5, equal_nan=True)
    assert blend.uncovered == np.count_nonzero(weight == 0)
    assert len(blend.unscored) == np.count_nonzero(np.isnan(tiles).any(axis=(1, 2, 3)))


def test_half_overlapping_hann_windows_sum_to_one() -> None:
    window = hann_window(64)
    middle = window[:, 32].astype(float)
    assert np.allclose(middle[:32] + middle[32:], middle.max(), atol=2e-3)
    assert window.min() > 0


def test_a_tile_that_could_not_be_scored_leaves_its_place_to_its_neighbours_or_nan() -> None:
    out = np.zeros((1, 8, 12), np.float32)
    tiles = np.full((3, 1, 8, 8), 0.9, np.float32)
    tiles[2] = np.nan
    with Blend(out, hann_window(8)) as blend:
        blend.add([(0, 0), (2, 0), (4, 0)], tiles)
    assert np.allclose(out[0, :, :10], 0.9)
    assert np.isnan(out[0, :, 10:]).all()
    assert (blend.unscored, blend.uncovered) == ([(4, 0)], 16)


def test_tiles_out_of_order_or_shape_are_refused() -> None:
    blend = Blend(np.zeros((1, 100, 10), np.float32), hann_window(4))
    blend.add([(0, 50)], np.zeros((1, 1, 4, 4), np.float32))
    with pytest.raises(UsageError, match="sort tiles by row"):
        blend.add([(0, 10)], np.zeros((1, 1, 4, 4), np.float32))
    with pytest.raises(UsageError, match="predictions of 1 tiles"):
        blend.add([(0, 60)], np.zeros((1, 2, 4, 4), np.float32))
    with pytest.raises(UsageError, match="positive"):
        Blend(np.zeros((1, 5, 5), np.float32), np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError, match="channels"):
        Blend(np.zeros((5, 5), np.float32), hann_window(4))


def test_a_large_map_goes_to_zarr_in_little_memory_and_each_chunk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = zarr.create_array(
        tmp_path / "p.zarr", shape=(1, 8000, 2000), chunks=(1, 256, 512), dtype="f4", fill_value=np.nan
    )
    written: list[tuple[int, int]] = []
    put = zarr.Array.__setitem__

    def note(array: Any, key: tuple[slice, slice], value: np.ndarray) -> None:
        written.append((key[1].start, key[1].stop))
        put(array, key, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", note)
    tiles = np.full((1, 1, 256, 256), 0.9, np.float32)
    tracemalloc.start()
    with Blend(out, hann_window(256)) as blend:
        for y in range(0, 8000, 192):
            for x in range(0, 2000, 192):
                blend.add([(x, y)], tiles)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.allclose(out[0, ::7, ::7], 0.9)
    assert peak < 32e6  # the map has 64 MB
    assert written[0][0] == 0
    assert all(stop == start for (_, stop), (start, _) in pairwise(written))
    assert all(start % 256 == 0 for start, _ in written)


def test_a_grids_tiles_lie_on_the_map_of_its_resolution() -> None:
    grid = cover(Pyramid(((2000, 1000),), (0.25, 0.25)), Tiling(mpp=0.5, tile_px=100, overlap_px=20))
    place = MapPlace((2, 2), (0.25, 0.25))
    corners = tile_corners(grid, place)
    assert corners[0].tolist() == [0, 0]
    assert (np.diff(np.unique(corners[:, 0])) == 80).all()
    assert np.array_equal(corners * 2, grid.xy)
