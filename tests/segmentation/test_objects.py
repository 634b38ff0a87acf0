"""Objects: single ones from a map of areas and contours, wherever they lie and whatever lies between."""

import tracemalloc

import numpy as np
import shapely

from segmentation.instances import InstanceOptions, part_by_contour
from segmentation.objects import find_objects
from segmentation.place import MapPlace
from segmentation.polygons import PolygonOptions, find_polygons
from segmentation.segmenter import Found

PLACE = MapPlace((2.0, 2.0), (0.5, 0.5))  # a map pixel is a micron
PIXEL_EDGES = PolygonOptions(tolerance_um=0)


def map_of(classes: tuple[str, ...], *values: np.ndarray, place: MapPlace = PLACE) -> Found:
    """A map of these classes' probabilities; background is what they leave."""
    known = np.stack(values)
    probabilities = np.concatenate([1 - known.sum(0, keepdims=True), known])
    return Found(probabilities, place, dict(enumerate(classes, start=1)))


def blobs(seed: int, shape: tuple[int, int] = (120, 160)) -> tuple[np.ndarray, np.ndarray]:
    """Interior and contour of discs here and there that touch, with holes; no two pixels alike, so that none is a draw."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    interior, contour = np.zeros(shape), np.zeros(shape)
    for cy, cx, radius in zip(
        rng.integers(0, shape[0], 25), rng.integers(0, shape[1], 25), rng.integers(4, 16, 25), strict=True
    ):
        away = np.hypot(y - cy, x - cx)
        interior[away < radius] = 0.8
        contour[away < radius] = 0.1
        rim = (away < radius) & (away > radius - 3)
        interior[rim], contour[rim] = 0.2, 0.7
        interior[away < radius / 5] = 0
    return interior * rng.uniform(0.98, 1, shape), contour


def test_parting_area_by_area_gives_the_objects_that_parting_the_whole_map_gives() -> None:
    options = InstanceOptions(min_area_um2=30, min_hole_um2=20)
    for seed in range(6):
        interior, contour = blobs(seed)
        made = map_of(("gland", "contour"), interior, contour)
        values = np.asarray(made.probabilities, np.float64)
        together = part_by_contour(values[1], values[2], PLACE, options)
        names = dict.fromkeys(range(1, together.max() + 1), "gland")
        expected = {a.geometry.normalize().wkt for a in find_polygons(together, PLACE, names, PIXEL_EDGES)}
        found = list(find_objects(made, options, PIXEL_EDGES))
        assert len(found) > 5
        assert {a.geometry.normalize().wkt for a in found} == expected
        assert {a.class_name for a in found} == {"gland"}


def test_without_contours_areas_are_parted_where_they_are_narrow() -> None:
    y, x = np.mgrid[:60, :90]
    discs = [np.hypot(y - cy, x - cx) < 12 for cy, cx in ((20, 20), (22, 40), (40, 70))]
    found = list(find_objects(map_of(("gland",), np.any(discs, axis=0) * 0.9), polygons=PIXEL_EDGES))
    centres = sorted((round(a.geometry.centroid.x / 2), round(a.geometry.centroid.y / 2)) for a in found)
    np.testing.assert_allclose(centres, [(20, 20), (40, 22), (70, 40)], atol=1)


def test_an_object_is_of_the_class_that_has_most_of_it_and_its_probability_is_that_of_all() -> None:
    benign, malignant, contour = (np.zeros((30, 60)) for _ in range(3))
    benign[5:25, 5:25] = 0.6
    benign[5:10, 5:25] = 0.1
    malignant[5:10, 5:25] = 0.8
    malignant[5:25, 27:50] = 0.7
    contour[5:25, 25:27] = 0.9
    made = map_of(("benign", "malignant", "contour"), benign, malignant, contour)
    left, right = sorted(find_objects(made, polygons=PIXEL_EDGES), key=lambda a: a.geometry.bounds[0])
    assert (left.class_name, right.class_name) == ("benign", "malignant")
    assert shapely.union(left.geometry, right.geometry).area == 45 * 20 * 4
    assert abs(right.geometry.area - 23 * 20 * 4) <= 2 * 20 * 4
    mean = next(value for key, value in left.measurements.items() if "robab" in key)
    assert 0.6 < mean < 0.8


def test_objects_lie_where_the_map_says_they_lie_and_the_unscored_holds_none() -> None:
    interior = np.full((40, 40), np.nan)
    interior[10:20, 12:30] = 0.9
    made = map_of(("gland",), interior, place=MapPlace((4.0, 3.0), (0.5, 0.5), (100.0, 50.0)))
    (one,) = find_objects(made, polygons=PIXEL_EDGES)
    assert one.geometry.equals(shapely.box(100 + 48, 50 + 30, 100 + 120, 50 + 60))


def test_memory_grows_with_the_largest_area_and_not_with_the_map() -> None:
    class Glands:
        """(2, H, 2048) of glands here and there, made when asked for."""

        chunks = (2, 64, 256)

        def __init__(self, height: int) -> None:
            self.shape = (2, height, 2048)

        def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
            whole = (slice(None),) * 3
            classes, rows, columns = (*key, *whole[len(key) :])
            y, x = np.arange(self.shape[1])[rows], np.arange(self.shape[2])[columns]
            inside = ((y % 512 < 40)[:, None] & (x % 512 < 40)).astype(np.float16)
            return np.stack([1 - inside, inside])[classes]

    def peak(height: int) -> int:
        made = Found(Glands(height), PLACE, {1: "gland"})
        tracemalloc.start()
        found = sum(1 for _ in find_objects(made))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == height // 512 * 4
        return most

    peak(512)
    assert peak(8192) < 1.3 * peak(2048)
