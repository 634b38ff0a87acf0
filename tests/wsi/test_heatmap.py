"""Heatmaps: constant in, constant out; what is not scored stays empty; QuPath gets tiles with measurements."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from wsi import read_geojson
from wsi.errors import UsageError
from wsi.geojson import Frame
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap
from wsi.slide import Overview

FRAME = Frame("a.mrxs", size=(400, 300), mpp=(0.25, 0.5), origin=(7, 11))


def heat(values: Any, side: int = 40, stride: int = 40, columns: int = 6, name: str = "attention") -> Heatmap:
    values = np.asarray(values, np.float32)
    i = np.arange(len(values))
    xy = np.stack([i % columns * stride, i // columns * stride], axis=1)
    grid = TileGrid(xy=xy, tile_px=20, side=(side, side), stride=(stride, stride), mpp=(0.5, 1.0))
    return Heatmap(grid, values, FRAME, name)


@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 60),
    st.floats(0.3, 90),
    st.floats(-1e6, 1e6, width=32),
)
def test_constant_in_constant_out_at_any_overlap_and_scale(
    n: int, side: int, stride: int, downsample: float, value: float
) -> None:
    raster = heat(np.full(n, value), side, stride).raster(downsample)
    drawn = raster[~np.isnan(raster)]
    assert len(drawn)
    assert (drawn == np.float32(value)).all()


def test_a_model_that_answers_nine_tenths_everywhere_gives_that_everywhere() -> None:
    raster = heat(np.full(36, 0.9), side=40, stride=13, columns=6).raster(1)
    np.testing.assert_array_equal(raster[:105, :105], np.float32(0.9))
    assert np.isnan(raster[105:]).all()
    assert np.isnan(raster[:, 105:]).all()


def test_overlapping_tiles_are_averaged_and_nan_is_not_among_them() -> None:
    raster = heat([1.0, 3.0, np.nan], side=40, stride=20, columns=3).raster(10)
    assert raster.shape == (30, 40)
    assert raster[0, :9].tolist() == [1, 1, 2, 2, 3, 3, *[pytest.approx(np.nan, nan_ok=True)] * 3]
    assert np.isnan(raster[4:]).all()


def test_values_lie_where_their_tiles_are() -> None:
    found = heat(np.arange(12, dtype=float))
    raster = found.raster(4)
    for (x, y), value in zip(found.grid.xy // 4, found.values, strict=True):
        assert (raster[y : y + 10, x : x + 10] == value).all()


def test_tiles_smaller_than_a_raster_pixel_are_not_lost() -> None:
    raster = heat([1.0, 2.0], side=4, stride=4, columns=2).raster(100)
    assert raster[0, 0] == 1.5
    assert np.isnan(raster).sum() == raster.size - 1


def test_a_raster_beyond_memory_is_refused_with_the_way_out() -> None:
    grid = heat([1.0]).grid
    large = Heatmap(grid, np.ones(1, np.float32), Frame("a", (200_000, 200_000), (0.25, 0.25)))
    with pytest.raises(UsageError, match=r"take a downsample from 24\.4"):
        large.raster(1)
    assert large.raster(500).shape == (400, 400)


def test_a_heatmap_checks_itself_and_keeps_its_values() -> None:
    values = np.ones(2, np.float32)
    made = heat(values)
    values[0] = 5
    assert made.values.tolist() == [1, 1]
    with pytest.raises(ValueError, match="read-only"):
        made.values[0] = 2
    with pytest.raises(ValueError, match="infinite"):
        heat([np.inf])
    with pytest.raises(ValueError, match="need as many values"):
        Heatmap(made.grid, np.ones(3, np.float32), FRAME)


def test_contours_outline_the_tiles_above_the_quantile_exactly() -> None:
    found = heat(np.arange(12, dtype=float))
    half, top = found.contours((0.5, 0.75))
    assert half.class_name == "attention: top 50%"
    assert half.measurements["threshold"] == 5
    assert half.geometry.equals(shapely.box(0, 40, 240, 80))
    assert top.geometry.equals(shapely.box(120, 40, 240, 80))
    assert top.measurements["area mm^2"] == pytest.approx(3 * 10e-3 * 20e-3)
    assert heat(np.full(12, 0.9)).contours() == ()
    assert heat(np.full(3, np.nan)).contours() == ()


@given(
    st.lists(st.floats(0, 1, width=32) | st.just(float("nan")), min_size=1, max_size=24),
    st.integers(5, 60),
    st.integers(5, 60),
)
def test_the_outlined_region_is_the_union_of_its_tiles(values: Any, side: int, stride: int) -> None:
    found = heat(values, side, stride, columns=5)
    region = found.region_above(0.5)
    above = [
        shapely.box(x, y, x + side, y + side) for (x, y), v in zip(found.grid.xy, found.values, strict=True) if v > 0.5
    ]
    assert (region is None) == (not above)
    if region is not None:
        assert region.is_valid
        assert region.symmetric_difference(shapely.union_all(above)).area == pytest.approx(0)


@pytest.mark.parametrize("suffix", [".geojson", ".geojson.gz", ".json"])
def test_qupath_gets_tiles_with_measurements_and_the_top_region_at_its_own_origin(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 1, 20)
    values[3] = np.nan
    made = heat(values)
    contents = read_geojson(made.save(tmp_path / f"a{suffix}"))
    assert (contents.frame, contents.origin, contents.rejected) == (FRAME, (7, 11), ())
    tiles = [a for a in contents.annotations if a.object_type == "tile"]
    (region,) = (a for a in contents.annotations if a.object_type == "annotation")
    assert region.class_name == "attention: top 10%"
    by_place = {tuple(int(v) for v in a.geometry.bounds[:2]): a.measurements["attention"] for a in tiles}
    expected = {tuple(xy): float(v) for xy, v in zip(made.grid.xy.tolist(), made.values, strict=True) if np.isfinite(v)}
    assert by_place == expected


def test_a_picture_is_coloured_where_tiles_are_and_untouched_elsewhere(tmp_path: Path) -> None:
    image = np.full((150, 200, 3), 200, np.uint8)
    made = heat(np.arange(12, dtype=float))
    drawn = made.picture(Overview(image, (2.0, 2.0)))
    assert drawn.shape == image.shape
    assert (drawn[100:, 130:] == 200).all()
    assert (drawn[:40, :120] != 200).any(axis=-1).all()
    low, high = drawn[10, 10].astype(int), drawn[30, 110].astype(int)
    assert high.sum() > low.sum() + 100  # dark to bright
    saved: Any = cv2.imread(str(made.save(tmp_path / "a.png", view=Overview(image, (2.0, 2.0)))))
    np.testing.assert_array_equal(saved[..., ::-1], drawn)


def test_one_extreme_tile_does_not_make_the_others_look_alike() -> None:
    values = np.tile([0.0, 1.0], 100)
    spoilt = values.copy()
    spoilt[42] = 1000
    calm, extreme = heat(values, 10, 10, 20).picture(), heat(spoilt, 10, 10, 20).picture()
    np.testing.assert_array_equal(calm[5, :20], extreme[5, :20])


def test_fixed_limits_make_pictures_comparable_and_nothing_scored_draws_nothing() -> None:
    alone = heat(np.full(6, 0.9)).picture(limits=(0, 1))
    beside = heat([0.9, 0.1, 0.9, 0.9, 0.9, 0.9]).picture(limits=(0, 1))
    np.testing.assert_array_equal(alone[5, 5], beside[5, 5])
    assert (heat(np.full(6, np.nan)).picture() == 255).all()


def test_a_table_has_a_row_a_tile(tmp_path: Path) -> None:
    text = heat([0.5, np.nan]).save(tmp_path / "a.csv").read_text()
    assert text == "x,y,attention\n0,0,0.5\n40,0,\n"


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="saved as"):
        heat([1.0]).save(tmp_path / "a.tif")
    assert list(tmp_path.iterdir()) == []
