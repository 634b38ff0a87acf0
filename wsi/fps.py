"""Fast patch selection: a few patches, far apart on a slide's tissue, from its thumbnail alone. No I/O.

Alfasly et al.: Rotation-Agnostic Image Representation Learning for Digital Pathology, CVPR 2024 (PathDino), with its
released code. It is not farthest-point sampling. Differs from the authors' code: sizes are microns and scales exact,
where theirs are ratios of whole numbers that drift; where more patches are left than wanted, a seeded draw keeps some,
where theirs draws new places from a kernel density; and a patch stands for the tile of the grid in its middle.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi.grid import TileGrid
from wsi.slide import Overview

__all__ = [
    "THUMBNAIL_PX",
    "FastPatches",
    "Patches",
    "apart",
    "cleaned",
    "draw",
    "fast_patches",
    "find_patches",
    "spread",
]

THUMBNAIL_PX = 1024  # longer side of the picture that is looked at

_GREY = 5.0  # deviation over red, green, blue below which a pixel is grey: glass, shadow, ink
_SMOOTH_PX = 30
_LEAST_TINT = 0.05

_Pixels = NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class FastPatches:
    """How patches are chosen; the defaults are the authors'.

    Attributes:
        patch_um: side of a patch; 1000 px at 20x. Two of them are at least twice that apart.
        tissue: least share of a patch that is tissue.
        n: of more patches than that, so many are drawn.
        seed: of the draw.
    """

    patch_um: float = 500.0
    tissue: float = 0.9
    n: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.patch_um < float("inf"):
            raise ValueError(f"patch_um must be positive, got {self.patch_um}")
        if not 0 <= self.tissue <= 1:
            raise ValueError(f"tissue must be from 0 to 1, got {self.tissue}")
        if self.n < 1 or self.seed < 0:
            raise ValueError(f"n is at least 1 and seed at least 0, got {self.n} and {self.seed}")


class Patches(NamedTuple):
    """Patches in the order in which they were met: (M, 2) top-left corners in pixels of the picture, (M,) tissue share."""

    xy: NDArray[np.int64]
    tissue: NDArray[np.float64]


def fast_patches(view: Overview, grid: TileGrid, mpp: tuple[float, float], options: FastPatches) -> NDArray[np.int64]:
    """Rows of the tiles that stand for a slide, ascending; at most ``options.n``, none where no patch fits the tissue.

    Args:
        view: the slide's thumbnail, longer side ``THUMBNAIL_PX``.
        grid: the tiles to choose from.
        mpp: microns per pixel of level 0, x and y.
    """
    side = np.array([options.patch_um / mpp[0], options.patch_um / mpp[1]])  # level-0 pixels
    patch = np.maximum(1, side // np.array(view.scale)).astype(int)
    clean = cleaned(view.image)
    found = find_patches(clean.mean(axis=2) != 255, (int(patch[0]), int(patch[1])), options.tissue)
    kept = found.xy[apart(found.xy, 2 * float(patch[1]))]
    centres = (kept + patch / 2) * np.array(view.scale)
    return draw(_tiles_at(grid, centres, side / 2), options.n, options.seed)


def spread(grid: TileGrid, mpp: tuple[float, float], options: FastPatches) -> NDArray[np.int64]:
    """Rows of tiles that lie apart as the patches do, ascending, where there is a grid and no picture.

    Tiles are met in the order of the grid; those with less than ``options.tissue`` of tissue are passed over.

    Args:
        mpp: microns per pixel of level 0, x and y.
    """
    rows = np.flatnonzero(grid.tissue >= options.tissue - 1e-6)
    kept = rows[apart(grid.xy[rows] * np.array(mpp), 2 * options.patch_um)]
    return draw(kept, options.n, options.seed)


def cleaned(image: _Pixels) -> _Pixels:
    """The picture with white where it is grey, or on average not stained: the red-to-blue tint of the optical density.

    The tint is cy of van der Laak's hue-saturation-density model, Cytometry 2000.
    """
    clean = image.copy()
    clean[image.std(axis=2) < _GREY] = 255
    light = np.maximum(clean.astype(np.float32) / 255, np.finfo(np.float32).tiny)
    density = -np.log(light)  # (H, W, 3)
    mean = np.maximum(density.mean(axis=2), np.finfo(np.float32).tiny)
    tint = (density[..., 1] - density[..., 2]) / (np.sqrt(np.float32(3)) * mean)
    clean[cv2.blur(tint, (_SMOOTH_PX, _SMOOTH_PX)) < _LEAST_TINT] = 255
    return clean


def find_patches(mask: NDArray[np.bool_], patch: tuple[int, int], min_tissue: float) -> Patches:
    """Patches side by side in the bounding box of every piece of ``mask`` (H, W), of which enough is tissue.

    Rows of patches run downwards. As published, a patch that would end at the far edge of the box is left out, and
    boxes that overlap give patches that do.

    Args:
        patch: width and height in pixels.
    """
    width, height = patch
    sums = cv2.integral(mask.astype(np.uint8))  # (H + 1, W + 1)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    places = []
    for outline in outlines:
        left, top, wide, high = cv2.boundingRect(outline)
        if wide >= width and high >= height:
            xs = np.arange(left, left + wide - width, width)
            ys = np.arange(top, top + high - height, height)
            places.append(np.stack(np.meshgrid(xs, ys, indexing="ij"), axis=-1).reshape(-1, 2))
    xy = np.concatenate(places).astype(np.int64) if places else np.empty((0, 2), np.int64)
    x, y = xy.T
    inside = sums[y + height, x + width] - sums[y, x + width] - sums[y + height, x] + sums[y, x]
    tissue = inside / (width * height)
    enough = tissue >= min_tissue
    return Patches(xy[enough], tissue[enough])


def apart(places: NDArray[np.int64] | NDArray[np.float64], distance: float) -> NDArray[np.int64]:
    """Rows of ``places`` (M, 2) that are at least ``distance`` from every one kept before them."""
    kept = np.empty((len(places), 2))
    rows: list[int] = []
    for row, place in enumerate(np.asarray(places, np.float64)):
        if ((kept[: len(rows)] - place) ** 2).sum(axis=1).min(initial=np.inf) >= distance**2:
            kept[len(rows)] = place
            rows.append(row)
    return np.array(rows, np.int64)


def draw(rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """At most ``n`` of these rows, ascending; the same ones for the same seed."""
    if len(rows) > n:
        rows = np.random.default_rng(seed).choice(rows, n, replace=False)
    return np.sort(rows)


def _tiles_at(grid: TileGrid, centres: NDArray[np.float64], reach: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each of ``centres`` (M, 2) the tile whose own is nearest, if within ``reach``; each tile once."""
    middles = grid.xy + np.array(grid.side) / 2
    rows = []
    for centre in centres if len(grid) else ():
        off = np.abs(middles - centre)
        row = int((off**2).sum(axis=1).argmin())
        if (off[row] <= np.maximum(reach, np.array(grid.side) / 2)).all():
            rows.append(row)
    return np.unique(np.array(rows, np.int64))
