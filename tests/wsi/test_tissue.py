"""Tissue: found on made-up slides whose truth is known, and outlined exactly."""

import json
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from wsi.errors import UsageError
from wsi.tissue import MAX_PIXELS, TissueOptions, find_tissue, is_brightfield, mask_polygons, tissue_mask

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

# Optical density per unit of stain: Ruifrok and Johnston 2001
HAEMATOXYLIN, EOSIN, DAB = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11]), np.array([0.27, 0.57, 0.78])
# Light that thick ink passes
INKS = {"red": (0.8, 0.1, 0.13), "green": (0.1, 0.5, 0.25), "blue": (0.1, 0.2, 0.65), "black": (0.12, 0.12, 0.13)}
STAINS = {
    "H&E": 0.35 * HAEMATOXYLIN + 0.35 * EOSIN,
    "pale H&E": 0.08 * HAEMATOXYLIN + 0.08 * EOSIN,
    "eosin alone": 0.12 * EOSIN,
    "haematoxylin alone": 0.12 * HAEMATOXYLIN,
    "DAB": 0.2 * HAEMATOXYLIN + 0.1 * DAB,
    "pale DAB": 0.03 * HAEMATOXYLIN + 0.08 * DAB,
}
GLASSES = {
    "white": (243, 243, 243),
    "saturated": (255, 255, 255),
    "grey": (200, 200, 200),
    "cream": (245, 240, 222),
    "lavender": (228, 225, 233),
}
MPP = (8.0, 8.0)
SHAPE = (240, 320)  # 1.9 x 2.6 mm


def ellipse(x: float, y: float, a: float, b: float, shape: tuple[int, int] = SHAPE) -> Mask:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.asarray(((columns + 0.5 - x) / a) ** 2 + ((rows + 0.5 - y) / b) ** 2 < 1)


def smooth_noise(shape: tuple[int, int], sigma_px: float, seed: int) -> Floats:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal(shape), (0, 0), sigma_px)
    return np.asarray(noise / noise.std())


def stained(mask: Mask, stain: str = "H&E", um: float = 8.0) -> Floats:
    """The light that tissue of that shape passes, (H, W, 3): nuclei of some 8 um, fibres, and regions of some 60 um."""
    amount = 1 + 0.4 * smooth_noise(mask.shape, 8 / um, 1) + 0.3 * smooth_noise(mask.shape, 60 / um, 2)
    cover = cv2.GaussianBlur(mask.astype(float), (0, 0), 4 / um)
    return np.asarray(np.exp(-(np.clip(amount, 0.15, None) * cover)[..., None] * STAINS[stain]))


def scanned(light: Floats, glass: tuple[int, int, int] = GLASSES["white"], noise: float = 1.2, jpeg: int = 0) -> Pixels:
    grain = np.random.default_rng(3).normal(0, noise, light.shape)
    image: Pixels = np.clip(light * np.array(glass) + grain, 0, 255).round().astype(np.uint8)
    if jpeg:
        return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, jpeg])[1], 1), np.uint8)
    return image


def stroke(colour: str, points: list[tuple[int, int]], width_px: int, shape: tuple[int, int] = SHAPE) -> Floats:
    """The light that a pen's stroke passes, (H, W, 3); its thickness drifts."""
    line = np.zeros(shape, np.uint8)
    cv2.polylines(line, [np.array(points)], False, 1, width_px)
    cover = cv2.GaussianBlur(line.astype(float), (0, 0), 0.7) * np.clip(0.9 + 0.1 * smooth_noise(shape, 15, 4), 0, 1)
    return np.asarray(1 - cover[..., None] * (1 - np.array(INKS[colour])))


def iou(a: Mask, b: Mask) -> float:
    return float(np.count_nonzero(a & b) / np.count_nonzero(a | b))


def pieces(mask: Mask) -> int:
    return int(cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0]) - 1


