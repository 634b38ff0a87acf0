"""Polygons: a label map and its outlines cover the same, are valid, share their borders, and stay within the tolerance."""

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import shapely
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from segmentation.components import find_components
from segmentation.measure import summarize, write_objects_csv, write_summary_csv
from segmentation.place import MapPlace
from segmentation.polygons import PolygonOptions, find_polygons
from tests.segmentation.label_maps import nasty_map
from tests.wsi.qupath_model import import_objects
from wsi.annotation import Annotation
from wsi.errors import UsageError
from wsi.geojson import Frame, write_geojson
from wsi.tissue import mask_polygons

CLASSES = {1: "Tumor", 2: "Stroma", 3: "Necrosis", 4: "Other"}
PIXEL = MapPlace((1, 1), (1, 1))
EXACT = PolygonOptions(tolerance_um=0)


def _polygons(labels: np.ndarray, place: MapPlace = PIXEL, **options: float) -> list[Annotation]:
    return list(find_polygons(labels, place, CLASSES, PolygonOptions(**{"tolerance_um": 0, **options})))  # type: ignore[arg-type]


def _union(found: list[Annotation], name: str | None = None) -> shapely.Geometry:
    return shapely.union_all([each.geometry for each in found if name in (None, each.class_name)])


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 32))
def test_without_tolerance_pieces_are_exactly_the_pixels(seed: int) -> None:
    labels = nasty_map(seed)
    found = _polygons(labels)
    for label, name in CLASSES.items():
        expected = mask_polygons(labels == label)  # an independent tracer, one class at a time
        mine = [each.geometry for each in found if each.class_name == name]
        assert sorted(shape.area for shape in mine) == sorted(shape.area for shape in expected)
        assert sorted(len(shape.interiors) for shape in mine) == sorted(len(shape.interiors) for shape in expected)
        assert shapely.union_all(mine).symmetric_difference(shapely.union_all(expected)).area == 0


@example(seed=341, tolerance_um=3.0, scale=4)  # a border that, simplified, swallows a piece beside it
@given(
    seed=st.integers(0, 1 << 32), tolerance_um=st.sampled_from([0.3, 0.9, 2.0, 8.0]), scale=st.sampled_from([1, 4, 7.3])
)
def test_simplified_polygons_are_valid_share_their_borders_and_stay_near(
    seed: int, tolerance_um: float, scale: float
) -> None:
    labels = nasty_map(seed)
    place = MapPlace((scale, scale), (0.25, 0.25), (100_000.3, -5))
    exact, found = _polygons(labels, place), _polygons(labels, place, tolerance_um=tolerance_um)
    shapes = [each.geometry for each in found]
    assert shapely.is_valid(shapes).all()
    assert shapely.coverage_is_valid(shapes)  # no overlap, and shared borders point by point
    assert [each.class_name for each in found] == [each.class_name for each in exact]
    away_px = shapely.hausdorff_distance(shapely.boundary(shapes), shapely.boundary([each.geometry for each in exact]))
    assert max(away_px, default=0) * 0.25 <= tolerance_um + 0.01  # and the rounding to 0.01 px


def test_touching_classes_have_no_gap_between_them() -> None:
    rng = np.random.default_rng(5)
    centres = rng.uniform(0, 120, (60, 2))
    yx = np.mgrid[:120, :120].transpose(1, 2, 0) + rng.normal(0, 0.3, (120, 120, 2))  # ragged borders
    nearest = (((yx[:, :, None] - centres) ** 2).sum(axis=-1)).argmin(axis=-1)
    labels = rng.integers(1, 5, 60)[nearest]
    found = _polygons(labels, tolerance_um=3)
    exact = _polygons(labels)
    assert len(found) == len(exact) > 20
    whole = shapely.unary_union([each.geometry for each in found])
    assert whole.geom_type == "Polygon"
    assert not whole.interiors
    assert sum(each.geometry.area for each in found) == pytest.approx(whole.area)
    assert sum(shapely.get_num_coordinates(each.geometry) for each in found) < 0.6 * sum(
        shapely.get_num_coordinates(each.geometry) for each in exact
    )


@given(seed=st.integers(0, 1 << 32), pixels_at_once=st.integers(1, 2000))
def test_how_many_rows_are_read_at_once_does_not_show(seed: int, pixels_at_once: int) -> None:
    labels = nasty_map(seed)
    values = np.random.default_rng(seed).random(labels.shape)
    whole, strips = (find_components(labels, values, pixels_at_once=n) for n in (1 << 24, pixels_at_once))
    assert np.array_equal(whole.labels, strips.labels)
    assert np.array_equal(whole.pixels, strips.pixels)
    assert np.array_equal(whole.xy, strips.xy)
    assert np.array_equal(whole.around, strips.around)
    assert whole.sums is not None
    assert strips.sums is not None
    assert np.allclose(whole.sums, strips.sums)


