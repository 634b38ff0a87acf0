"""MapPlace: where the pixels of a label map or a probability map lie on a slide. No I/O."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi.geojson import Frame

__all__ = ["MapPlace"]


@dataclass(frozen=True)
class MapPlace:
    """Where a map of (H, W) pixels lies on a slide, and how large its pixels are.

    Attributes:
        scale: level-0 pixels per map pixel in x and y; need not be whole.
        mpp: microns per level-0 pixel in x and y.
        origin: level-0 pixel (x, y) of the map's upper left corner, in the slide's full frame.
    """

    scale: tuple[float, float]
    mpp: tuple[float, float]
    origin: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("scale", "mpp", "origin"):
            x, y = (float(value) for value in getattr(self, name))
            if not (math.isfinite(x) and math.isfinite(y)) or (name != "origin" and min(x, y) <= 0):
                raise ValueError(
                    f"{name} is two finite{'' if name == 'origin' else ', positive'} numbers, not {(x, y)}"
                )
            object.__setattr__(self, name, (x, y))

    @classmethod
    def covering(cls, frame: Frame, shape: tuple[int, ...]) -> "MapPlace":
        """The place of a map whose (H, W) pixels cover the whole slide."""
        return cls((frame.size[0] / shape[1], frame.size[1] / shape[0]), frame.mpp)

    @property
    def pixel_um(self) -> tuple[float, float]:
        """Microns per map pixel in x and y."""
        return self.scale[0] * self.mpp[0], self.scale[1] * self.mpp[1]

    @property
    def pixel_um2(self) -> float:
        """Square microns that a map pixel covers."""
        return self.pixel_um[0] * self.pixel_um[1]

    def to_level0(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 2) corners of map pixels as level-0 pixels."""
        return xy * self.scale + self.origin

    def to_map(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 2) level-0 pixels in the map's pixels, corners being whole numbers."""
        return (xy - self.origin) / self.scale