def covered(polygons: tuple[shapely.Polygon, ...], shape: tuple[int, int]) -> NDArray[np.int64]:
    """How many polygons hold the centre of each pixel."""
    x, y = np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5)
    return np.asarray(sum((shapely.contains_xy(p, x, y).astype(int) for p in polygons), np.zeros(shape, int)))


BIOPSY = ellipse(160, 120, 95, 60)


# --- outlines ---------------------------------------------------------------------------------------------------------


masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(masks)
def test_outlines_cover_just_the_pixels_of_the_mask(mask: Mask) -> None:
    polygons = mask_polygons(mask)
    assert all(polygon.is_valid for polygon in polygons)
    assert sum(polygon.area for polygon in polygons) == np.count_nonzero(mask)
    assert np.array_equal(covered(polygons, mask.shape), mask.astype(int))
    assert len(polygons) == pieces(mask)


@given(masks)
def test_outlines_come_in_the_order_of_their_first_pixel(mask: Mask) -> None:
    labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1]
    expected = list(dict.fromkeys(labels[labels > 0].tolist()))
    found = []
    for polygon in mask_polygons(mask):
        y, x = np.argwhere(covered((polygon,), mask.shape))[0]
        found.append(int(labels[y, x]))
    assert found == expected


@given(masks)
def test_outlines_turn_with_the_mask(mask: Mask) -> None:
    turned = [shapely.transform(p, lambda xy: xy[:, ::-1]) for p in mask_polygons(np.ascontiguousarray(mask.T))]
    upright = mask_polygons(mask)
    assert {p.normalize().wkb for p in turned} == {p.normalize().wkb for p in upright}


@given(masks, st.floats(0.01, 500), st.floats(0.01, 500))
def test_outlines_have_the_area_of_the_mask_at_any_scale(mask: Mask, across: float, down: float) -> None:
    area = sum(polygon.area for polygon in mask_polygons(mask, (across, down)))
    assert area == pytest.approx(np.count_nonzero(mask) * across * down, rel=1e-9)


def test_a_single_pixel_is_outlined_along_its_edges_not_through_its_centre() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    (square,) = mask_polygons(mask, (16.0, 10.0))
    assert square.equals(shapely.box(32, 10, 48, 20))


def test_an_island_in_a_hole_is_a_polygon_of_its_own_at_every_depth() -> None:
    mask = np.zeros((13, 13), bool)
    for inset in range(0, 7, 2):
        mask[inset : 13 - inset, inset : 13 - inset] = True
        mask[inset + 1 : 12 - inset, inset + 1 : 12 - inset] = False
    polygons = mask_polygons(mask)
    assert [polygon.area for polygon in polygons] == [48, 32, 16, 1]
    assert [len(polygon.interiors) for polygon in polygons] == [1, 1, 1, 0]


def test_pixels_that_touch_at_a_corner_part_unless_they_hold_together_elsewhere() -> None:
    assert len(mask_polygons(np.array([[1, 0], [0, 1]], bool))) == 2
    (ring,) = mask_polygons(np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool))
    assert (ring.area, len(ring.interiors), ring.is_valid) == (7, 1, True)


def test_an_empty_mask_has_no_outline_and_a_full_one_is_the_picture() -> None:
    assert mask_polygons(np.zeros((5, 7), bool)) == ()
    (whole,) = mask_polygons(np.ones((5, 7), bool))
    assert whole.equals(shapely.box(0, 0, 7, 5))
    assert len(whole.exterior.coords) == 5  # corners alone


# --- tissue -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glass", GLASSES)
@pytest.mark.parametrize("stain", STAINS)
def test_every_stain_is_found_on_every_glass(stain: str, glass: str) -> None:
    image = scanned(stained(BIOPSY, stain), GLASSES[glass])
    found = tissue_mask(image, MPP)
    assert iou(found, BIOPSY) > 0.95
    assert pieces(found) == 1


