"""Metrics against hand-made cases, scikit-learn, and distances worked out pair by pair."""

import math

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from segmentation import metrics
from segmentation.metrics import calibration, compare_maps, compare_objects, interval_of_mean, paired_difference
from segmentation.place import MapPlace
from segmentation.polygons import PolygonOptions, find_polygons
from segmentation.raster import Raster
from tests.segmentation.label_maps import nasty_map
from wsi.annotation import Annotation
from wsi.errors import UsageError

PIXEL = MapPlace((1, 1), (1, 1))
CLASSES = {1: "Tumor", 2: "Stroma", 3: "Necrosis", 4: "Other"}


# Rasters


@given(seed=st.integers(0, 1 << 32), scale=st.sampled_from([1.0, 3.0, 7.3]))
@settings(max_examples=30)
def test_outlines_drawn_again_are_the_map_they_came_from(seed: int, scale: float) -> None:
    labels = nasty_map(seed)
    place = MapPlace((scale, scale), (0.5, 0.5), (1000.5, -3))
    found = list(find_polygons(labels, place, CLASSES, PolygonOptions(tolerance_um=0)))
    raster = Raster(found, place, labels.shape, {name: label for label, name in CLASSES.items()})
    assert np.array_equal(raster[0 : len(labels)], labels)
    middle = len(labels) // 2
    assert np.array_equal(np.concatenate([raster[0:middle], raster[middle : len(labels)]]), labels)


def test_overlapping_areas_of_a_class_are_one_and_later_classes_lie_on_top() -> None:
    shapes = [
        Annotation(shapely.box(0, 0, 6, 6), "A"),
        Annotation(shapely.box(3, 3, 9, 9), "A"),
        Annotation(shapely.box(4, 4, 5, 5), "B"),
        Annotation(shapely.box(0, 0, 9, 9), "C"),
        Annotation(shapely.Point(1, 1), "B"),
    ]
    drawn = Raster(shapes, PIXEL, (10, 10), {"A": 1, "B": 2})[0:10]
    expected = np.zeros((10, 10), int)
    expected[:6, :6] = expected[3:9, 3:9] = 1
    expected[4, 4] = 2
    assert np.array_equal(drawn, expected)


def test_areas_that_leave_the_map_are_cut_at_its_edge() -> None:
    drawn = Raster([Annotation(shapely.box(-5, -5, 3, 30), "A")], PIXEL, (10, 10), {"A": 1})[0:10]
    assert drawn.sum() == 30
    assert drawn[:, :3].all()


# Areas and borders


def test_areas_of_a_hand_made_case() -> None:
    truth, found = np.zeros((10, 10), int), np.zeros((10, 10), int)
    truth[2:6, 2:6] = 1  # 16 pixels
    found[4:8, 4:10] = 1  # 24, of which 4 are right
    found[0, 0] = 2
    result = compare_maps(found, truth, PIXEL, {1: "A", 2: "B", 3: "C"})
    a = result["A"]
    assert (a.both, a.only_found, a.only_true) == (4, 20, 12)
    assert (a.dice, a.iou, a.precision, a.recall) == (8 / 40, 4 / 36, 4 / 24, 4 / 16)
    assert (result["B"].dice, result["B"].precision) == (0, 0)
    assert math.isnan(result["B"].recall)
    assert math.isnan(result["B"].hd95_um)
    assert math.isnan(result["C"].dice)


def test_a_border_that_is_moved_is_so_many_microns_away() -> None:
    truth, found = np.zeros((60, 60), int), np.zeros((60, 60), int)
    truth[10:50, 10:30] = 1
    found[10:50, 10:34] = 1  # four pixels farther to the right
    place = MapPlace((2, 2), (0.5, 0.25))  # a micron wide, half a micron high
    assert compare_maps(found, truth, place, {1: "A"})["A"].hd95_um == 4
    assert compare_maps(truth, truth, place, {1: "A"})["A"].hd95_um == 0


