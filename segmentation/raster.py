"""Raster: annotations as a label map that is drawn when its rows are asked for."""

from collections.abc import Mapping, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

from segmentation.place import MapPlace
from wsi.annotation import Annotation

__all__ = ["Raster"]


class Raster:
    """(H, W) labels of annotations, drawn a strip of rows at a time.

    A pixel belongs to a class when its centre lies in an area of that class; where classes overlap, the later one in
    ``labels`` is on top. Overlapping areas of one class are one area. Points and lines have no area.
    """

    chunks = None

    def __init__(
        self, annotations: Sequence[Annotation], place: MapPlace, shape: tuple[int, int], labels: Mapping[str, int]
    ) -> None:
        """Prepare to draw.

        Args:
            place: where the map lies on the slide.
            shape: (H, W) of the map.
            labels: the number of each class that is drawn; others are left out.
        """
        self.shape: tuple[int, ...] = shape
        self._dtype = np.uint8 if max(labels.values(), default=0) < 256 else np.int32
        self._edges = [
            (label, _edges([a.geometry for a in annotations if a.class_name == name], place, shape))
            for name, label in labels.items()
        ]

    def __getitem__(self, rows: slice) -> NDArray[np.integer]:
        top, bottom, _ = rows.indices(self.shape[0])
        drawn = np.zeros((max(0, bottom - top), self.shape[1]), self._dtype)
        for label, edges in self._edges:
            touched = edges[(edges[:, 1] < bottom) & (edges[:, 3] > top)]
            if len(touched):
                drawn[_filled(touched, top, drawn.shape)] = label
        return drawn


def _edges(shapes: list[shapely.Geometry], place: MapPlace, shape: tuple[int, int]) -> NDArray[np.float64]:
    """(E, 5) edges x0, y0, x1, y1 in map pixels, y0 < y1, and +1 or -1: whether the area begins or ends to the right."""
    parts = shapely.get_parts(np.array(shapes, dtype=object))
    areas = shapely.orient_polygons(parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON])
    rings = shapely.get_rings(areas)
    xy, owner = shapely.get_coordinates(rings, return_index=True)
    xy = place.to_map(xy)
    inner = owner[1:] == owner[:-1]
    start, end = xy[:-1][inner], xy[1:][inner]
    sign = np.where(start[:, 1] > end[:, 1], 1.0, -1.0)
    upward = sign > 0
    low, high = np.where(upward[:, None], end, start), np.where(upward[:, None], start, end)
    seen = (low[:, 1] < shape[0]) & (high[:, 1] > 0) & (low[:, 1] != high[:, 1])
    return np.asarray(np.column_stack([low, high, sign])[seen])


def _filled(edges: NDArray[np.float64], top: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """(rows, W) which pixels' centres lie within, counted along each row from the left: how many areas are open there."""
    height, width = shape
    x0, y0, x1, y1, sign = edges.T
    first = np.clip(np.ceil(y0 - 0.5).astype(np.int64), top, top + height)
    stop = np.clip(np.ceil(y1 - 0.5).astype(np.int64), top, top + height)
    spans = stop - first
    edge = np.repeat(np.arange(len(edges)), spans)
    row = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans) + first[edge]
    x = x0[edge] + (row + 0.5 - y0[edge]) * ((x1 - x0) / (y1 - y0))[edge]
    column = np.clip(np.ceil(x - 0.5).astype(np.int64), 0, width)
    steps = np.zeros((height, width + 1), np.int32)
    np.add.at(steps, (row - top, column), sign[edge].astype(np.int32))
    return np.asarray(np.cumsum(steps, axis=1)[:, :width] != 0)