def test_jpeg_hardly_moves_the_edge() -> None:
    assert iou(tissue_mask(scanned(stained(BIOPSY), jpeg=60), MPP), BIOPSY) > 0.92


def test_tiny_biopsies_are_all_found_and_kept_apart() -> None:
    truth = np.zeros(SHAPE, bool)
    radii_px = [8, 10, 12, 14, 9, 11, 13, 15, 8, 10, 12, 14]  # 0.013 to 0.045 mm2
    for i, radius in enumerate(radii_px):
        truth |= ellipse(40 + 80 * (i % 4), 40 + 80 * (i // 4), radius, radius)
    found = tissue_mask(scanned(stained(truth, "pale H&E")), MPP)
    assert pieces(found) == len(radii_px)
    assert iou(found, truth) > 0.94


def test_pieces_below_the_least_area_are_dropped_and_others_kept() -> None:
    truth = ellipse(80, 120, 20, 20) | ellipse(240, 120, 6, 6)
    image = scanned(stained(truth))
    assert pieces(tissue_mask(image, MPP, TissueOptions(min_area_um2=4_000))) == 2
    assert pieces(tissue_mask(image, MPP, TissueOptions(min_area_um2=12_000))) == 1
    assert pieces(tissue_mask(image, MPP, TissueOptions(min_area_um2=120_000))) == 0


def test_tears_are_holes_and_lumina_are_not() -> None:
    tear, lumen = ellipse(130, 120, 20, 14), ellipse(210, 120, 5, 5)
    image = scanned(stained(BIOPSY & ~tear & ~lumen))
    found = tissue_mask(image, MPP)
    assert iou(found, BIOPSY & ~tear) > 0.95
    (polygon,) = find_tissue(image, MPP, (16, 16))
    assert len(polygon.interiors) == 1
    (polygon,) = find_tissue(image, MPP, (16, 16), TissueOptions(min_hole_um2=200_000))
    assert len(polygon.interiors) == 0


def test_fat_of_which_only_membranes_show_belongs_to_its_tissue() -> None:
    shape = (600, 800)  # at 2 um, where membranes are a pixel wide
    solid, fat = ellipse(260, 300, 180, 200, shape), ellipse(540, 300, 180, 200, shape)
    cells = np.ones(shape, np.uint8)
    x, y = np.random.default_rng(5).integers(0, shape[::-1], (400, 2)).T  # a cell has some 70 um
    cells[y, x] = 0
    nearest = cv2.distanceTransformWithLabels(cells, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    nearest = nearest.astype(np.float32)
    membranes = (cv2.dilate(nearest, np.ones((3, 3), np.uint8)) != nearest) & fat
    light = stained(solid, um=2) * np.exp(-0.4 * membranes[..., None] * EOSIN)
    image = cv2.resize(scanned(light), (200, 150), interpolation=cv2.INTER_AREA)
    truth = cv2.resize((solid | fat).astype(np.uint8), (200, 150), interpolation=cv2.INTER_NEAREST).astype(bool)
    assert iou(tissue_mask(image, MPP), truth) > 0.9


def test_a_picture_full_of_tissue_is_tissue() -> None:
    for stain in STAINS:
        assert tissue_mask(scanned(stained(np.ones(SHAPE, bool), stain)), MPP).mean() > 0.95, stain


def test_half_dark_and_half_light_tissue_is_not_split() -> None:
    light = stained(np.ones(SHAPE, bool), "pale H&E")
    light[:, 160:] = stained(np.ones(SHAPE, bool), "H&E")[:, 160:] ** 2
    assert tissue_mask(scanned(light), MPP).mean() > 0.98


# --- glass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glass", GLASSES)
@pytest.mark.parametrize(("noise", "jpeg"), [(0, 0), (1, 0), (3, 0), (2, 50), (4, 30)])
def test_bare_glass_holds_no_tissue(glass: str, noise: float, jpeg: int) -> None:
    assert not tissue_mask(scanned(np.ones((*SHAPE, 3)), GLASSES[glass], noise, jpeg), MPP).any()


def test_blotches_of_a_lossy_codec_are_not_tissue() -> None:
    blotches = np.stack([0.02 * smooth_noise(SHAPE, 3, seed) for seed in (11, 12, 13)], axis=-1)
    assert not tissue_mask(scanned(1 + blotches, (235, 235, 235)), MPP).any()


def uneven(strength: tuple[float, float, float]) -> Floats:
    """Light that falls off to the right, (H, W, 3), by this much per channel."""
    return np.asarray(1 - np.linspace(0, 1, SHAPE[1])[None, :, None] * np.array(strength) * np.ones((SHAPE[0], 1, 1)))


@pytest.mark.parametrize("strength", [(0.15, 0.15, 0.15), (0.0, 0.04, 0.1), (0.1, 0.06, 0.1)])
def test_uneven_lamps_are_not_tissue(strength: tuple[float, float, float]) -> None:
    assert not tissue_mask(scanned(uneven(strength)), MPP).any()
    assert iou(tissue_mask(scanned(uneven(strength) * stained(BIOPSY, "pale DAB")), MPP), BIOPSY) > 0.93


def dust() -> Floats:
    light = np.ones((*SHAPE, 3))
    rng = np.random.default_rng(6)
    for _ in range(30):
        spot = ellipse(*rng.uniform((0, 0, 1, 1), (SHAPE[1], SHAPE[0], 6, 6)))
        light *= 1 - 0.5 * cv2.GaussianBlur(spot.astype(float), (0, 0), 1.5)[..., None]
    return light


def seam() -> Floats:
    light = np.ones((*SHAPE, 3))
    light[:, 160:] *= 0.97
    light[:, 159:161] *= (0.9, 0.85, 0.9)
    return light


def bubble() -> Floats:
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    far = np.abs(np.hypot(columns - 160, rows - 120) - 90)
    return np.asarray(1 - 0.5 * np.exp(-((far / 2) ** 2))[..., None] * np.array([1, 0.98, 0.95]))


def coverslip() -> Floats:
    light = np.ones((*SHAPE, 3))
    light[:, 290:] *= (0.93, 0.925, 0.92)
    light[:, 288:291] *= 0.5
    return light


def fibre() -> Floats:
    light = np.ones((*SHAPE, 3))
    cv2.polylines(light, [np.array([(20, 20), (90, 60), (150, 30), (300, 200)])], False, (0.5, 0.6, 0.9), 2)
    return light


ARTEFACTS = {"dust": dust, "seam": seam, "bubble": bubble, "coverslip": coverslip, "fibre": fibre}


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_what_lies_on_glass_is_not_tissue(artefact: str) -> None:
    assert not tissue_mask(scanned(ARTEFACTS[artefact]()), MPP).any()


def test_dark_frames_are_not_tissue() -> None:
    image = scanned(stained(BIOPSY))
    image[:30], image[-20:], image[:, :25], image[:, -40:] = 8, 8, 8, 8
    assert iou(tissue_mask(image, MPP), BIOPSY) > 0.97


def test_a_grey_frame_is_not_taken_for_the_glass() -> None:
    image, truth = np.full((400, 600, 3), 150, np.uint8), np.zeros((400, 600), bool)
    image[80:320, 140:460], truth[80:320, 140:460] = scanned(stained(BIOPSY, "pale H&E")), BIOPSY
    assert iou(tissue_mask(image, MPP), truth) > 0.95


def test_a_slide_lost_in_black_is_found() -> None:
    image, truth = np.full((700, 900, 3), 5, np.uint8), np.zeros((700, 900), bool)
    image[200:440, 300:620], truth[200:440, 300:620] = scanned(stained(BIOPSY)), BIOPSY
    assert iou(tissue_mask(image, MPP), truth) > 0.97
    assert is_brightfield(image)


@pytest.mark.parametrize("glass", ["grey", "cream", "lavender"])
@pytest.mark.parametrize("side", [500, 2000])
def test_glass_beside_white_padding_is_not_tissue(glass: str, side: int) -> None:
    image, truth = np.full((side, side, 3), 255, np.uint8), np.zeros((side, side), bool)
    image[100:340, 100:420] = scanned(stained(BIOPSY, "pale H&E"), GLASSES[glass])
    truth[100:340, 100:420] = BIOPSY
    assert iou(tissue_mask(image, MPP), truth) > 0.95


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 50), (60, 70)])
@pytest.mark.parametrize("level", [0, 90, 128, 200, 243, 255])
def test_a_constant_grey_picture_holds_no_tissue(shape: tuple[int, int], level: int) -> None:
    assert not tissue_mask(np.full((*shape, 3), level, np.uint8), MPP).any()


