"""Slide: pixels at any scale, overviews, tissue, grids, what a notebook shows."""

import base64
import io
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image

from tests.wsi.test_readers import corrupt_one_tile, picture, write_tiff
from wsi import Annotation, Box, Slide, Tiling
from wsi.area import area_resize
from wsi.errors import MissingMppError, ReadError, UnsupportedPixelError, UsageError
from wsi.pyramid import Pyramid
from wsi.slide import fingerprint, region_of


def block_mean(pixels: Any, factor: Any) -> Any:
    h, w = pixels.shape[0] // factor, pixels.shape[1] // factor
    return pixels[: h * factor, : w * factor].reshape(h, factor, w, factor, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_whole_factors_are_the_exact_mean_of_whole_pixels(factor: Any) -> None:
    small = area_resize(picture(480, 240), (480 // factor, 240 // factor))
    assert np.abs(small - block_mean(picture(480, 240), factor)).max() <= 0.5 + 1e-6


def test_fractional_factors_weigh_pixels_by_the_area_they_share() -> None:
    pixels = picture(50, 30)
    fine = np.repeat(np.repeat(pixels, 20, axis=0), 20, axis=1)  # 20 / 7 x: every target pixel is 50 x 50 of these
    expected = block_mean(fine, 50)
    assert np.abs(area_resize(pixels, (20, 12)) - expected).max() <= 1


def test_where_one_side_grows_it_is_interpolated() -> None:
    ramp = np.tile(np.arange(0, 250, 10, dtype=np.uint8)[None, :, None], (20, 1, 3))
    grown = area_resize(ramp, (100, 10))
    assert grown.shape == (10, 100, 3)
    assert len(np.unique(grown)) > 60  # not the 25 colours repeated


def test_read_takes_level_0_boxes_and_gives_the_area_mean() -> None:
    slide = Slide.from_array(picture(), mpp=0.25)
    tile = slide.read(Box(100, 60, 128, 64), (64, 32))
    assert np.abs(tile - block_mean(picture()[60:124, 100:228], 2)).max() <= 0.5 + 1e-6


def test_a_reduced_level_is_read_at_its_own_pixels() -> None:
    level1 = picture(seed=5)[:250, :350]  # other pixels than level 0, so that one sees which is read
    slide = Slide.from_array([picture(), level1], mpp=0.25)
    np.testing.assert_array_equal(slide.read(Box(20, 40, 100, 60), (50, 30), level=1), level1[20:50, 10:60])
    with pytest.raises(ValueError, match="whole pixels of level 1"):
        slide.read(Box(21, 40, 100, 60), (50, 30), level=1)


def test_tiles_of_a_grid_lie_where_it_says() -> None:
    slide = Slide.from_array(picture(), mpp=0.25)
    everything = [Annotation(shapely.box(0, 0, 700, 500))]
    grid = slide.grid(Tiling(mpp=0.5, tile_px=64), tissue=everything)
    assert len(grid) == 5 * 3
    for index in (0, 7, 14):
        x, y = grid.xy[index]
        expected = area_resize(picture()[y : y + 128, x : x + 128], (64, 64))
        np.testing.assert_array_equal(slide.read_tile(grid, index), expected)


def test_overview_at_an_mpp_is_the_area_mean_and_says_its_scale() -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    view = slide.overview(mpp=5.0)
    assert view.image.shape == (50, 70, 3)
    assert view.scale == (10.0, 10.0)
    assert np.abs(view.image - block_mean(picture(), 10)).max() <= 0.5 + 1e-6
    assert slide.thumbnail(70).shape == (50, 70, 3)
    assert slide.thumbnail(5000).shape == (500, 700, 3)  # never larger than the slide


def test_overview_of_a_slide_without_small_levels_comes_block_by_block_and_equals_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    whole = slide.overview(mpp=2.0).image
    monkeypatch.setattr("wsi.slide._BLOCK_PX", 100)
    sizes = []
    read = slide.reader.read

    def noting(*box: int) -> Any:
        sizes.append(box[3:])
        return read(*box)

    monkeypatch.setattr(slide.reader, "read", noting)
    np.testing.assert_array_equal(slide.overview(mpp=2.0).image, whole)
    assert max(max(size) for size in sizes) <= 100


def test_a_reduced_overview_is_the_area_mean_with_its_own_scale() -> None:
    slide = Slide.from_array(picture(), mpp=0.5)
    view, small = slide.overview(mpp=0.5), slide.overview(mpp=0.5).reduced(max(picture().shape) // 4)
    np.testing.assert_array_equal(small.image, area_resize(view.image, small.image.shape[1::-1]))
    assert small.scale == pytest.approx((slide.size[0] / small.image.shape[1], slide.size[1] / small.image.shape[0]))
    assert view.reduced(10_000).image.shape == view.image.shape


def test_the_tissue_of_a_very_large_slide_is_looked_for_in_a_picture_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slide = Slide.from_array(picture(), mpp=4.0)
    monkeypatch.setattr("wsi.tissue.MAX_PIXELS", 10_000)
    view = slide.tissue_view()
    assert view.image.size == pytest.approx(30_000, rel=0.05)
    assert slide.tissue(view=view) == slide.tissue()


def test_a_corrupt_tile_is_named_in_the_overview_and_counts_as_possible_tissue(tmp_path: Path) -> None:
    slide = Slide.open(corrupt_one_tile(write_tiff(tmp_path / "a.tif", picture(), mpp=0.5, compression="jpeg")))
    view = slide.overview(mpp=1.0)
    lost = shapely.union_all([shapely.box(b.x, b.y, b.x + b.w, b.y + b.h) for b in view.unreadable])
    assert lost.covers(shapely.box(256, 128, 384, 256))
    assert not lost.intersects(shapely.box(0, 257, 255, 500))
    assert lost.area < 4 * 256 * 256
    assert region_of(slide.tissue()).covers(shapely.box(260, 130, 380, 250))


def test_a_slide_that_cannot_be_read_at_all_says_so(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(120, 120), compression="jpeg")
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8\xff", 8)
    data[start : start + 200] = b"\x11" * 200
    path.write_bytes(data)
    with pytest.raises(ReadError, match="100% of the slide cannot be read"):
        Slide.open(path).thumbnail()


def test_resolution_may_be_stated_and_a_silent_file_is_refused(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(MissingMppError, match=r"a\.png.*--slide-mpp"):
        Slide.open(tmp_path / "a.png")
    assert Slide.open(tmp_path / "a.png", mpp=0.5).mpp.xy == (0.5, 0.5)
    assert Slide.open(tmp_path / "a.png", csv_mpp=(0.5, 0.6)).mpp.source == "csv"


def test_tissue_is_looked_for_at_the_resolution_of_each_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def noting(image: Any, mpp: Any, scale: Any, options: Any) -> tuple[()]:
        asked.append((mpp, scale))
        return ()

    monkeypatch.setattr("wsi.slide.find_tissue", noting)
    white = np.full((500, 700, 3), 240, np.uint8)
    Slide.from_array(white, mpp=(1.0, 1.04)).tissue()
    ((mpp, scale),) = asked
    assert mpp == pytest.approx((8.0, 8.0), rel=0.02)
    assert scale == pytest.approx((8.0, 7.69), rel=0.02)


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), "wide", (0.5, 0.0)])
def test_a_resolution_that_is_none_is_refused(tmp_path: Path, mpp: Any) -> None:
    path = write_tiff(tmp_path / "a.tif", picture())
    with pytest.raises(UsageError, match="mpp"):
        Slide.open(path, mpp=mpp)
    assert Slide.open(path, mpp=float(np.float32(0.5))).mpp.x == 0.5
    with pytest.raises(ValueError, match="positive"):
        Slide.open(path).thumbnail(0)


def test_fluorescence_is_refused_rather_than_searched() -> None:
    dark = np.zeros((400, 400, 3), np.uint8)
    dark[100:200, 100:200] = (30, 40, 220)
    with pytest.raises(UnsupportedPixelError, match="dark background"):
        Slide.from_array(dark, mpp=4.0).tissue()


def test_the_notebook_shows_a_thumbnail_and_the_facts(tmp_path: Path) -> None:
    slide = Slide.open(write_tiff(tmp_path / "a<b>.tif", picture(), mpp=0.5))
    page = slide._repr_html_()
    png = base64.b64decode(page.split("base64,")[1].split("'")[0])
    assert Image.open(io.BytesIO(png)).size == (512, round(500 * 512 / 700))
    assert "700 × 500 px = 0.35 × 0.25 mm" in page
    assert "a&lt;b&gt;.tif" in page
    assert "a<b>" not in page
    assert "700 x 500 px, 0.5 mpp" in repr(slide)


def test_holes_count_as_tissue_only_when_asked() -> None:
    ring = shapely.box(0, 0, 10, 10) - shapely.box(2, 2, 8, 8)
    outlines = [Annotation(ring)]
    assert region_of(outlines).area == 64
    assert region_of(outlines, holes="keep").area == 100
    assert region_of(outlines, [Annotation(shapely.box(0, 0, 10, 5))]).area == 32
    assert region_of([]).is_empty


def test_a_slide_file_is_recognised_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 20_000)
    first = fingerprint(path)
    time.sleep(0.01)
    path.touch()
    assert fingerprint(path) == first
    for place in (0, 2_500_000, 5_119_999):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        assert fingerprint(path) != first
        data[place] ^= 1
        path.write_bytes(data)


def test_a_slide_pickles_by_its_path(tmp_path: Path) -> None:
    slide = Slide.open(write_tiff(tmp_path / "a.tif", picture()), mpp=0.25)
    data = pickle.dumps(slide)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert again.mpp == slide.mpp
    np.testing.assert_array_equal(again.read(Box(8, 9, 70, 60), (35, 30)), slide.read(Box(8, 9, 70, 60), (35, 30)))


def test_pyramid_of_a_slide_has_its_levels_and_mpp() -> None:
    slide = Slide.from_array([picture(), picture()[::2, ::2]], mpp=(0.25, 0.26))
    assert slide.pyramid == Pyramid(((700, 500), (350, 250)), (0.25, 0.26))


@pytest.mark.shared
def test_tiles_never_come_from_interpolated_levels(shared: Path) -> None:
    # Level 1 of this file is 1/4.0002: OpenSlide interpolates it off the corner.
    tiling = Tiling(mpp=8.0, tile_px=64, min_tissue=0.1)
    through, direct = (Slide.open(shared / "slides" / "1065626.svs", reader=name) for name in ("openslide", "tiff"))
    assert not through.reader.native[1]
    assert through.grid(tiling).level == 0
    grid = direct.grid(tiling)
    assert grid.level == 1
    x, y = (int(value) for value in grid.xy[0])
    tile, sharp = direct.read_tile(grid, 0).astype(int), direct.read(Box(x, y, *grid.side), (64, 64))
    assert np.abs(tile - sharp).mean() < 3  # the same place from level 0