@settings(max_examples=20)
@given(seed=st.integers(0, 1 << 32), pixels=st.integers(1, 900))
def test_numbers_are_those_of_scikit_learn_and_of_all_pairs_however_strips_fall(seed: int, pixels: int) -> None:
    from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

    truth = nasty_map(seed, 30)
    found = np.random.default_rng(seed).permutation(truth.ravel()).reshape(truth.shape)
    place = MapPlace((2, 2), (0.3, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        strips = metrics._overlapping_strips
        patch.setattr(metrics, "_overlapping_strips", lambda *maps: strips(*maps, pixels_at_once=pixels))
        result = compare_maps(found, truth, place, CLASSES)
    for label, name in CLASSES.items():
        mine, true = (found == label).ravel(), (truth == label).ravel()
        if not true.any():
            continue
        for score, value in (
            (f1_score, result[name].dice),
            (jaccard_score, result[name].iou),
            (precision_score, result[name].precision),
            (recall_score, result[name].recall),
        ):
            assert value == pytest.approx(score(true, mine, zero_division=0))
        edges = [_border_by_hand(m) * np.array(place.pixel_um) for m in (found == label, truth == label)]
        apart = np.sqrt(((edges[0][:, None] - edges[1][None]) ** 2).sum(axis=2))
        expected = max(np.percentile(apart.min(axis=1), 95), np.percentile(apart.min(axis=0), 95))
        assert result[name].hd95_um == pytest.approx(expected)


def _border_by_hand(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape

    def outside(y: int, x: int) -> bool:
        return not (0 <= y < height and 0 <= x < width and mask[y, x])

    return np.array(
        [
            (x, y)
            for y, x in zip(*np.nonzero(mask), strict=True)
            if outside(y - 1, x) or outside(y + 1, x) or outside(y, x - 1) or outside(y, x + 1)
        ]
    )


def test_pixels_to_ignore_count_for_nothing() -> None:
    truth, found = np.ones((4, 4), int), np.ones((4, 4), int)
    truth[:, 2:] = 9
    found[:, 3] = 2
    result = compare_maps(found, truth, PIXEL, {1: "A", 2: "B"}, ignore=9)
    assert (result["A"].both, result["A"].only_found, result["A"].only_true) == (8, 0, 0)
    assert (result["B"].both, result["B"].only_found) == (0, 0)


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(UsageError, match="pixel by pixel"):
        compare_maps(np.zeros((3, 3), int), np.zeros((3, 4), int), PIXEL, {1: "A"})


# Objects


def test_objects_of_a_hand_made_case() -> None:
    truth = [shapely.box(0, 0, 10, 10), shapely.box(100, 0, 110, 10), shapely.box(200, 0, 210, 10)]
    found = [
        shapely.box(0, 0, 10, 6),  # covers 60 of the first's 100
        shapely.box(0, 6, 10, 10),  # 40 of it: no match
        shapely.box(100, 0, 104, 10),  # 40 of the second's
        shapely.box(500, 0, 510, 10),  # nowhere near: the third true one is nearest
    ]
    result = compare_objects(found, truth, (0.5, 0.5))
    assert (result.n_found, result.n_true, result.n_matched) == (4, 3, 1)
    assert (result.precision, result.recall, result.f1) == (1 / 4, 1 / 3, 2 / 7)
    mine = (60 * (120 / 160) + 40 * (80 / 140) + 40 * (80 / 140) + 100 * 0) / 240
    true = (100 * (120 / 160) + 100 * (80 / 140) + 100 * 0) / 300
    assert result.dice == pytest.approx((mine + true) / 2)
    away_mine = (60 * 4 + 40 * 6 + 40 * 6 + 100 * 300) / 240 * 0.5  # microns
    away_true = (100 * 4 + 100 * 6 + 100 * 106) / 300 * 0.5  # the third's nearest is the one at 100
    assert result.hausdorff_um == pytest.approx((away_mine + away_true) / 2)


def test_objects_that_are_equal_agree_wholly_and_none_are_not_compared() -> None:
    shapes = [shapely.box(0, 0, 5, 5), shapely.Point(20, 20).buffer(4)]
    same = compare_objects(shapes, shapes, (1, 1))
    assert same.f1 == 1
    assert same.dice == pytest.approx(1)
    assert same.hausdorff_um == 0
    assert compare_objects([], shapes, (1, 1)).f1 == compare_objects(shapes, [], (1, 1)).dice == 0
    assert math.isnan(compare_objects([], [], (1, 1)).f1)
    assert math.isnan(compare_objects([], shapes, (1, 1)).hausdorff_um)


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=20)
def test_object_measures_are_those_of_the_definition_pixel_by_pixel(seed: int) -> None:
    truth = (nasty_map(seed, 25) > 0).astype(int)
    found = np.roll(truth, 1, axis=0) & (np.random.default_rng(seed).random(truth.shape) < 0.8)
    objects = [
        [a.geometry for a in find_polygons(m, PIXEL, {1: "A"}, PolygonOptions(tolerance_um=0))] for m in (found, truth)
    ]
    result = compare_objects(objects[0], objects[1], (1, 1))
    pixels = [
        [Raster([Annotation(shape, "A")], PIXEL, truth.shape, {"A": 1})[0 : len(truth)] > 0 for shape in shapes]
        for shapes in objects
    ]
    if not pixels[0] or not pixels[1]:
        return
    shared = np.array([[np.count_nonzero(a & b) for b in pixels[1]] for a in pixels[0]])
    sizes = [np.array([np.count_nonzero(m) for m in masks]) for masks in pixels]
    halves = []
    for table, own, other in ((shared, sizes[0], sizes[1]), (shared.T, sizes[1], sizes[0])):
        best = table.argmax(axis=1)
        halves.append(np.average(2 * table[np.arange(len(own)), best] / (own + other[best]), weights=own))
    matched = {int(row.argmax()) for row in shared if row.max() > 0 and row.max() >= sizes[1][row.argmax()] / 2}
    assert result.n_matched == len(matched)
    assert result.dice == pytest.approx(sum(halves) / 2, abs=0.05)  # of several with equal overlap any may be taken


# Calibration


def test_a_coin_is_calibrated_and_a_braggart_is_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.random((400, 500)).astype(np.float32)
    truth = (rng.random(p.shape) < p).astype(int)
    honest = calibration(p, truth, 1)
    assert honest.ece < 0.01
    assert np.allclose(honest.said, honest.so, atol=0.03)
    assert honest.brier == pytest.approx(1 / 6, abs=0.005)
    braggart = calibration(np.full_like(p, 0.9), truth, 1)
    assert braggart.ece == pytest.approx(0.9 - truth.mean(), abs=1e-6)


def test_the_calibration_error_of_a_hand_made_case_leaves_out_what_was_not_scored() -> None:
    p = np.array([[0.05, 0.05, 0.95, 0.95, np.nan]])
    result = calibration(p, np.array([[0, 2, 2, 2, 0]]), 2, bins=10)
    assert result.counts.tolist() == [2, *[0] * 8, 2]
    assert result.ece == pytest.approx((2 * abs(0.05 - 0.5) + 2 * abs(0.95 - 1)) / 4)
    with pytest.raises(UsageError, match="from 0 to 1"):
        calibration(p + 0.5, np.zeros((1, 5), int), 1)
    with pytest.raises(UsageError, match="different shapes"):
        calibration(p, np.zeros((1, 4), int), 1)


# Intervals


def test_an_interval_covers_the_mean_it_is_of_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = [
        (found := interval_of_mean(rng.normal(0.8, 0.1, 40).tolist(), draws=400, seed=i)).low <= 0.8 <= found.high
        for i in range(200)
    ]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_intervals_leave_out_slides_without_the_class_and_pair_slides() -> None:
    assert interval_of_mean([0.5, math.nan, 0.7]) == interval_of_mean([0.5, 0.7])
    assert interval_of_mean([math.nan]).n == 0
    assert math.isnan(interval_of_mean([]).value)
    first, second = [0.9, 0.5, 0.7], [0.8, 0.4, 0.6]
    assert paired_difference(first, second)[:3] == pytest.approx((0.1, 0.1, 0.1))