# --- pen --------------------------------------------------------------------------------------------------------------

AROUND = [(40, 30), (280, 25), (300, 210), (30, 220)]


@pytest.mark.parametrize("colour", INKS)
@pytest.mark.parametrize("glass", ["white", "cream"])
def test_pen_alone_is_not_tissue(colour: str, glass: str) -> None:
    assert not tissue_mask(scanned(stroke(colour, AROUND, 20), GLASSES[glass]), MPP).any()


@pytest.mark.parametrize("colour", INKS)
def test_tissue_ringed_by_pen_is_found_without_it(colour: str) -> None:
    found = tissue_mask(scanned(stained(BIOPSY) * stroke(colour, AROUND, 16)), MPP)
    assert iou(found, BIOPSY) > 0.95
    assert pieces(found) == 1


@pytest.mark.parametrize("colour", INKS)
def test_tissue_under_a_stroke_that_crosses_it_survives(colour: str) -> None:
    pen = stroke(colour, [(150, 0), (165, 239)], 16)
    found = tissue_mask(scanned(stained(BIOPSY) * pen), MPP)
    under = (pen.min(axis=2) < 0.7) & BIOPSY
    assert found[under].mean() > 0.8
    assert iou(found, BIOPSY) > 0.93


@pytest.mark.parametrize("colour", INKS)
def test_pen_with_soft_edges_is_not_tissue(colour: str) -> None:
    pen = cv2.GaussianBlur(stroke(colour, AROUND, 20), (0, 0), 2)
    assert not tissue_mask(scanned(pen), MPP).any()


