"""Phantoms: what is painted is what the truth says, and what is written is what was painted."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi import phantom as module
from wsi.errors import UsageError
from wsi.grid import Box
from wsi.phantom import Codec, Phantom, PhantomSpec, demo_specs, write_svs

SPEC = PhantomSpec(2048, 1792, mpp=0.5, seed=7, tumour=0.3, n_holes=2, pen=("blue",), blur=True)
PLAIN = replace(SPEC, pen=(), blur=False)
CODECS: tuple[Codec, ...] = ("jpeg", "jpeg-rgb", "jpeg2000", "jpeg2000-rgb")

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return Phantom(SPEC)


@pytest.fixture(scope="module")
def picture(phantom: Phantom) -> Pixels:
    """The whole slide and 256 pixels of glass all round."""
    return phantom.render(-256, -256, SPEC.width + 512, SPEC.height + 512)


@pytest.fixture(scope="module")
def plain() -> Phantom:
    return Phantom(PLAIN)


@pytest.fixture(scope="module")
def plain_picture(plain: Phantom) -> Pixels:
    return plain.render(0, 0, PLAIN.width, PLAIN.height)


def within(geometry: shapely.Geometry, spec: PhantomSpec, margin_px: float = 0) -> NDArray[np.bool_]:
    """Return which pixels have their centre in ``geometry``, shrunk by ``margin_px``."""
    x, y = np.meshgrid(np.arange(spec.width) + 0.5, np.arange(spec.height) + 0.5)
    inner = geometry.buffer(-margin_px)
    shapely.prepare(inner)
    inside: NDArray[np.bool_] = shapely.contains_xy(inner, x, y)
    return inside


def density(pixels: Pixels, spec: PhantomSpec) -> NDArray[np.float64]:
    """Return mean optical density of the channels."""
    mean: NDArray[np.float64] = -np.log(np.maximum(pixels, 1) / np.array(spec.background)).mean(axis=-1)
    return mean


def sharpness(pixels: Pixels, mask: NDArray[np.bool_]) -> float:
    """Return the mean square of what the second difference along x sees."""
    grey = pixels.astype(np.float64).mean(axis=2)
    return float((np.diff(grey, n=2, axis=1)[mask[:, 1:-1]] ** 2).mean())


# --- pixels are a function of spec and place --------------------------------------------------------------------------


def test_the_same_spec_gives_the_same_pixels_and_the_same_truth(phantom: Phantom) -> None:
    again = Phantom(SPEC)
    box = (500, 500, 300, 200)
    assert np.array_equal(again.render(*box), phantom.render(*box))
    for truth in ("tissue", "tumour", "glands", "pen", "blur"):
        assert getattr(again, truth).equals_exact(getattr(phantom, truth))
    assert np.array_equal(again.nuclei(Box(*box)), phantom.nuclei(Box(*box)))


def test_another_seed_gives_another_slide(phantom: Phantom) -> None:
    other = Phantom(replace(SPEC, seed=8))
    shared = other.tissue.intersection(phantom.tissue).area / other.tissue.union(phantom.tissue).area
    assert shared < 0.9
    assert not np.array_equal(other.render(900, 900, 64, 64), phantom.render(900, 900, 64, 64))


@settings(deadline=None, max_examples=30)
@given(x=st.integers(-256, 2200), y=st.integers(-256, 1900), w=st.integers(1, 200), h=st.integers(1, 200))
def test_a_box_is_a_part_of_any_larger_box(phantom: Phantom, picture: Pixels, x: int, y: int, w: int, h: int) -> None:
    w, h = min(w, SPEC.width + 256 - x), min(h, SPEC.height + 256 - y)
    assert np.array_equal(phantom.render(x, y, w, h), picture[y + 256 : y + 256 + h, x + 256 : x + 256 + w])


def test_several_threads_see_the_same_slide() -> None:
    fresh = Phantom(SPEC)  # its indexes are asked for the first time by all threads at once
    corners = [(x, y) for y in range(0, 1792, 256) for x in range(0, 2048, 256)]
    with ThreadPoolExecutor(8) as pool:
        tiles = list(pool.map(lambda at: fresh.render(at[0], at[1], 256, 256), corners))
    whole = Phantom(SPEC).render(0, 0, 2048, 1792)
    for (x, y), tile in zip(corners, tiles, strict=True):
        assert np.array_equal(tile, whole[y : y + 256, x : x + 256])


@settings(deadline=None, max_examples=12)
@given(x=st.integers(0, 1200), y=st.integers(0, 1000), downsample=st.sampled_from([2, 3, 4, 5, 16]))
def test_a_coarse_pixel_is_the_mean_of_the_fine_ones(
    phantom: Phantom, picture: Pixels, x: int, y: int, downsample: int
) -> None:
    w, h, d = 21, 13, downsample
    fine = picture[y + 256 : y + 256 + h * d, x + 256 : x + 256 + w * d].astype(np.float64)
    mean = fine.reshape(h, d, w, d, 3).mean(axis=(1, 3))
    assert np.abs(phantom.render(x, y, w, h, d) - mean).max() <= 0.5 + 1e-6


def test_a_coarse_view_of_much_is_put_together_without_a_seam(phantom: Phantom, picture: Pixels) -> None:
    inner = picture[256:-256, 256:-256].astype(np.float64)
    mean = inner.reshape(1792 // 2, 2, 1024, 2, 3).mean(axis=(1, 3))
    assert np.abs(phantom.render(0, 0, 1024, 896, 2) - mean).max() <= 0.5 + 1e-6


def test_pen_blur_and_holes_leave_the_rest_where_it_was(
    phantom: Phantom, plain: Phantom, picture: Pixels, plain_picture: Pixels
) -> None:
    assert phantom.tissue.equals_exact(plain.tissue)
    assert phantom.glands.equals_exact(plain.glands)
    touched = within(phantom.pen.union(phantom.blur), SPEC, margin_px=-40)
    assert np.array_equal(picture[256:-256, 256:-256][~touched], plain_picture[~touched])
    whole = Phantom(replace(PLAIN, n_holes=0))
    assert whole.tissue.difference(plain.tissue).area == pytest.approx(whole.tissue.area - plain.tissue.area)


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 10},
        {"mpp": 0.1},
        {"seed": -1},
        {"n_pieces": 65},
        {"tissue_fraction": 0.7},
        {"tumour": 1.1},
        {"n_holes": -1},
        {"pen": ("pink",)},
        {"background": (255, 255, 300)},
        {"background": (255, 255)},
        {"stain": "pas"},
    ],
)
def test_a_spec_that_makes_no_slide_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)) if "width" not in wrong else "10 x 1792"):
        replace(SPEC, **wrong)


def test_a_box_without_pixels_is_refused(phantom: Phantom) -> None:
    with pytest.raises(UsageError, match="0 x 5 px"):
        phantom.render(0, 0, 0, 5)


# --- truth ------------------------------------------------------------------------------------------------------------


def test_truths_are_valid_and_lie_within_each_other(phantom: Phantom) -> None:
    slide = shapely.box(0, 0, SPEC.width, SPEC.height)
    for truth in (phantom.tissue, phantom.tumour, phantom.glands, phantom.pen, phantom.blur):
        assert truth.is_valid
        assert not truth.is_empty
        assert truth.difference(slide).area < 1
    assert phantom.tumour.difference(phantom.tissue).area < 1
    assert phantom.glands.difference(phantom.tissue).area < 1


@pytest.mark.parametrize("n_pieces", [1, 3, 7])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_areas_are_those_asked_for(n_pieces: int, fraction: float) -> None:
    phantom = Phantom(replace(PLAIN, n_pieces=n_pieces, tissue_fraction=fraction, tumour=fraction, n_holes=0))
    assert len(phantom.tissue.geoms) == n_pieces
    assert phantom.tissue.area / (SPEC.width * SPEC.height) == pytest.approx(fraction, rel=0.05)
    assert phantom.tumour.area / phantom.tissue.area == pytest.approx(fraction, rel=0.01)


def test_tumour_is_all_or_nothing_when_asked_to_be() -> None:
    assert Phantom(replace(PLAIN, tumour=0)).tumour.is_empty
    full = Phantom(replace(PLAIN, tumour=1))
    assert full.tumour.area == pytest.approx(full.tissue.area)


def test_glass_has_the_colour_of_the_background_and_a_little_noise(phantom: Phantom, picture: Pixels) -> None:
    painted = phantom.tissue.union(phantom.pen).union(phantom.blur)
    glass = picture[256:-256, 256:-256][~within(painted, SPEC, margin_px=-12)].astype(np.int64)
    assert np.abs(glass - SPEC.background).max() <= 8
    assert np.abs(glass.mean(axis=0) - SPEC.background).max() < 0.1
    assert 0.5 < glass.std() < 2


@pytest.mark.parametrize("stain", ["he", "ihc", "pale"])
def test_tissue_is_darker_than_glass(stain: Any) -> None:
    spec = replace(PLAIN, stain=stain, background=(230, 228, 232))
    phantom = Phantom(spec)
    dark = density(phantom.render(0, 0, spec.width, spec.height), spec)
    tissue = within(phantom.tissue, spec, margin_px=8)
    blocks = dark[: 1792 // 32 * 32].reshape(56, 32, 64, 32).mean(axis=(1, 3))
    inside = tissue.reshape(56, 32, 64, 32).all(axis=(1, 3))
    outside = ~within(phantom.tissue, spec, margin_px=-8).reshape(56, 32, 64, 32).any(axis=(1, 3))
    assert inside.sum() > 100
    assert (blocks[inside] > 0.03).mean() > 0.98  # lumens are clear
    assert blocks[outside].max() < 0.003


def test_holes_are_glass(phantom: Phantom, plain_picture: Pixels) -> None:
    holes = [shapely.Polygon(ring) for piece in phantom.tissue.geoms for ring in piece.interiors]
    assert len(holes) == SPEC.n_holes
    for hole in holes:
        clear = plain_picture[within(hole, SPEC, margin_px=6)].astype(np.int64)
        assert len(clear) > 500
        assert np.abs(clear - SPEC.background).max() <= 8


@pytest.mark.parametrize(("colour", "channel"), [("red", 0), ("green", 1), ("blue", 2), ("black", None)])
def test_a_pen_leaves_its_colour_on_glass(colour: Any, channel: int | None) -> None:
    spec = replace(PLAIN, n_pieces=0, tumour=0, n_holes=0, pen=(colour,))
    phantom = Phantom(spec)
    ink = phantom.render(0, 0, spec.width, spec.height)[within(phantom.pen, spec, margin_px=4)].astype(np.float64)
    mean = ink.mean(axis=0)
    if channel is None:
        assert mean.max() < 120
        assert np.ptp(mean) < 20
    else:
        assert mean.argmax() == channel
        assert mean[channel] - np.delete(mean, channel).max() > 40


def test_what_is_blurred_has_lost_its_detail_and_the_rest_has_not(
    phantom: Phantom, picture: Pixels, plain_picture: Pixels
) -> None:
    inside = within(phantom.blur.intersection(phantom.tissue).difference(phantom.pen.buffer(20)), SPEC, margin_px=20)
    assert inside.sum() > 5000
    blurred = picture[256:-256, 256:-256]
    assert sharpness(blurred, inside) < 0.05 * sharpness(plain_picture, inside)
    mean = [p[inside].mean(axis=0) for p in (blurred, plain_picture)]
    assert np.abs(mean[0] - mean[1]).max() < 4


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_tumour_can_be_told_from_the_rest_by_its_mean_colour(seed: int) -> None:
    spec = replace(PLAIN, width=3072, height=3072, seed=seed)
    phantom = Phantom(spec)
    side = 128
    red = phantom.render(0, 0, 3072 // side, 3072 // side, side)[..., 0].astype(np.float64)
    tiles = [(x, y, shapely.box(x * side, y * side, (x + 1) * side, (y + 1) * side)) for y, x in np.ndindex(red.shape)]
    tumour = np.array([red[y, x] for x, y, tile in tiles if phantom.tumour.contains(tile)])
    benign_region = phantom.tissue.difference(phantom.tumour)
    benign = np.array([red[y, x] for x, y, tile in tiles if benign_region.contains(tile)])
    assert min(len(tumour), len(benign)) > 20
    assert (tumour[:, None] < benign[None]).mean() > 0.9


def test_glands_are_ringed_by_nuclei_around_a_clear_lumen(plain: Phantom, plain_picture: Pixels) -> None:
    benign = [gland for gland in plain.glands.geoms if not plain.tumour.intersects(gland)]
    assert len(benign) > 10
    dark = density(plain_picture, PLAIN)
    middle, ring = [], []
    for gland in benign:
        x0, y0, x1, y1 = (int(v) for v in gland.bounds)
        box = replace(PLAIN, width=x1 - x0, height=y1 - y0)
        here = shapely.affinity.translate(gland, -x0, -y0)
        cut = dark[y0:y1, x0:x1]
        rim = within(here, box, margin_px=6) & ~within(here, box, margin_px=20)
        ring.append(cut[rim].mean())
        x, y = (int(v) for v in gland.centroid.coords[0])
        middle.append(dark[y - 3 : y + 4, x - 3 : x + 4].mean())
    assert np.median(middle) < 0.1
    assert min(ring) > 0.45


def test_glands_of_a_tumour_are_larger(plain: Phantom) -> None:
    tumour = [plain.tumour.contains(gland) for gland in plain.glands.geoms]
    area = shapely.area(np.array(plain.glands.geoms))
    assert np.median(area[tumour]) > 1.5 * np.median(area[~np.array(tumour)])


def test_pixels_at_nuclei_are_dark(plain: Phantom, plain_picture: Pixels) -> None:
    xy = plain.nuclei(Box(0, 0, PLAIN.width, PLAIN.height)).astype(int)
    dark = density(plain_picture, PLAIN)
    tissue = dark[within(plain.tissue, PLAIN)]
    assert len(xy) > 500
    assert shapely.contains_xy(plain.tissue.buffer(1), xy).all()
    assert (dark[xy[:, 1], xy[:, 0]] > np.median(tissue)).mean() > 0.97


@settings(deadline=None, max_examples=15)
@given(x=st.integers(0, 1500), y=st.integers(0, 1200), w=st.integers(2, 500), h=st.integers(2, 500), cut=st.data())
def test_nuclei_of_a_box_are_those_of_its_parts(plain: Phantom, x: int, y: int, w: int, h: int, cut: Any) -> None:
    at = cut.draw(st.integers(1, w - 1))
    parts = np.concatenate([plain.nuclei(Box(x, y, at, h)), plain.nuclei(Box(x + at, y, w - at, h))])
    whole = plain.nuclei(Box(x, y, w, h))
    assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, whole.tolist()))


def test_things_have_their_size_in_microns_at_any_resolution(plain: Phantom) -> None:
    coarse = Phantom(replace(PLAIN, mpp=1.0, width=1024, height=896))
    per_mm2, gland_um2 = [], []
    for each in (plain, coarse):
        found = each.nuclei(Box(0, 0, each.spec.width, each.spec.height))
        per_mm2.append(len(found) / (each.tissue.area * each.spec.mpp**2 / 1e6))
        gland_um2.append(np.median(shapely.area(np.array(each.glands.geoms))) * each.spec.mpp**2)
    assert per_mm2[1] == pytest.approx(per_mm2[0], rel=0.2)
    assert gland_um2[1] == pytest.approx(gland_um2[0], rel=0.2)


def test_immunostain_is_brown_in_epithelium_and_not_elsewhere() -> None:
    spec = replace(PLAIN, stain="ihc")
    phantom = Phantom(spec)
    pixels = phantom.render(0, 0, spec.width, spec.height).astype(np.float64)
    glands, elsewhere = (
        pixels[within(g, spec, margin_px=m)].mean(axis=0)
        for g, m in ((phantom.glands, 2), (phantom.tissue.difference(phantom.glands.buffer(6)), 4))
    )
    assert glands[0] - glands[2] > 25
    assert elsewhere[2] >= elsewhere[0]


def test_demo_slides_differ_and_one_is_glass() -> None:
    specs = dict(demo_specs())
    assert len(specs) == len(demo_specs()) == len(set(specs.values()))
    assert sum(spec.tumour > 0 for spec in specs.values()) >= 2
    assert any(spec.tumour == 0 and spec.n_pieces > 0 for spec in specs.values())
    assert Phantom(specs["glass"]).tissue.is_empty
    assert sum(spec.width * spec.height for spec in specs.values()) < 400e6


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Phantom:
    return Phantom(PhantomSpec(1301, 1110, mpp=0.5, seed=3, tumour=0.3, tissue_fraction=0.5))


@pytest.fixture(params=CODECS, scope="module")
def written(
    request: pytest.FixtureRequest, small: Phantom, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openslide.OpenSlide]:
    path = tmp_path_factory.mktemp("svs") / f"{request.param}.svs"
    write_svs(path, small, codec=request.param, tile_px=240, quality=85)
    with openslide.OpenSlide(path) as slide:
        yield slide


def read(slide: openslide.OpenSlide, level: int) -> NDArray[np.int64]:
    rgba = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]), np.int64)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def test_openslide_reads_it_as_an_aperio_slide(written: openslide.OpenSlide) -> None:
    properties = written.properties
    assert properties["openslide.vendor"] == "aperio"
    assert float(properties["openslide.mpp-x"]) == float(properties["openslide.mpp-y"]) == 0.5
    assert properties["openslide.objective-power"] == "20"
    assert properties["openslide.level[0].tile-width"] == "240"
    assert written.level_dimensions == ((1301, 1110), (325, 277), (81, 69))
    assert list(written.associated_images) == ["thumbnail"]


def test_every_level_is_the_phantom_to_within_the_codec(written: openslide.OpenSlide, small: Phantom) -> None:
    for level, downsample in enumerate((1, 4, 16)):
        w, h = written.level_dimensions[level]
        error = np.abs(read(written, level) - small.render(0, 0, w, h, downsample))
        assert error.mean() < 6
        assert np.quantile(error, 0.99) < 40


def test_the_thumbnail_shows_the_slide(written: openslide.OpenSlide, small: Phantom) -> None:
    thumbnail = np.asarray(written.associated_images["thumbnail"].convert("RGB"), np.int64)
    assert thumbnail.shape == (555, 650, 3)
    assert np.abs(thumbnail - small.render(0, 0, 650, 555, 2)).mean() < 4


@pytest.mark.parametrize("codec", ["jpeg", "jpeg-rgb"])
def test_jpeg_tiles_carry_neither_tables_nor_application_markers(codec: Codec, small: Phantom, tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", small, codec=codec)
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        page = tiff.pages.first
        assert page.photometric == (tifffile.PHOTOMETRIC.RGB if codec == "jpeg-rgb" else tifffile.PHOTOMETRIC.YCBCR)
        assert page.jpegtables is not None
        assert b"\xff\xdb" in page.jpegtables
        handle = tiff.filehandle
        handle.seek(page.dataoffsets[0])
        tile = handle.read(page.databytecounts[0])
    header = tile[: tile.index(b"\xff\xda")]
    assert not any(bytes([0xFF, marker]) in header for marker in (0xDB, 0xC4, *range(0xE0, 0xF0)))


def test_tissue_takes_about_two_bits_a_pixel(tmp_path: Path) -> None:
    spec = PhantomSpec(2048, 2048, mpp=0.5, seed=5, tumour=0.2, tissue_fraction=0.55)
    phantom = Phantom(spec)
    write_svs(tmp_path / "a.svs", phantom, quality=70)
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        sizes = np.array(tiff.pages.first.databytecounts).reshape(8, 8)
    corners = [
        (row, column, shapely.box(column * 256, row * 256, column * 256 + 256, row * 256 + 256))
        for row, column in np.ndindex(8, 8)
    ]
    bits = [sizes[row, column] * 8 / 256**2 for row, column, tile in corners if phantom.tissue.contains(tile)]
    assert len(bits) > 8
    assert 1.5 < np.mean(bits) < 2.8


def test_tiles_of_glass_are_all_the_same(tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", PhantomSpec(2048, 1024, n_pieces=0), tile_px=256)
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        page = tiff.pages.first
        tiles = set()
        for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
            tiff.filehandle.seek(offset)
            tiles.add(tiff.filehandle.read(size))
    assert len(tiles) == 1


def test_glass_is_written_once_for_each_phase_of_its_noise(tmp_path: Path) -> None:
    phantom = Phantom(PhantomSpec(1200, 720, n_pieces=0))
    write_svs(tmp_path / "a.svs", phantom, codec="jpeg-rgb", tile_px=240, quality=100)
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert np.abs(read(slide, 0) - phantom.render(0, 0, 1200, 720)).max() <= 2


def test_a_file_that_might_not_fit_is_a_bigtiff(
    small: Phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_svs(tmp_path / "classic.svs", small)
    monkeypatch.setattr(module, "_CLASSIC_TIFF_BYTES", 1_000_000)
    write_svs(tmp_path / "big.svs", small)
    for name, big in (("classic", False), ("big", True)):
        with tifffile.TiffFile(tmp_path / f"{name}.svs") as tiff:
            assert tiff.is_bigtiff is big
    with openslide.OpenSlide(tmp_path / "big.svs") as a, openslide.OpenSlide(tmp_path / "classic.svs") as b:
        assert a.properties["openslide.vendor"] == "aperio"
        assert np.array_equal(read(a, 1), read(b, 1))


@pytest.mark.parametrize(("tile_px", "levels"), [(256, (1,)), (512, (1, 2, 8)), (1024, (1, 4, 16, 32))])
def test_any_tile_size_and_levels_give_the_same_slide(
    tile_px: int, levels: tuple[int, ...], small: Phantom, tmp_path: Path
) -> None:
    write_svs(tmp_path / "a.svs", small, tile_px=tile_px, levels=levels, quality=90)
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.level_dimensions == tuple((1301 // d, 1110 // d) for d in levels)
        for level, downsample in enumerate(levels):
            w, h = slide.level_dimensions[level]
            assert np.abs(read(slide, level) - small.render(0, 0, w, h, downsample)).mean() < 6


def test_level_0_is_painted_once_and_in_pieces_no_higher_than_a_band(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[tuple[int, int, int, int]] = []
    render = Phantom.render

    def spy(self: Phantom, x: int, y: int, w: int, h: int, downsample: int = 1) -> Pixels:
        assert downsample == 1
        boxes.append((x, y, w, h))
        return render(self, x, y, w, h)

    monkeypatch.setattr(Phantom, "render", spy)
    write_svs(tmp_path / "a.svs", PhantomSpec(3000, 5000, n_pieces=0), tile_px=240)
    assert max(h for _, _, _, h in boxes) <= 512
    painted = shapely.box(*np.array([(x, y, x + w, y + h) for x, y, w, h in boxes]).T)
    assert shapely.union_all(painted).contains(shapely.box(0, 0, 3000, 5000))
    assert shapely.area(painted).sum() == shapely.union_all(painted).area < 3000 * 5000 * 1.25


def test_a_file_that_fails_half_way_leaves_nothing(
    small: Phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = Phantom.render

    def fails(self: Phantom, x: int, y: int, w: int, h: int, downsample: int = 1) -> Pixels:
        if y >= 512:
            raise MemoryError("as if")
        return render(self, x, y, w, h, downsample)

    monkeypatch.setattr(Phantom, "render", fails)
    with pytest.raises(MemoryError, match="as if"):
        write_svs(tmp_path / "a.svs", small)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"codec": "webp"}, "webp"),
        ({"tile_px": 250}, "250"),
        ({"quality": 0}, "quality 0"),
        ({"levels": (4, 16)}, "do not rise"),
        ({"levels": (1, 16, 4)}, "do not rise"),
        ({"levels": (1, 3)}, "powers of two"),
        ({"levels": ()}, "do not rise"),
    ],
)
def test_settings_that_make_no_file_are_refused(
    wrong: dict[str, Any], said: str, small: Phantom, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        write_svs(tmp_path / "a.svs", small, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_more_levels_than_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pixel"):
        write_svs(tmp_path / "a.svs", PhantomSpec(64, 64), levels=(1, 128))


def test_kinds_of_tissue_share_the_tissue_out_and_tumour_lies_on_top() -> None:
    phantom = Phantom(PhantomSpec(5120, 5120, mpp=0.5, seed=3, tissue_fraction=0.5, tumour=0.2, n_holes=1))
    kinds = phantom.kinds
    assert set(kinds) == {"submucosa", "muscle", "fat", "mucosa", "lymphoid", "tumour"}
    together = shapely.union_all(list(kinds.values()))
    assert sum(region.area for region in kinds.values()) == pytest.approx(together.area, rel=1e-6)
    assert together.symmetric_difference(phantom.tissue).area < 1e-4 * phantom.tissue.area
    assert kinds["tumour"].symmetric_difference(phantom.tumour).area < 1
    assert set(Phantom(PhantomSpec(512, 512, tissue_fraction=0.3)).kinds) == {"mucosa"}
    assert Phantom(PhantomSpec(512, 512, n_pieces=0)).kinds == {}


def test_importing_it_opens_no_codec() -> None:
    code = "import sys, wsi.phantom; assert not {'tifffile', 'imagecodecs', 'openslide'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


BENIGN = PhantomSpec(2048, 1792, mpp=0.5, seed=7, n_pieces=2, tissue_fraction=0.5, tumour=0.2, adenoma=0.3)


def test_an_adenoma_has_its_share_of_every_piece_and_tumour_lies_over_it() -> None:
    alone = Phantom(replace(BENIGN, tumour=0.0))
    for piece in alone.tissue.geoms:
        assert alone.kinds["adenoma"].intersection(piece).area == pytest.approx(0.3 * piece.area, rel=0.02)
    both = Phantom(BENIGN)
    assert both.kinds["tumour"].area == pytest.approx(both.tumour.area, rel=1e-6)
    assert both.kinds["adenoma"].intersection(both.tumour).area < 1
    assert both.kinds["adenoma"].area < alone.kinds["adenoma"].area
    assert alone.kinds["adenoma"].difference(both.tumour).symmetric_difference(both.kinds["adenoma"]).area < 100
    with pytest.raises(UsageError, match=r"adenoma 1\.5 is not within 0 to 1"):
        replace(BENIGN, adenoma=1.5)


def test_an_adenoma_is_from_afar_darker_than_tumour_on_one_slide_and_paler_on_another() -> None:
    darker = []
    for seed in range(6):
        spec = replace(BENIGN, mpp=1.0, width=1024, height=896, tumour=0.25, seed=seed)
        phantom = Phantom(spec)
        grey = phantom.render(0, 0, spec.width, spec.height).mean(axis=2)
        adenoma, tumour, mucosa = (
            float(grey[within(phantom.kinds[kind], spec, margin_px=6)].mean())
            for kind in ("adenoma", "tumour", "mucosa")
        )
        darker.append(tumour - adenoma)
        assert adenoma < mucosa
    assert min(darker) < 0 < max(darker)
    assert max(map(abs, darker)) < 40


def test_what_has_no_adenoma_is_as_it_was_before_there_were_any() -> None:
    """Means of 16 parts of a slide, as drawn by the release before; to half a grey level, for another processor's sums."""
    spec = PhantomSpec(1024, 768, mpp=1.0, seed=7, tumour=0.3, n_holes=2, pen=("blue",), blur=True)
    pixels = Phantom(spec).render(0, 0, 1024, 768).astype(np.float64)
    assert pixels.reshape(4, 192, 4, 256, 3).mean((1, 3, 4)) == pytest.approx(
        np.array(
            [
                [243.0, 199.41, 169.97, 186.41],
                [202.46, 143.39, 160.25, 179.51],
                [232.62, 188.97, 174.55, 216.7],
                [243.0, 243.0, 243.0, 243.0],
            ]
        ),
        abs=0.5,
    )


def test_an_adenoma_changes_nothing_where_there_is_none() -> None:
    with_one, without = Phantom(BENIGN), Phantom(replace(BENIGN, adenoma=0.0))
    assert with_one.tissue.equals(without.tissue)
    assert with_one.tumour.equals(without.tumour)
    far = ~within(with_one.kinds["adenoma"].buffer(80), BENIGN)
    one, other = (each.render(0, 0, BENIGN.width, BENIGN.height).astype(int) for each in (with_one, without))
    assert (np.abs(one - other).max(axis=-1)[far] > 0).mean() < 0.02
    assert (np.abs(one - other).max(axis=-1)[~far] > 0).mean() > 0.3
