"""Instances: areas that touch, such as glands, parted into single objects by watershed.

Markers are the hills of the distance to the background, or what is left of the areas without their predicted contours, as
Cerberus has it (Graham et al.: One model is all you need, Medical Image Analysis 83, 2023). Differs from Cerberus: objects
grow back over the contour by watershed and not by a dilation, and an area without any marker is one object, not none.
The maps are held in memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.place import MapPlace
from wsi.errors import UsageError

__all__ = ["InstanceOptions", "part_by_contour", "part_by_distance"]

_LEAST_DEPTH_UM = 1e-6


@dataclass(frozen=True)
class InstanceOptions:
    """How areas are parted.

    Attributes:
        threshold: probability above which a pixel belongs to an object.
        contour_threshold: by how much the interior must be likelier than the contour, for a marker.
        depth_um: how much narrower a neck is than both sides of it, as distances to the background, where an area is
            parted; greater values part less.
        min_area_um2: smaller objects and markers are left out.
        min_hole_um2: smaller holes are filled.
    """

    threshold: float = 0.5
    contour_threshold: float = 0.0
    depth_um: float = 3.0
    min_area_um2: float = 0.0
    min_hole_um2: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or not -1 < self.contour_threshold < 1:
            raise ValueError(
                f"thresholds are between 0 and 1 (-1 and 1), got {self.threshold} and {self.contour_threshold}"
            )
        for name in ("depth_um", "min_area_um2", "min_hole_um2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)}")


def part_by_distance(
    probability: NDArray[np.floating[Any]], place: MapPlace, options: InstanceOptions | None = None
) -> NDArray[np.int32]:
    """(H, W) objects 1, 2, …, 0 background, from the probability (H, W) of their class; NaN is background."""
    from scipy import ndimage
    from skimage.morphology import local_maxima, reconstruction

    options = options or InstanceOptions()
    mask = _tidy(_filled(probability) > options.threshold, place, options)
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    inside = np.pad(mask, 1)  # beyond the map is background
    distance = ndimage.distance_transform_edt(inside, sampling=place.pixel_um[::-1])
    depth = max(options.depth_um, _LEAST_DEPTH_UM)
    below_all = -depth - 1  # background, which no hill spreads over
    hills = np.where(inside, distance, below_all)
    levelled = reconstruction(np.where(inside, distance - depth, below_all), hills)  # hills cut off by their depth
    markers, _ = ndimage.label((local_maxima(levelled) & inside)[1:-1, 1:-1], np.ones((3, 3)))
    return _grown(-distance[1:-1, 1:-1], markers, mask)


def part_by_contour(
    interior: NDArray[np.floating[Any]],
    contour: NDArray[np.floating[Any]],
    place: MapPlace,
    options: InstanceOptions | None = None,
) -> NDArray[np.int32]:
    """(H, W) objects 1, 2, …, 0 background, from the probabilities (H, W) of interiors and of contours.

    Raises:
        UsageError: the two have different shapes.
    """
    from scipy import ndimage

    if interior.shape != contour.shape:
        raise UsageError(f"interiors and contours are on one map; these are {interior.shape} and {contour.shape}")
    options = options or InstanceOptions()
    inside, edge = _filled(interior), _filled(contour)
    mask = _tidy(inside + edge > options.threshold, place, options)
    cores = mask & (inside - edge > options.contour_threshold)
    markers, found = ndimage.label(_without_small(cores, options.min_area_um2 / place.pixel_um2))
    areas, n_areas = ndimage.label(mask)
    marked = np.zeros(n_areas + 1, np.bool_)
    marked[areas[markers > 0]] = True
    markers = np.where(marked[areas], markers, np.where(mask, areas + found, 0))
    return _grown(edge - inside, markers, mask)


def _filled(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(values, np.float64), nan=0.0)


def _tidy(mask: NDArray[np.bool_], place: MapPlace, options: InstanceOptions) -> NDArray[np.bool_]:
    """Without small pieces, small holes filled; a hole is background that is not open to the map's edge."""
    from scipy import ndimage

    holes = ndimage.binary_fill_holes(mask) & ~mask
    mask = mask | (holes & ~_without_small(holes, options.min_hole_um2 / place.pixel_um2))
    return _without_small(mask, options.min_area_um2 / place.pixel_um2)


def _without_small(mask: NDArray[np.bool_], min_px: float) -> NDArray[np.bool_]:
    from scipy import ndimage

    pieces, _ = ndimage.label(mask)
    large = np.bincount(pieces.ravel()) >= min_px
    large[0] = False
    return np.asarray(large[pieces])


def _grown(
    height: NDArray[np.floating[Any]], markers: NDArray[np.integer[Any]], mask: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Objects numbered without gaps, by the rows of the map."""
    from skimage.segmentation import watershed

    objects = np.asarray(watershed(height, markers, mask=mask), np.int32)
    numbers, first = np.unique(objects, return_index=True)
    order = np.argsort(first[numbers > 0])
    table = np.zeros(int(objects.max(initial=0)) + 1, np.int32)
    table[numbers[numbers > 0][order]] = np.arange(1, len(order) + 1)
    return np.asarray(table[objects], np.int32)