def test_black_pigment_in_tissue_is_not_ink() -> None:
    pigment = np.ones((*SHAPE, 3))
    for x, y in np.random.default_rng(9).integers(0, (SHAPE[1], SHAPE[0]), (400, 2)):
        pigment[y : y + 3, x : x + 3] = 0.08
    found = tissue_mask(scanned(stained(BIOPSY) * np.where(BIOPSY[..., None], pigment, 1)), MPP)
    assert iou(found, BIOPSY) > 0.97


def test_a_colour_of_ink_that_is_broader_than_a_pen_is_a_stain() -> None:
    amount = 1.5 * np.clip(1 + 0.2 * smooth_noise(SHAPE, 1, 8), 0.8, None) * BIOPSY
    image = scanned(np.asarray(np.exp(-amount[..., None] * np.array([1.0, 0.6, 0.1]))))
    assert not tissue_mask(image, MPP).any()
    assert iou(tissue_mask(image, MPP, TissueOptions(pen_width_um=500)), BIOPSY) > 0.95
    assert iou(tissue_mask(image, MPP, TissueOptions(pen_width_um=0)), BIOPSY) > 0.95


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ringed", [False, True])
def test_the_mask_does_not_depend_on_how_much_is_worked_out_at_a_time(
    ringed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    light = stained(BIOPSY) * np.linspace(0.9, 1, SHAPE[1])[:, None]
    if ringed:
        light = light * stroke("green", [(40, 30), (280, 40), (270, 210), (50, 200), (40, 30)], 9)
    whole = tissue_mask(scanned(light), MPP)
    assert iou(whole, BIOPSY) > 0.9
    monkeypatch.setattr("wsi.tissue._STRIP_PIXELS", 7 * SHAPE[1])
    np.testing.assert_array_equal(tissue_mask(scanned(light), MPP), whole)


def test_very_large_slides_are_looked_at_coarser_and_others_as_asked() -> None:
    options = TissueOptions(min_chroma=0.03)
    assert options.within((25_600, 20_480)) is options
    wide = options.within((102_400, 81_920))
    assert wide.mpp == pytest.approx((102_400 * 81_920 / MAX_PIXELS) ** 0.5)
    assert wide.tolerance_um / wide.mpp == pytest.approx(options.tolerance_um / options.mpp)
    assert TissueOptions(tolerance_um=8.0).within((102_400, 81_920)).tolerance_um == wide.mpp
    assert wide.min_chroma == 0.03


def test_resolution_hardly_matters() -> None:
    shape = (480, 640)
    truth = ellipse(200, 200, 120, 90, shape) & ~ellipse(220, 200, 30, 20, shape) | ellipse(480, 330, 90, 100, shape)
    fine = scanned(stained(truth, um=4))
    found = {}
    for um, size in ((4, (640, 480)), (8, (320, 240)), (16, (160, 120))):
        mask = tissue_mask(cv2.resize(fine, size, interpolation=cv2.INTER_AREA), (um, um)).astype(np.uint8)
        found[um] = cv2.resize(mask, (640, 480), interpolation=cv2.INTER_NEAREST).astype(bool)
        assert iou(found[um], truth) > 0.93
    assert iou(found[4], found[8]) > 0.97
    assert iou(found[8], found[16]) > 0.93


def test_pixels_need_not_be_square() -> None:
    image = scanned(stained(BIOPSY))
    squeezed = cv2.resize(image, (160, 240), interpolation=cv2.INTER_AREA)
    (polygon,) = find_tissue(squeezed, (16.0, 8.0), (32.0, 16.0))
    (upright,) = find_tissue(image, MPP, (16.0, 16.0))
    assert polygon.intersection(upright).area / polygon.union(upright).area > 0.95


def test_the_mask_turns_with_the_picture() -> None:
    light = stained(BIOPSY, "pale H&E") * stroke("green", [(10, 10), (200, 230)], 14) * uneven((0.05, 0.05, 0.08))
    image = scanned(light)
    mask = tissue_mask(image, MPP)
    for turned, expected in (
        (image[:, ::-1], mask[:, ::-1]),
        (image[::-1], mask[::-1]),
        (image.swapaxes(0, 1), mask.T),
    ):
        assert iou(tissue_mask(turned, MPP), expected) > 0.995


@settings(max_examples=10, deadline=None)
@given(st.floats(0.65, 1.04))
def test_brightness_hardly_matters(factor: float) -> None:
    image = scanned(stained(BIOPSY, "pale H&E"))
    brighter = np.clip(image * factor, 0, 255).round().astype(np.uint8)
    assert iou(tissue_mask(brighter, MPP), tissue_mask(image, MPP)) > 0.98


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))), st.floats(0.3, 300))
def test_any_picture_gives_a_mask_of_its_shape_and_valid_outlines(image: Pixels, um: float) -> None:
    options = TissueOptions(min_area_um2=0, min_width_um=0, min_hole_um2=0)
    assert tissue_mask(image, (um, um), options).shape == image.shape[:2]
    picture = shapely.box(0, 0, image.shape[1] * 4, image.shape[0] * 4)
    for polygon in find_tissue(image, (um, um), (4.0, 4.0), options):
        assert polygon.is_valid
        assert picture.buffer(1e-6).covers(polygon)


