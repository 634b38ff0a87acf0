"""Box, TileGrid: where tiles lie on a slide. No I/O."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from wsi.pyramid import WHOLE_FACTOR_TOLERANCE, Pyramid

__all__ = ["Box", "TileGrid", "Tiling", "cover", "tissue_fractions"]

# Without snapping, GEOS cuts slivers thinner than its rounding (valid polygons of area 1e-15) into areas that are not there.
_SNAP_PX = 2.0**-20


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
    """

    mpp: float = 0.5
    tile_px: int = 256
    overlap_px: int = 0
    min_tissue: float = 0.25
    edge: Literal["drop", "pad"] = "drop"
    holes: Literal["drop", "keep"] = "drop"
    mpp_tolerance: float = 0.25
    allow_upsample: bool = False

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


def cover(pyramid: Pyramid, tiling: Tiling) -> TileGrid:
    """Every tile of the lattice that ``tiling`` puts on a slide, tissue or not.

    Tiles are read from the coarsest level that keeps two pixels per tile pixel in each direction and whose pixels the
    lattice can be aligned to without moving the mpp by more than two per cent; else from level 0. So what an encoder
    sees is always an area mean of whole native pixels.

    Raises:
        TooCoarseError: the scan is too coarse for the wanted mpp.
    """
    scale = pyramid.scale_to(tiling.mpp, tolerance=tiling.mpp_tolerance, allow_upsample=tiling.allow_upsample)
    exact = (tiling.tile_px * scale.factor[0], tiling.tile_px * scale.factor[1])
    level, step = _read_level(pyramid, scale.factor, exact)
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
    """(N,) the exact fraction of each tile's area that lies in ``region``.

    The region is cut into the lattice's rows first, so that each tile is only compared with what lies near it: the cost
    grows with the length of the outline, not with tiles times vertices.
    """
    fractions = np.zeros(len(grid), np.float64)
    region = _polygonal(shapely.set_precision(region, _SNAP_PX))
    if len(grid) == 0 or region.is_empty:
        return fractions.astype(np.float32)
    left, _, right, _ = region.bounds
    area = float(grid.side[0] * grid.side[1])
    ys, row_of = np.unique(grid.xy[:, 1], return_inverse=True)
    order = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[order], np.arange(len(ys) + 1))
    for row, y in enumerate(ys):
        row_box = shapely.box(left - 1, y, right + 1, y + grid.side[1])
        strip = _polygonal(shapely.intersection(region, row_box, grid_size=_SNAP_PX))
        if strip.is_empty:
            continue
        tiles = order[starts[row] : starts[row + 1]]
        x = grid.xy[tiles, 0]
        boxes = shapely.box(x, y, x + grid.side[0], y + grid.side[1])  # a row at a time: a slide may have millions
        shapely.prepare(strip)
        inside = shapely.covers(strip, boxes)
        touched = shapely.intersects(strip, boxes) & ~inside
        fractions[tiles[inside]] = 1.0
        fractions[tiles[touched]] = shapely.area(shapely.intersection(strip, boxes[touched], grid_size=_SNAP_PX)) / area
    return np.clip(fractions, 0, 1).astype(np.float32)


def _polygonal(geometry: shapely.Geometry) -> shapely.Geometry:
    """The parts of a geometry that have an area; cutting may leave lines and points beside them."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return shapely.multipolygons(parts[shapely.get_dimensions(parts) == 2])


def _read_level(
    pyramid: Pyramid, factor: tuple[float, float], exact: tuple[float, float]
) -> tuple[int, tuple[int, int]]:
    best: tuple[int, tuple[int, int]] = (0, (1, 1))
    for level in range(1, len(pyramid.sizes)):
        dx, dy = pyramid.downsample(level)
        if not (pyramid.native[level] and dx == int(dx) and dy == int(dy)):
            continue
        if 2 * dx > factor[0] or 2 * dy > factor[1]:
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
