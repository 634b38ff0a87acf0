"""Box, TileGrid: where tiles lie on a slide. No I/O."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from wsi.pyramid import WHOLE_FACTOR_TOLERANCE, Pyramid

__all__ = ["Box", "TileGrid", "Tiling", "cover", "tissue_fractions"]

_NOTHING = 1e-9  # of a tile: what is less may be the rounding of sums that cancel
_EDGES_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Box:
    """A rectangle in whole pixels: top-left corner ``x, y``, width and height. Level 0 unless said otherwise."""

    x: int
    y: int
    w: int
    h: int

    def __post_init__(self) -> None:
        if self.w < 1 or self.h < 1:
            raise ValueError(f"a box has at least one pixel, got {self.w} x {self.h}")


@dataclass(frozen=True)
class Tiling:
    """How a slide is cut into tiles: what the user asks for. Saved with every store.

    Attributes:
        mpp: wanted microns per pixel of a tile.
        tile_px: width and height of a tile in pixels at that resolution.
        overlap_px: pixels that neighbouring tiles share, at that resolution.
        min_tissue: a tile is kept when at least this fraction of it is tissue.
        edge: ``"drop"`` leaves out tiles that stick out of the slide; ``"pad"`` keeps them, the outside in background colour.
        holes: ``"drop"`` does not count holes of the outlines as tissue; ``"keep"`` does.
        mpp_tolerance: a scan coarser than asked by at most this fraction is used at its own resolution.
        allow_upsample: accept scans that are coarser still, by interpolation.
        spare: pixels of a level per tile pixel, in each direction, that it must have for tiles to be read from it. With 2
            a tile's pixel is the mean of four or more; with 1 tiles are read as they stand where a level has their
            resolution, with its own compression and whatever made it coarser, in a fraction of the time.
    """

    mpp: float = 0.5
    tile_px: int = 256
    overlap_px: int = 0
    min_tissue: float = 0.25
    edge: Literal["drop", "pad"] = "drop"
    holes: Literal["drop", "keep"] = "drop"
    mpp_tolerance: float = 0.25
    allow_upsample: bool = False
    spare: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.mpp < float("inf"):
            raise ValueError(f"mpp must be positive, got {self.mpp}")
        if self.tile_px < 1:
            raise ValueError(f"tile_px must be at least 1, got {self.tile_px}")
        if not 0 <= self.overlap_px < self.tile_px:
            raise ValueError(f"overlap_px must be from 0 to {self.tile_px - 1}, got {self.overlap_px}")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"min_tissue must be from 0 to 1, got {self.min_tissue}")
        if self.edge not in ("drop", "pad") or self.holes not in ("drop", "keep"):
            raise ValueError(f"edge is drop or pad, holes is drop or keep; got {self.edge}, {self.holes}")
        if not 0 <= self.mpp_tolerance < float("inf"):
            raise ValueError(f"mpp_tolerance must be a number from 0, got {self.mpp_tolerance}")
        if not 1 <= self.spare < float("inf"):
            raise ValueError(f"spare must be a number from 1, got {self.spare}")


@dataclass(frozen=True, eq=False)
class TileGrid:
    """Tiles of one slide on one lattice anchored at level-0 pixel (0, 0), in rows from top to bottom.

    Attributes:
        xy: (N, 2) int64, top-left corners in level-0 pixels; row i is tile i everywhere in a store.
        tile_px: width and height of a tile's pixels as an encoder gets them.
        side: width and height of a tile in whole level-0 pixels.
        stride: step from one tile to the next in whole level-0 pixels, x and y.
        mpp: true microns per pixel of a tile in x and y, after rounding ``side``.
        level: the pyramid level that tiles are read from; ``side`` and ``xy`` are whole pixels of it.
        downsample: level-0 pixels per pixel of that level, x and y.
        tissue: (N,) float32, the fraction of each tile that is tissue.
    """

    xy: NDArray[np.int64]
    tile_px: int
    side: tuple[int, int]
    stride: tuple[int, int]
    mpp: tuple[float, float]
    level: int = 0
    downsample: tuple[int, int] = (1, 1)
    tissue: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    def __post_init__(self) -> None:
        xy = np.ascontiguousarray(self.xy, dtype=np.int64).reshape(-1, 2)
        tissue = np.ascontiguousarray(self.tissue, dtype=np.float32)
        if tissue.size == 0:
            tissue = np.ones(len(xy), np.float32)
        if tissue.shape != (len(xy),):
            raise ValueError(f"{len(xy)} tiles need as many tissue fractions, got {tissue.shape}")
        if min(self.side) < 1 or min(self.stride) < 1:
            raise ValueError(f"side and stride are at least one pixel, got {self.side} and {self.stride}")
        steps = np.array([self.downsample, self.downsample])
        if np.any(np.array([self.side, self.stride]) % steps) or np.any(xy % np.array(self.downsample)):
            raise ValueError(
                f"side, stride and xy must be whole pixels of level {self.level} (every {self.downsample})"
            )
        for array in (xy, tissue):
            array.setflags(write=False)
        object.__setattr__(self, "xy", xy)
        object.__setattr__(self, "tissue", tissue)

    def __len__(self) -> int:
        return len(self.xy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TileGrid) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change with anything that decides which pixels a tile holds."""
        facts = (self.tile_px, self.side, self.stride, self.level, self.downsample)
        return hashlib.sha256(repr(facts).encode() + self.xy.astype("<i8").tobytes()).hexdigest()[:32]

    def keep(self, region: shapely.Geometry, min_fraction: float) -> "TileGrid":
        """The tiles of which at least ``min_fraction`` (and anything at all) lies in ``region``, with that fraction."""
        fractions = tissue_fractions(self, region)
        kept = (fractions > 0) & (fractions >= min_fraction - 1e-6)
        return replace(self, xy=self.xy[kept], tissue=fractions[kept])

    def take(self, rows: NDArray[np.int64]) -> "TileGrid":
        """The tiles of these rows, in the order of ``rows``."""
        return replace(self, xy=self.xy[rows], tissue=self.tissue[rows])