def test_outlines_are_the_mask_in_level_0_pixels_within_the_tolerance() -> None:
    image = scanned(stained(BIOPSY | ellipse(30, 30, 18, 15)))
    scale = (31.7, 32.1)
    exact = mask_polygons(tissue_mask(image, MPP), scale)
    simple = find_tissue(image, MPP, scale, TissueOptions(tolerance_um=6.0))
    assert len(simple) == len(exact) == 2
    for rough, sharp in zip(simple, exact, strict=True):
        assert rough.is_valid
        assert rough.exterior.hausdorff_distance(sharp.exterior) <= 6.0 * 32.1 / 8 + 1e-9
        assert len(rough.exterior.coords) < 0.7 * len(sharp.exterior.coords)
    assert simple[0].bounds[1] < simple[1].bounds[1]


# --- brightfield, and what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [(0.05, 0.1, 1.0), (0.1, 1.0, 0.1), (1.0, 0.1, 0.05), (1.0, 1.0, 1.0)])
def test_fluorescence_is_not_brightfield(colour: tuple[float, float, float]) -> None:
    cells = np.clip(BIOPSY * (0.5 + 0.3 * smooth_noise(SHAPE, 2, 7)), 0.02, 1)
    image = np.round(cells[..., None] * np.array(colour) * 255).astype(np.uint8)
    assert not is_brightfield(image)


