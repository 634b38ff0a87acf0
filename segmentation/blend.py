"""Blend: overlapping tiles' predictions into one map, row by row, in memory that does not grow with the slide.

Each pixel is the weighted mean of all predictions for it: the sum of weights times predictions over the sum of the same
weights, so that a model that answers 0.9 everywhere gives 0.9 everywhere, at any overlap and at any edge.
"""

from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segmentation.place import MapPlace
from wsi.errors import UsageError
from wsi.grid import TileGrid

__all__ = ["Blend", "WritableMap", "hann_window", "tile_corners"]

_LEAST_WEIGHT = 1e-3  # of the middle: a tile's rim counts where nothing else does


class WritableMap(Protocol):
    """(C, H, W) numbers that are written by rows: a numpy array or a Zarr array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __setitem__(self, key: tuple[slice, slice], value: Any, /) -> None: ...


def hann_window(tile_px: int) -> NDArray[np.float32]:
    """(tile_px, tile_px) weights that fall from the middle of a tile to its rim, none of them zero.

    Hann's raised cosine, under which equally spaced tiles at half overlap sum to one.
    """
    along = np.sin(np.pi * (np.arange(tile_px) + 0.5) / tile_px) ** 2
    return np.maximum(np.outer(along, along), _LEAST_WEIGHT).astype(np.float32)


def tile_corners(grid: TileGrid, place: MapPlace) -> NDArray[np.int64]:
    """(N, 2) upper left corners of a grid's tiles in whole pixels of a map."""
    return np.asarray(np.rint(place.to_map(grid.xy.astype(np.float64))), np.int64)


class Blend:
    """A map in the making. Tiles come in rows from top to bottom, as a grid has them; finished rows leave at once.

    >>> with Blend(out, hann_window(256)) as blend:
    ...     for xy, predictions in batches:
    ...         blend.add(xy, predictions)
    >>> blend.unscored
    """

    def __init__(self, out: WritableMap, window: NDArray[np.float32]) -> None:
        """Blend tiles into ``out``.

        Args:
            out: (C, H, W) floating point; what no tile covers becomes NaN. Rows are written once, in whole chunks.
            window: (h, w) weight of each pixel of a tile, all positive.
        """
        if len(out.shape) != 3:
            raise UsageError(f"a map to blend into is (channels, height, width), not {out.shape}")
        if window.ndim != 2 or not (window > 0).all() or not np.isfinite(window).all():
            raise UsageError("the weights of a tile's pixels are (h, w) positive numbers")
        self.out = out
        self.window = np.asarray(window, np.float32)
        channels, self.height, self.width = out.shape
        self._step = max(1, (getattr(out, "chunks", None) or (0, 1))[1])
        rows = window.shape[0] + self._step
        self._top = 0  # the map's row that the buffers begin with
        self._sums = np.zeros((channels, rows, self.width), np.float32)
        self._weights = np.zeros((rows, self.width), np.float32)
        self.uncovered = 0  # pixels of the rows written so far that no tile covers
        self.unscored: list[tuple[int, int]] = []  # corners of tiles with no prediction, or with part of one

    def add(self, xy: ArrayLike, predictions: NDArray[np.floating[Any]]) -> None:
        """Add tiles: (N, 2) corners in whole map pixels, and (N, C, h, w) predictions, NaN where there is none.

        Tiles may stick out of the map. Pixels that are NaN in any channel count as not scored.

        Raises:
            UsageError: a tile begins above one that went before it, or has another shape.
        """
        corners = np.asarray(xy, np.int64).reshape(-1, 2)
        expected = (len(corners), len(self._sums), *self.window.shape)
        if predictions.shape != expected:
            raise UsageError(f"predictions of {len(corners)} tiles are {expected}, not {predictions.shape}")
        for (x, y), tile in zip(corners.tolist(), predictions, strict=True):
            self._add(x, y, np.asarray(tile, np.float32))

    def _add(self, x: int, y: int, tile: NDArray[np.float32]) -> None:
        h, w = self.window.shape
        x0, x1 = max(x, 0), min(x + w, self.width)
        y0, y1 = max(y, 0), min(y + h, self.height)
        scored = np.asarray(np.isfinite(tile).all(axis=0))
        if not scored.all():
            self.unscored.append((x, y))
        if x0 >= x1 or y0 >= y1:
            return
        if y0 < self._top:
            raise UsageError(f"a tile at row {y} comes after rows up to {self._top} were finished; sort tiles by row")
        if y1 > self._top + len(self._weights):
            self._finish(y0)
        inside = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
        rows, columns = slice(y0 - self._top, y1 - self._top), slice(x0, x1)
        weights = np.where(scored[inside], self.window[inside], 0)
        self._weights[rows, columns] += weights
        self._sums[:, rows, columns] += weights * np.where(scored[inside], tile[:, *inside], 0)

    def _finish(self, before: int) -> None:
        """Write the rows above ``before``, or as many as are whole chunks."""
        stop = before if before == self.height else before // self._step * self._step
        while self._top < stop:
            n = min(stop - self._top, len(self._weights))
            weights = self._weights[:n]
            with np.errstate(invalid="ignore"):  # 0 / 0 where no tile is: NaN
                self.out[:, self._top : self._top + n] = self._sums[:, :n] / weights
            self.uncovered += int(np.count_nonzero(weights == 0))
            for buffer in (self._sums, self._weights):
                buffer[..., :-n, :] = buffer[..., n:, :].copy() if n < len(self._weights) else 0
                buffer[..., len(self._weights) - n :, :] = 0
            self._top += n

    def close(self) -> None:
        """Write the rows that are left."""
        self._finish(self.height)

    def __enter__(self) -> "Blend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
