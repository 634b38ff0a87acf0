"""Prior: probabilities of classes over a slide, and what they are on another map. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from segmentation.place import MapPlace
from wsi.errors import UsageError
from wsi.heatmap import Heatmap

__all__ = ["Prior", "ScoredClasses"]


class ScoredClasses(Protocol):
    """What knows the probabilities of classes by their names, such as the heat map of a patch classifier."""

    @property
    def place(self) -> MapPlace: ...

    def probability(self, name: str, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True, eq=False)
class Prior:
    """What a first stage says of C classes: their probabilities on a map that may be coarse.

    Attributes:
        values: (C, H, W) float32, NaN = not scored.
        place: where the map lies on the slide.
    """

    values: NDArray[np.float32]
    place: MapPlace

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float32)
        if values.ndim != 3 or not values.size:
            raise ValueError(f"a prior is (C, H, W), got {values.shape}")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    @classmethod
    def of_classes(cls, scored: ScoredClasses, classes: Sequence[str]) -> "Prior":
        """The channels of these classes, in this order.

        Raises:
            UsageError: a class is not among those that were scored.
        """
        return cls(np.stack([scored.probability(name) for name in classes]), scored.place)

    @classmethod
    def of_heatmaps(cls, heatmaps: Sequence[Heatmap]) -> "Prior":
        """The heatmaps of some classes on one grid, a pixel for each step of the grid.

        Raises:
            UsageError: there is none, or the grids differ.
        """
        if not heatmaps or any(heat.grid != heatmaps[0].grid for heat in heatmaps):
            raise UsageError("a prior is made of heatmaps on one grid, and of one at least")
        first = heatmaps[0]
        values = np.stack([heat.raster(min(first.grid.stride)) for heat in heatmaps])
        return cls(values, MapPlace.covering(first.frame, values.shape[1:]))

    def on(self, place: MapPlace, shape: tuple[int, int]) -> NDArray[np.float32]:
        """(C, *shape) the probabilities on another map: interpolated, or means where its pixels are larger.

        What was not scored, and what lies off this map, is 0, as H2G-Net has it.
        """
        values = np.nan_to_num(self.values, nan=0.0)
        theirs, ours = np.array(place.scale), np.array(self.place.scale)
        height, width = values.shape[1:]
        smaller = np.maximum(1, np.rint(np.array((width, height)) / np.maximum(1, theirs / ours))).astype(int)
        reduced = np.array((width, height)) / smaller
        scale = ours * reduced  # level-0 pixels per pixel of the reduced map
        # From the centre of a pixel of theirs to the place in ours, where centres are whole numbers.
        step = theirs / scale
        first = (np.array(place.origin) - self.place.origin) / scale + 0.5 * step - 0.5
        x = (np.arange(shape[1]) * step[0] + first[0]).astype(np.float32)
        y = (np.arange(shape[0]) * step[1] + first[1]).astype(np.float32)
        off = ((y < -0.5) | (y > smaller[1] - 0.5))[:, None] | ((x < -0.5) | (x > smaller[0] - 0.5))[None, :]
        xs, ys = np.meshgrid(x, y)
        found = np.empty((len(values), *shape), np.float32)
        for channel, value in enumerate(values):
            small = cv2.resize(value, tuple(smaller.tolist()), interpolation=cv2.INTER_AREA)
            found[channel] = cv2.remap(small, xs, ys, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        found[:, off] = 0
        return found