def test_tissue_that_fills_a_fluorescence_picture_is_not_brightfield() -> None:
    glow = np.clip(0.6 + 0.15 * smooth_noise(SHAPE, 2, 7), 0, 1)
    assert not is_brightfield(np.round(glow[..., None] * np.array([10, 20, 255])).astype(np.uint8))


@pytest.mark.parametrize("stain", STAINS)
def test_slides_are_brightfield_with_and_without_glass(stain: str) -> None:
    assert is_brightfield(scanned(stained(BIOPSY, stain)))
    assert is_brightfield(scanned(stained(np.ones(SHAPE, bool), stain)))


@pytest.mark.parametrize(
    "options",
    [
        {"mpp": 0},
        {"mpp": -8.0},
        {"min_area_um2": float("nan")},
        {"min_hole_um2": -1},
        {"gap_um": float("inf")},
        {"min_chroma": 0},
        {"min_chroma": 0.7},
        {"tolerance_um": 8.5},
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        TissueOptions(**options)


def test_pictures_and_masks_of_another_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="float64"):
        tissue_mask(np.ones((4, 4, 3)), MPP)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="4, 4, 4"):
        tissue_mask(np.ones((4, 4, 4), np.uint8), MPP)
    with pytest.raises(UsageError, match="mpp"):
        find_tissue(np.ones((4, 4, 3), np.uint8), (8.0, 0.0), (1, 1))
    with pytest.raises(UsageError, match="uint8"):
        mask_polygons(np.ones((4, 4), np.uint8))


# --- real slides ------------------------------------------------------------------------------------------------------


def thumbnail(
    path: Path, um: float, mpp: float | None = None
) -> tuple[Pixels, tuple[float, float], tuple[float, float]]:
    """A slide reduced to ``um`` microns per pixel, transparent places white; its mpp, and level-0 pixels per pixel."""
    with openslide.OpenSlide(path) as slide:
        mpp = mpp or float(slide.properties["openslide.mpp-x"])
        level = max(i for i, down in enumerate(slide.level_downsamples) if i == 0 or down * mpp <= um)
        rgba = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
        white = np.full_like(rgba[..., :3], 255)
        rgb = np.where(rgba[..., 3:] > 127, rgba[..., :3], white)
        size = [max(1, round(n * min(1, mpp / um))) for n in slide.dimensions]
        scale = (slide.dimensions[0] / size[0], slide.dimensions[1] / size[1])
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), (scale[0] * mpp, scale[1] * mpp), scale


