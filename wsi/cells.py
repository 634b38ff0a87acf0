"""Cells: the pieces in which a level's pixels are decoded, each once, for all the tiles that touch it. No I/O."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi.grid import TileGrid

__all__ = ["Cells", "plan_cells"]

_MOST_CELLS_ACROSS = 4  # of a tile, where the cells are ours to choose: smaller ones cost more calls than they save


@dataclass(frozen=True)
class Cells:
    """How the tiles of one grid are put together from cells.

    Attributes:
        size: (width, height) of a cell in pixels of the grid's level.
        tile: (width, height) of a tile in the same.
        corners: (N, 2) int64, the tiles' top-left corners in the same.
        factor: whole pixels of the level per tile pixel in x and y, where each cell can be reduced on its own;
            None where a tile has to be put together first and reduced then.
        shared: whether cells lie on a lattice anchored at (0, 0) that all tiles share; else each tile is its own cell.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    corners: NDArray[np.int64]
    factor: tuple[int, int] | None
    shared: bool

    def under(self, index: int) -> Iterator[tuple[int, int]]:
        """Corners, in pixels of the level, of the cells that a tile touches."""
        x, y = (int(value) for value in self.corners[index])
        if not self.shared:
            yield x, y
            return
        w, h = self.size
        for top in range(y // h * h, y + self.tile[1], h):
            for left in range(x // w * w, x + self.tile[0], w):
                yield left, top

    def uses(self, first: int) -> NDArray[np.int32]:
        """(rows, columns) for each cell of the lattice, how many tiles from ``first`` on touch it."""
        size = np.array(self.size)
        low = self.corners[first:] // size
        high = (self.corners[first:] + np.array(self.tile) - 1) // size + 1
        columns, rows = (int(value) for value in high.max(axis=0, initial=0))
        steps = np.zeros((rows + 1, columns + 1), np.int32)  # summed up along both axes they are the counts
        for x, y, sign in ((low, low, 1), (high, low, -1), (low, high, -1), (high, high, 1)):
            np.add.at(steps, (y[:, 1], x[:, 0]), sign)
        return steps.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)[:rows, :columns]


def plan_cells(grid: TileGrid, stored: tuple[int, int] | None) -> Cells:
    """Cells for a grid's tiles.

    Args:
        stored: (width, height) of the tiles that the file itself has on the grid's level, which are the cells then;
            None where pixels come in boxes of any place and size.
    """
    step = np.array(grid.downsample)
    corners = grid.xy // step
    tile = (grid.side[0] // grid.downsample[0], grid.side[1] // grid.downsample[1])
    if stored is None:
        steps = np.gcd.reduce(corners, axis=0) if len(corners) else np.zeros(2, np.int64)
        common = (math.gcd(tile[0], int(steps[0])), math.gcd(tile[1], int(steps[1])))
        shared = all(c * _MOST_CELLS_ACROSS >= t for c, t in zip(common, tile, strict=True))
        size = common if shared else tile
    else:
        size, shared = stored, True
    return Cells(size, tile, corners, _whole_factor(grid.tile_px, tile, size, corners), shared)


def _whole_factor(
    tile_px: int, tile: tuple[int, int], cell: tuple[int, int], corners: NDArray[np.int64]
) -> tuple[int, int] | None:
    """The reduction, if the pixels it averages never lie in two cells."""
    factor = (tile[0] // tile_px, tile[1] // tile_px)
    if min(factor) < 1 or (factor[0] * tile_px, factor[1] * tile_px) != tile:
        return None
    aligned = not (corners % np.array(factor)).any() and cell[0] % factor[0] == cell[1] % factor[1] == 0
    return factor if aligned else None