def cover(pyramid: Pyramid, tiling: Tiling) -> TileGrid:
    """Every tile of the lattice that ``tiling`` puts on a slide, tissue or not.

    Tiles are read from the coarsest level that keeps ``tiling.spare`` pixels per tile pixel in each direction and whose
    pixels the lattice can be aligned to without moving the mpp by more than two per cent; else from level 0. So what an
    encoder sees is always an area mean of whole native pixels.

    Raises:
        TooCoarseError: the scan is too coarse for the wanted mpp.
    """
    scale = pyramid.scale_to(tiling.mpp, tolerance=tiling.mpp_tolerance, allow_upsample=tiling.allow_upsample)
    exact = (tiling.tile_px * scale.factor[0], tiling.tile_px * scale.factor[1])
    level, step = _read_level(pyramid, scale.factor, exact, tiling.spare)
    side = (_round_to(exact[0], step[0]), _round_to(exact[1], step[1]))
    share = (tiling.tile_px - tiling.overlap_px) / tiling.tile_px
    stride = (_round_to(side[0] * share, step[0]), _round_to(side[1] * share, step[1]))
    width, height = pyramid.size
    xs = _starts(width, side[0], stride[0], tiling.edge)
    ys = _starts(height, side[1], stride[1], tiling.edge)
    return TileGrid(
        xy=np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2),
        tile_px=tiling.tile_px,
        side=side,
        stride=stride,
        mpp=(pyramid.mpp[0] * side[0] / tiling.tile_px, pyramid.mpp[1] * side[1] / tiling.tile_px),
        level=level,
        downsample=step,
    )


def tissue_fractions(grid: TileGrid, region: shapely.Geometry) -> NDArray[np.float32]:
    """(N,) the exact fraction of each tile's area that lies in ``region``, a valid geometry; a billionth is nothing.

    The cost grows with the corners of the outline and the tiles it crosses, not with tiles times corners.
    """
    edges = _directed_edges(region)
    if len(grid) == 0 or len(edges) == 0:
        return np.zeros(len(grid), np.float32)
    xs, column_of = np.unique(grid.xy[:, 0], return_inverse=True)
    ys, row_of = np.unique(grid.xy[:, 1], return_inverse=True)
    x_cuts, y_cuts = (np.unique([at, at + side]) for at, side in zip((xs, ys), grid.side, strict=True))
    areas = _cell_areas(edges, x_cuts.astype(float), y_cuts.astype(float))
    areas = _summed(areas, np.searchsorted(y_cuts, ys), np.searchsorted(y_cuts, ys + grid.side[1]))
    areas = _summed(areas.T, np.searchsorted(x_cuts, xs), np.searchsorted(x_cuts, xs + grid.side[0])).T
    fractions = np.clip(areas / (grid.side[0] * grid.side[1]), 0, 1)
    fractions[fractions < _NOTHING] = 0
    return fractions.astype(np.float32)[row_of, column_of]


def _directed_edges(region: shapely.Geometry) -> NDArray[np.float64]:
    """(M, 4) x, y to x, y of all edges of a geometry's polygons that are not level; what they hold is on their left.

    Left as seen on a picture, where y points down.
    """
    parts = shapely.get_parts(shapely.get_parts(region))
    rings, polygon = shapely.get_rings(parts[shapely.get_dimensions(parts) == 2], return_index=True)
    if len(rings) == 0:
        return np.empty((0, 4))
    points, ring = shapely.get_coordinates(rings, return_index=True)
    inner = np.flatnonzero(ring[1:] == ring[:-1])
    edges, ring = np.concatenate([points[inner], points[inner + 1]], axis=1), ring[inner]
    doubled = np.bincount(ring, edges[:, 0] * edges[:, 3] - edges[:, 2] * edges[:, 1], len(rings))  # the signed areas
    shell = np.append(True, polygon[1:] != polygon[:-1])
    turned = (doubled > 0) == shell
    edges[turned[ring]] = edges[turned[ring]][:, [2, 3, 0, 1]]
    steep: NDArray[np.float64] = edges[edges[:, 1] != edges[:, 3]]
    return steep