def test_pixels_that_touch_at_a_point_are_two_pieces_and_one_that_touches_itself_has_a_hole() -> None:
    assert len(_polygons(np.array([[1, 0], [0, 1]]))) == 2
    ring = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]])  # closed at the lower right by a point alone
    (found,) = _polygons(ring)
    assert found.geometry.is_valid
    assert found.geometry.area == 7
    assert len(found.geometry.interiors) == 1


def test_a_piece_in_a_hole_of_another_fills_it_to_the_last_point() -> None:
    y, x = np.mgrid[:60, :60]
    radius = np.hypot(x - 30, y - 30)
    labels = np.where(radius < 12, 2, np.where(radius < 27, 1, 0))
    outer, inner = sorted(_polygons(labels, tolerance_um=2), key=lambda each: -each.geometry.area)
    assert shapely.Polygon(outer.geometry.interiors[0]).equals(inner.geometry)
    assert len(inner.geometry.exterior.coords) < 20


def test_small_pieces_are_left_out_and_small_holes_filled_in_square_microns() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[2:30, 2:30] = 1
    labels[5:8, 5:8] = 0  # a hole of 9 pixels
    labels[12:18, 12:18] = 0  # and one of 36
    labels[20:23, 20:23] = 2  # a speck of another class inside
    labels[35:37, 35:37] = 1  # a crumb of 4
    place = MapPlace((2, 2), (0.5, 0.5))  # a pixel is a square micron
    options = {"min_area_um2": 10, "min_hole_um2": 10}
    (found,) = _polygons(labels, place, **options)
    assert found.measurements["Area µm^2"] == 28 * 28 - 36
    assert len(found.geometry.interiors) == 1
    assert found.geometry.bounds == (4, 4, 60, 60)  # twice the pixels
    kept = _polygons(labels, place, min_area_um2=9, min_hole_um2=9)
    assert len(kept) == 2
    assert sorted(len(each.geometry.interiors) for each in kept) == [0, 3]


def test_a_gap_between_classes_goes_to_the_one_with_the_longer_border() -> None:
    labels = np.ones((9, 12), np.uint8)
    labels[:, 8:] = 2
    labels[3:6, 6:8] = 0
    found = _polygons(labels, min_hole_um2=7)
    assert {each.class_name: each.geometry.area for each in found} == {"Tumor": 72, "Stroma": 36}


def test_background_open_to_the_edge_is_no_hole() -> None:
    labels = np.ones((5, 5), np.uint8)
    labels[0, 2] = 0
    assert _polygons(labels, min_hole_um2=1000)[0].geometry.area == 24


def test_measurements_are_in_microns_where_pixels_are_not_square() -> None:
    labels = np.zeros((10, 10), np.uint8)
    labels[2:5, 3:7] = 1
    place = MapPlace((4, 8), (0.25, 0.5), (100, 200))
    (found,) = find_polygons(labels, place, CLASSES, EXACT, probabilities=np.where(labels, 0.75, np.nan))
    assert found.geometry.bounds == (112, 216, 128, 240)
    assert found.measurements == {"Area µm^2": 4 * 1 * 3 * 4, "Perimeter µm": 2 * (4 + 12), "Mean probability": 0.75}


def test_the_mean_probability_is_that_of_the_pieces_pixels() -> None:
    labels = nasty_map(11)
    values = np.random.default_rng(0).random(labels.shape)
    found = list(find_polygons(labels, PIXEL, CLASSES, EXACT, probabilities=values))
    total = sum(each.measurements["Mean probability"] * each.measurements["Area µm^2"] for each in found)
    assert total == pytest.approx(values[labels > 0].sum())


def test_a_map_without_pieces_gives_none_and_one_of_nothing_but_a_piece_gives_its_frame() -> None:
    assert _polygons(np.zeros((7, 9), np.uint8)) == []
    (found,) = _polygons(np.ones((7, 9), bool))
    assert found.geometry.equals(shapely.box(0, 0, 9, 7))


