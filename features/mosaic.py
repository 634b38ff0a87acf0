"""Mosaic: a few tiles that stand for a slide, some from each kind of tissue and from all over it.

Kalra et al.: Yottixel, an image search engine for large archives of histopathology whole slide images, Medical Image
Analysis 2020. Tiles are grouped by what they look like, by k-means on their colours; within each group, by where they
lie; the tile in the middle of each of these stands for it. Differs from the paper: any description of tiles will do, and
k-means is seeded and repeats to the bit: sums of a library's threads come in any order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi.grid import TileGrid
from wsi.slide import Overview

__all__ = ["Mosaic", "colour_histograms", "group", "mosaic"]

_BINS = 8  # of each colour's histogram
_MOST_ROUNDS = 100
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Mosaic:
    """How a mosaic is laid; the defaults are the paper's.

    Attributes:
        k: kinds of tissue.
        share: of each kind's tiles, as many are chosen, and at least one.
        seed: of k-means.
    """

    k: int = 9
    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.seed < 0:
            raise ValueError(f"k is at least 1 and seed at least 0, got {self.k} and {self.seed}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is above 0 and at most 1, got {self.share}")


def mosaic(looks: NDArray[np.float32], xy: NDArray[np.int64], options: Mosaic) -> NDArray[np.int64]:
    """Rows of the tiles that stand for a slide, ascending; none twice.

    Args:
        looks: (N, D) what each tile looks like: histograms of colours, or an encoder's vectors.
        xy: (N, 2) where it lies.
    """
    rng = np.random.default_rng(options.seed)
    kinds = group(looks, options.k, rng)
    chosen = []
    for kind in range(kinds.max(initial=-1) + 1):
        members = np.flatnonzero(kinds == kind)
        places = xy[members].astype(np.float64)
        areas = group(places, max(1, round(options.share * len(members))), rng)
        for area in range(areas.max() + 1):
            inside = np.flatnonzero(areas == area)
            off = ((places[inside] - places[inside].mean(axis=0)) ** 2).sum(axis=1)
            chosen.append(members[inside[off.argmin()]])
    return np.sort(np.array(chosen, np.int64))


def colour_histograms(view: Overview, grid: TileGrid) -> NDArray[np.float32]:
    """(N, 24) shares of a tile's pixels in eight steps of red, green and blue, from a picture of the whole slide."""
    steps = view.image // np.uint8(256 // _BINS) + np.array([0, _BINS, 2 * _BINS], np.uint8)  # (H, W, 3)
    height, width = view.image.shape[:2]
    limit, scale = np.array([width, height]), np.array(view.scale)
    low = np.clip(np.floor(grid.xy / scale), 0, limit - 1).astype(int)
    high = np.clip(np.ceil((grid.xy + np.array(grid.side)) / scale), low + 1, limit).astype(int)
    shares = np.empty((len(grid), 3 * _BINS), np.float32)
    for row, ((x0, y0), (x1, y1)) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        counts = np.bincount(steps[y0:y1, x0:x1].ravel(), minlength=3 * _BINS)
        shares[row] = counts / ((y1 - y0) * (x1 - x0))
    return shares


def group(points: NDArray[np.float32] | NDArray[np.float64], k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(N,) which of at most ``k`` groups each point (N, D) is in: greedy k-means++ and Lloyd's rounds.

    Groups are numbered from 0 without gaps. There are fewer than ``k`` where there are fewer different points.
    """
    if len(points) == 0:
        return np.empty(0, np.int64)
    centres = _far_centres(points, k, rng)
    nearest = _nearest(points, centres)
    for _ in range(_MOST_ROUNDS):
        order = np.argsort(nearest, kind="stable")
        there, starts = np.unique(nearest[order], return_index=True)
        members = np.split(points[order], starts[1:])
        centres[there] = [each.mean(axis=0, dtype=np.float64) for each in members]
        before, nearest = nearest, _nearest(points, centres)
        if np.array_equal(before, nearest):
            break
    return np.unique(nearest, return_inverse=True)[1].astype(np.int64)


def _far_centres(points: NDArray[np.floating], k: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """At most ``k`` of the points, all different: the greedy k-means++ of Arthur and Vassilvitskii, SODA 2007.

    Each is the best of a few that are drawn by their squared distance from those before.
    """
    chosen = [int(rng.integers(len(points)))]
    gap = _squares(points, np.asarray(points[chosen], np.float64))[:, 0]
    while len(chosen) < k:
        gap[chosen] = 0
        heap = np.cumsum(gap)
        if heap[-1] <= 0:
            break
        drawn = np.searchsorted(heap, rng.random(2 + int(np.log(k))) * heap[-1], side="right").clip(0, len(points) - 1)
        gaps = np.minimum(gap[:, None], _squares(points, np.asarray(points[drawn], np.float64)))  # (N, drawn)
        best = int(gaps.sum(axis=0).argmin())
        chosen.append(int(drawn[best]))
        gap = gaps[:, best]
    return np.asarray(points[chosen], np.float64)


def _nearest(points: NDArray[np.floating], centres: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.concatenate([squares.argmin(axis=1) for squares in _blocks(points, centres)])


def _squares(points: NDArray[np.floating], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, K) squared distances."""
    own = np.einsum("nd,nd->n", points, points)[:, None]
    squares: NDArray[np.float64] = (np.concatenate(list(_blocks(points, centres))) + own).astype(np.float64)
    return np.maximum(squares, 0)


def _blocks(points: NDArray[np.floating], centres: NDArray[np.float64]) -> Iterator[NDArray[np.floating]]:
    """(n, K) squared distances less the point's own square, some points at a time, in their own precision."""
    near = centres.astype(points.dtype)
    own = np.einsum("kd,kd->k", near, near)
    for start in range(0, len(points), _ROWS_AT_ONCE):
        yield own - 2 * (points[start : start + _ROWS_AT_ONCE] @ near.T)