def _cell_areas(
    edges: NDArray[np.float64], x_cuts: NDArray[np.float64], y_cuts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The area of each cell between cuts, (rows, columns), that lies within directed edges.

    By Green's theorem: an edge adds what of its rows lies to its right, and the edge back takes away what lies beyond.
    """
    slots = np.concatenate([[-np.inf], x_cuts, [np.inf]])  # columns, with one on either side
    height = np.zeros((len(y_cuts) - 1, len(slots) - 1))  # that edges in a cell have, up and down
    area = np.zeros_like(height)  # to their right, within the cell
    for start in range(0, len(edges), _EDGES_AT_ONCE):
        x0, y0, x1, y1 = edges[start : start + _EDGES_AT_ONCE].T
        sign = np.sign(y1 - y0)
        # cut at the rows, ...
        of, row, (low, high) = _pieces(np.minimum(y0, y1), np.maximum(y0, y1), y_cuts)
        a, b = (x0[of] + (x1 - x0)[of] * ((y - y0[of]) / (y1 - y0)[of]) for y in (low, high))
        rise = sign[of] * (high - low)
        # ... then at the columns
        of, slot, (left, right) = _pieces(np.minimum(a, b), np.maximum(a, b), slots)
        span = np.abs(a - b)[of]
        share = np.divide(right - left, span, out=np.ones_like(span), where=span > 0)
        inside = np.isfinite(slots[slot + 1])
        np.add.at(height, (row[of], slot), rise[of] * share)
        beyond = np.where(inside, slots[slot + 1], 0) - (left + right) / 2
        np.add.at(area, (row[of], slot), rise[of] * share * beyond)
    areas: NDArray[np.float64] = area[:, 1:-1] + np.cumsum(height, axis=1)[:, :-2] * np.diff(x_cuts)
    return areas


def _pieces(
    low: NDArray[np.float64], high: NDArray[np.float64], cuts: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.intp], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Cut intervals: for each piece its interval, the gap between cuts it lies in, and its ends."""
    last = len(cuts) - 2
    first = np.searchsorted(cuts, low, "right") - 1
    final = np.searchsorted(cuts, high, "left") - 1
    first, final = np.maximum(first, 0), np.minimum(np.maximum(final, first), last)
    count = np.maximum(final - first + 1, 0)
    of = np.repeat(np.arange(len(low)), count)
    gap = first[of] + np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    return of, gap, (np.maximum(low[of], cuts[gap]), np.minimum(high[of], cuts[gap + 1]))


def _summed(rows: NDArray[np.float64], start: NDArray[np.intp], stop: NDArray[np.intp]) -> NDArray[np.float64]:
    """The sums of ``rows[start:stop]``; start is below stop."""
    padded = np.concatenate([rows, np.zeros_like(rows[:1])])
    sums: NDArray[np.float64] = np.add.reduceat(padded, np.stack([start, stop], axis=1).ravel(), axis=0)[::2]
    return sums


def _read_level(
    pyramid: Pyramid, factor: tuple[float, float], exact: tuple[float, float], spare: float
) -> tuple[int, tuple[int, int]]:
    best: tuple[int, tuple[int, int]] = (0, (1, 1))
    for level in range(1, len(pyramid.sizes)):
        dx, dy = pyramid.downsample(level)
        if not (pyramid.native[level] and dx == int(dx) and dy == int(dy)):
            continue
        if spare * dx > factor[0] * (1 + 1e-6) or spare * dy > factor[1] * (1 + 1e-6):
            break
        moved = max(abs(_round_to(exact[i], int(d)) / exact[i] - 1) for i, d in enumerate((dx, dy)))
        if moved <= WHOLE_FACTOR_TOLERANCE:
            best = (level, (int(dx), int(dy)))
    return best


def _round_to(value: float, step: int) -> int:
    return max(1, round(value / step)) * step


def _starts(length: int, side: int, stride: int, edge: str) -> NDArray[np.int64]:
    """First pixels of the tiles along one axis. ``pad`` adds tiles until every pixel is covered."""
    if edge == "drop":
        return np.arange(0, length - side + 1, stride, dtype=np.int64)
    count = 1 if length <= side else 1 + -(-(length - side) // stride)
    return np.arange(count, dtype=np.int64) * stride