def test_labels_may_be_objects_that_touch() -> None:
    labels = np.repeat([[7, 7, 1000, 1000, 0]], 3, axis=0).astype(np.uint16)
    found = list(find_polygons(labels, PIXEL, {7: "Gland", 1000: "Gland"}, EXACT))
    assert [(each.class_name, each.geometry.area) for each in found] == [("Gland", 6), ("Gland", 6)]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.full((3, 3), 9), "holds \\[9\\], for which no class is given"),
        (np.full((3, 3), -1), "found -1"),
        (np.full((3, 3), 0.5), "not float64"),
        (np.zeros((3, 3, 3), int), "is \\(H, W\\)"),
    ],
)
def test_a_map_that_is_none_is_refused(labels: np.ndarray, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        _polygons(labels)


@pytest.mark.parametrize("bad", [{"scale": (0, 1)}, {"mpp": (1, float("nan"))}, {"origin": (float("inf"), 0)}])
def test_a_place_that_is_none_is_refused(bad: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="finite"):
        MapPlace(**{"scale": (1, 1), "mpp": (1, 1), **bad})


def test_a_zarr_map_is_read_a_strip_at_a_time_in_little_memory(tmp_path: Path) -> None:
    labels = zarr.create_array(tmp_path / "labels.zarr", shape=(16_000, 4_000), chunks=(500, 500), dtype="u1")
    yy, xx = np.mgrid[:500, :4000]
    disc = ((xx - 1900) ** 2 / 40 + (yy - 250) ** 2 < 200**2).astype(np.uint8)
    for top in range(0, 16_000, 500):
        labels[top : top + 500] = disc
    find_components(disc)  # SciPy is loaded
    tracemalloc.start()
    found = list(find_polygons(labels, PIXEL, CLASSES))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 32
    assert peak < 32e6 < labels.nbytes / 1.9  # the map alone, without what is computed from it, is 64 MB


@pytest.fixture(scope="module")
def two_hundred() -> list[list[Annotation]]:
    place = MapPlace((3.7, 3.7), (0.25, 0.25), (80_000, 60_000))
    return [_polygons(nasty_map(seed, 40), place, tolerance_um=1.5) for seed in range(200)]


def test_two_hundred_nasty_maps_import_in_qupath_where_they_belong(
    two_hundred: list[list[Annotation]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    frame = Frame("slide.mrxs", (130_000, 130_000), (0.25, 0.25), (1_000, 2_000))
    n = n_repaired = 0
    for found in two_hundred:
        report = write_geojson(tmp_path / "found.geojson", found, frame)
        assert (report.n_written, report.dropped) == (len(found), ())
        imported = import_objects((tmp_path / "found.geojson").read_bytes(), "0.7")
        shapes = np.array([each.geometry for each in found], dtype=object)
        there = shapely.transform(
            np.array([each.shape for each in imported], dtype=object), lambda xy: xy + frame.origin
        )
        assert shapely.is_valid(there).all()
        assert shapely.hausdorff_distance(shapes, there).max(initial=0) <= 0.01
        assert np.allclose(shapely.area(shapes), shapely.area(there), atol=0.05)
        n += len(found)
        n_repaired += len(report.repaired)
    assert n > 10_000
    assert n_repaired < n / 1000


# Tables


def test_classes_are_counted_and_measured_against_tissue(tmp_path: Path) -> None:
    found = [
        Annotation(shapely.box(0, 0, 2000, 1000), "Tumor"),
        Annotation(shapely.MultiPolygon([shapely.box(0, 0, 100, 100), shapely.box(200, 0, 300, 100)]), "Tumor"),
        Annotation(shapely.box(0, 0, 10, 10)),
    ]
    nameless, tumor = summarize(found, (0.5, 0.5), tissue_mm2=2.0)
    assert (nameless.name, nameless.count) == ("", 1)
    assert nameless.area_mm2 == pytest.approx(25e-6)
    assert (tumor.name, tumor.count) == ("Tumor", 3)
    assert tumor.area_mm2 == pytest.approx(0.5 + 2 * 0.0025)
    assert tumor.median_area_um2 == pytest.approx(2500)
    assert tumor.perimeter_mm == pytest.approx(3.0 + 2 * 0.2)
    assert tumor.per_mm2 == 1.5
    assert tumor.tissue_share == pytest.approx(0.2525)
    write_summary_csv(tmp_path / "classes.csv", summarize(found, (0.5, 0.5)))
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert [(row["name"], row["count"], row["per_mm2"]) for row in rows] == [("", "1", ""), ("Tumor", "3", "")]


def test_objects_are_listed_with_all_measurements_any_of_them_has(tmp_path: Path) -> None:
    found = _polygons(np.array([[1, 1, 0, 2]]))
    found.append(Annotation(shapely.box(0, 0, 2, 2), measurements={"score": 0.5}))
    write_objects_csv(tmp_path / "objects.csv", found)
    rows = list(csv.DictReader((tmp_path / "objects.csv").read_text("utf-8").splitlines()))
    assert [row["class"] for row in rows] == ["Tumor", "Stroma", ""]
    assert [row["Area µm^2"] for row in rows] == ["2", "1", ""]
    assert [(row["x"], row["y"], row["score"]) for row in rows] == [
        ("1.00", "0.50", ""),
        ("3.50", "0.50", ""),
        ("1.00", "1.00", "0.5"),
    ]
    assert [row["id"] for row in rows] == [str(each.id) for each in found]