@pytest.mark.shared
@pytest.mark.parametrize(("name", "count"), [("train", 85), ("testB", 20)])
def test_every_core_of_a_real_microarray_is_one_piece(shared: Path, name: str, count: int) -> None:
    image, mpp, scale = thumbnail(shared / f"slides/glas_composite_{name}.tif", 8.0)
    cores = json.loads((shared / f"slides/glas_composite_{name}.json").read_text())
    polygons, mask = find_tissue(image, mpp, scale), tissue_mask(image, mpp)
    assert len(polygons) == len(cores) == count
    full = 0
    for core in cores:
        box = shapely.box(core["x"], core["y"], core["x"] + core["w"], core["y"] + core["h"])
        (piece,) = (polygon for polygon in polygons if polygon.intersects(box))
        assert piece.difference(box).area < 0.05 * box.area, core["name"]
        full += piece.intersection(box).area > 0.85 * box.area
        left, top, right, bottom = (round(v / s) for v, s in zip(box.bounds, (*scale, *scale), strict=True))
        tissue = cv2.GaussianBlur(image, (0, 0), 1.5)[top:bottom, left:right].min(axis=2) < 238
        assert mask[top:bottom, left:right][tissue].mean() > 0.9, core["name"]
    assert full >= 0.8 * count  # the other fields look onto open glass at a side


@pytest.mark.shared
def test_sparse_real_immunohistochemistry_is_found_and_its_glass_is_not(shared: Path) -> None:
    image, mpp, scale = thumbnail(shared / "slides/1065626.svs", 8.0)
    polygons = find_tissue(image, mpp, scale)
    fragments = [(2900, 1850), (2690, 2240), (4400, 6850), (4960, 6380), (5370, 6540), (7350, 7080), (8170, 7310)]
    assert all(any(polygon.contains(shapely.Point(xy)) for polygon in polygons) for xy in fragments)
    assert len(polygons) == 4
    assert sum(polygon.area for polygon in polygons) * 0.5026**2 == pytest.approx(0.3e6, rel=0.1)


@pytest.mark.shared
def test_one_real_section_is_found_alike_in_three_formats(shared: Path) -> None:
    areas = {}
    for name, assumed in (("cmu-1-small-region.svs", None), ("philips_cmu1.tiff", None), ("leica_cmu1.scn", 0.5)):
        image, mpp, scale = thumbnail(shared / "slides" / name, 8.0, assumed)
        (polygon,) = find_tissue(image, mpp, scale)
        areas[name] = polygon.area * (mpp[0] / scale[0]) * (mpp[1] / scale[1])
    assert max(areas.values()) < 1.1 * min(areas.values())


@pytest.mark.shared
def test_a_coarse_real_overview_gives_four_lymph_nodes_and_no_specks_of_dust(shared: Path) -> None:
    image, mpp, scale = thumbnail(shared / "slides/dicom-camelyon-jpeg.dcm", 8.0)
    assert mpp[0] == pytest.approx(28.97, abs=0.01)
    mask = tissue_mask(image, mpp)
    purple = cv2.GaussianBlur(image, (0, 0), 1)[..., 1] < 150
    assert mask[purple].mean() > 0.99
    assert 0.3 < mask.mean() < 0.4
    large = [p for p in find_tissue(image, mpp, scale) if p.area * mpp[0] ** 2 > 10e6]
    assert sum(p.area for p in large) > 0.97 * np.count_nonzero(mask)


@pytest.mark.shared
def test_a_real_fluorescence_slide_is_not_brightfield_and_the_others_are(shared: Path) -> None:
    assert not is_brightfield(thumbnail(shared / "slides/fluorescence-dapi.ndpi", 8.0)[0])
    for name in ("1065626.svs", "cmu-1-small-region.svs", "dicom-camelyon-jpeg.dcm"):
        assert is_brightfield(thumbnail(shared / "slides" / name, 8.0)[0])
