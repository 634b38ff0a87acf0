"""Objects: the areas of a probability map, such as a dense network's, parted into single objects, as polygons.

Areas that do not touch know nothing of each other: each is parted by itself, so that memory grows with the largest of them
and not with the slide.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from segmentation.dense import CONTOUR
from segmentation.instances import InstanceOptions, part_by_contour, part_by_distance
from segmentation.place import MapPlace
from segmentation.polygons import PolygonOptions, find_polygons
from segmentation.raster import Raster
from wsi.annotation import Annotation

__all__ = ["ClassMap", "find_objects"]

_AREA = "area"


class ClassMap(Protocol):
    """Probabilities of classes, such as ``Found`` of a segmenter or a ``Refinement``.

    Attributes:
        probabilities: (1 + C, H, W) array that is sliced, background the first; NaN = not scored.
        place: where the map lies on the slide.
        classes: the name of each label.
    """

    @property
    def probabilities(self) -> Any: ...
    @property
    def place(self) -> MapPlace: ...
    @property
    def classes(self) -> Mapping[int, str]: ...


def find_objects(
    found: ClassMap, options: InstanceOptions | None = None, polygons: PolygonOptions | None = None
) -> Iterator[Annotation]:
    """The objects of a map, area by area; each measures the mean probability of its pixels not to be background.

    Areas are what is more probably anything else than background, by ``options.threshold``. They are parted by their
    contours where the network tells these (``DenseConfig.contour_um``), otherwise where they are narrow; see
    ``segmentation.instances``. An object is of the class that has the most probability in it.
    """
    options = options or InstanceOptions()
    exact = PolygonOptions(tolerance_um=0, min_area_um2=options.min_area_um2, min_hole_um2=options.min_hole_um2)
    areas = find_polygons(_Foreground(found.probabilities, options.threshold), found.place, {1: _AREA}, exact)
    for area in areas:
        yield from _objects_in(area, found, options, polygons)


class _Foreground:
    """(H, W) 1 where something else than background is likely enough, made when rows are asked for."""

    def __init__(self, probabilities: Any, threshold: float) -> None:
        self._probabilities = probabilities
        self._threshold = threshold
        self.shape: tuple[int, ...] = probabilities.shape[1:]
        self.chunks: tuple[int, ...] = (getattr(probabilities, "chunks", None) or (0, 1, 1))[1:]

    def __getitem__(self, rows: slice) -> NDArray[np.uint8]:
        return np.asarray(_likely(self._probabilities[1:, rows]).sum(0) > self._threshold, np.uint8)


def _objects_in(
    area: Annotation, found: ClassMap, options: InstanceOptions, polygons: PolygonOptions | None
) -> Iterator[Annotation]:
    x0, y0, x1, y1 = area.geometry.bounds
    corners = np.rint(found.place.to_map(np.array([[x0, y0], [x1, y1]]))).astype(np.int64)  # of pixels: whole numbers
    (left, top), (right, bottom) = corners.tolist()
    x, y = found.place.to_level0(corners[:1].astype(np.float64))[0].tolist()
    place = MapPlace(found.place.scale, found.place.mpp, (x, y))
    shape = (bottom - top, right - left)
    inside = Raster([area], place, shape, {_AREA: 1})[:] == 1
    likely = _likely(found.probabilities[1:, top:bottom, left:right]) * inside  # (C, h, w)
    contours = [label for label, name in found.classes.items() if name == CONTOUR]
    classes = [label for label in found.classes if label not in contours]
    kinds = likely[[label - 1 for label in classes]]
    objects = (
        part_by_contour(kinds.sum(0), likely[contours[0] - 1], place, options)
        if contours
        else part_by_distance(kinds.sum(0), place, options)
    )
    names = _names(objects, kinds, [found.classes[label] for label in classes])
    yield from find_polygons(objects, place, names, polygons, probabilities=likely.sum(0))


def _names(objects: NDArray[np.int32], kinds: NDArray[np.float64], names: list[str]) -> Mapping[int, str]:
    sums = np.stack([np.bincount(objects.ravel(), kind.ravel()) for kind in kinds])  # (C, 1 + objects)
    return {number: names[int(best)] for number, best in enumerate(sums.argmax(0)) if number}


def _likely(values: Any) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(values, np.float64), nan=0.0)
