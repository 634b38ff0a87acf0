"""Pyramid: the sizes of a slide's levels, its microns per pixel, and which level serves a wanted resolution. No I/O."""

from dataclasses import dataclass

from wsi.errors import TooCoarseError

__all__ = ["WHOLE_FACTOR_TOLERANCE", "Pyramid", "Scale"]

# Scanners state 0.2523 or 0.2456 where "40x" is meant. Within two per cent of a whole reduction factor the whole one is
# used: the reduction is then an exact mean of whole pixels, and the true mpp, not the wanted one, is what is stated.
WHOLE_FACTOR_TOLERANCE = 0.02


@dataclass(frozen=True)
class Scale:
    """How level-0 pixels become tile pixels.

    ``factor`` is level-0 pixels per tile pixel in x and y; below 1 means upsampling. ``mpp`` is what results from it.
    """

    factor: tuple[float, float]
    mpp: tuple[float, float]


@dataclass(frozen=True)
class Pyramid:
    """Level sizes (width, height), sharpest first, and the microns per pixel of level 0 in x and y.

    ``native`` says for each level whether its own pixels can be addressed at any offset; a reader that interpolates a
    level says False for it, and such a level serves overviews only. Level 0 is always native.
    """

    sizes: tuple[tuple[int, int], ...]
    mpp: tuple[float, float]
    native: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("a pyramid has at least one level")
        if any(w < 1 or h < 1 for w, h in self.sizes):
            raise ValueError(f"level sizes must be positive, got {self.sizes}")
        if any(low[0] > high[0] or low[1] > high[1] for high, low in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError(f"levels must go from sharp to coarse, got {self.sizes}")
        if not all(0 < value < float("inf") for value in self.mpp):
            raise ValueError(f"mpp must be positive and finite, got {self.mpp}")
        if not self.native:
            object.__setattr__(self, "native", (True,) * len(self.sizes))
        if len(self.native) != len(self.sizes) or not self.native[0]:
            raise ValueError(f"native needs one flag a level and level 0 native, got {self.native}")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0."""
        return self.sizes[0]

    def downsample(self, level: int) -> tuple[float, float]:
        """Level-0 pixels per pixel of ``level``, in x and y.

        Writers halve odd sizes by rounding, so the ratio of sizes (2.0005) is not the factor that was used (2). Where
        one whole factor explains both sizes that factor is returned, else the ratio itself; never a truncated one.
        """
        (width, height), (w, h) = self.sizes[0], self.sizes[level]
        return _axis_factor(width, w), _axis_factor(height, h)

    def level_for(self, factor: tuple[float, float], *, spare: float = 1.0) -> int:
        """The coarsest level that still has ``spare`` times the pixels that a reduction by ``factor`` needs.

        Falls back to level 0. With ``spare`` 1 this is the cheapest level for an overview.
        """
        best = 0
        for level in range(1, len(self.sizes)):
            dx, dy = self.downsample(level)
            if dx * spare <= factor[0] * (1 + 1e-6) and dy * spare <= factor[1] * (1 + 1e-6):
                best = level
        return best

    def scale_to(self, mpp: float, *, tolerance: float = 0.25, allow_upsample: bool = False) -> Scale:
        """The scale that brings this slide to ``mpp``, or as near as honest pixels go.

        A slide at most ``tolerance`` coarser than asked (0.5036 for 0.5, or a 20x scanner's 0.62) is used at its own
        resolution. One that is coarser still is refused, unless ``allow_upsample``.

        Raises:
            TooCoarseError: the scan is too coarse for ``mpp``.
        """
        if not 0 < mpp < float("inf"):
            raise ValueError(f"mpp must be positive and finite, got {mpp}")
        factor = (self._factor(mpp, 0, tolerance, allow_upsample), self._factor(mpp, 1, tolerance, allow_upsample))
        return Scale(factor, (self.mpp[0] * factor[0], self.mpp[1] * factor[1]))

    def _factor(self, mpp: float, axis: int, tolerance: float, allow_upsample: bool) -> float:
        wanted = mpp / self.mpp[axis]
        whole = max(1, round(wanted))
        if abs(wanted / whole - 1) <= WHOLE_FACTOR_TOLERANCE:
            return float(whole)
        if wanted > 1:
            return wanted
        if 1 / wanted - 1 <= tolerance:
            return 1.0
        if allow_upsample:
            return wanted
        raise TooCoarseError(
            f"the slide was scanned at {self.mpp[axis]:.4g} mpp, coarser than the {mpp:.4g} asked for",
            f"ask --mpp {self.mpp[axis]:.4g} or more, widen --mpp-tolerance, or accept invented detail with "
            f"--allow-upsample",
        )


def _axis_factor(full: int, reduced: int) -> float:
    whole = round(full / reduced)
    if whole >= 1 and reduced in (full // whole, -(-full // whole)):
        return float(whole)
    return full / reduced
