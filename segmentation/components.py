"""Components: the pieces of a label map and the corners of their outlines. Memory grows with outlines, not with pixels.

The map is read once, a strip of rows at a time. What is kept of a strip are its runs (stretches of equal pixels in a row)
and its corners (where an outline turns or several meet); pieces are runs joined across rows, so that seams between
strips leave no trace. A piece holds together by pixels that share a side. Outside the map there is background.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi.errors import UsageError

__all__ = ["Components", "PixelRows", "find_components", "is_corner", "next_corners", "strips"]

_Ints = NDArray[np.int64]
_OUTSIDE = 0  # the piece that all background open to the map's edge belongs to


class PixelRows(Protocol):
    """(H, W) pixels that are read by rows: a numpy array, a memory map, a Zarr array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Components:
    """The K pieces of a label map, background among them, and the N corners of their outlines.

    Attributes:
        labels: (K,) the label of each piece; 0 is background. Piece 0 is the outside.
        pixels: (K,) how many pixels each has.
        sums: (K,) the sum of a second map (such as probabilities) over each; None without one.
        xy: (N, 2) corners in map pixels, by rows.
        around: (N, 4) the pieces that meet at each: upper left, upper right, lower left, lower right.
    """

    labels: _Ints
    pixels: _Ints
    sums: NDArray[np.float64] | None
    xy: NDArray[np.int32]
    around: NDArray[np.int32]

    def without(self, min_pixels: float, min_hole_pixels: float) -> "Components":
        """The same map with small pieces turned into background and small holes filled.

        A hole is background that is not open to the map's edge. It takes the label with which it shares the longest
        border, as does the place of a small piece that lay in another one, if that is smaller than a hole may be.
        """
        small = (self.labels > 0) & (self.pixels < min_pixels)
        dropped = self._relabelled(np.where(small, 0, self.labels)) if small.any() else self
        return dropped._filled(min_hole_pixels)

    def _filled(self, min_pixels: float) -> "Components":
        fill = (self.labels == 0) & (self.pixels < min_pixels)
        fill[_OUTSIDE] = False
        if not fill.any():
            return self
        first, second, length = self._borders()
        into = np.concatenate([first, second])
        beside = np.concatenate([second, first])
        length = np.concatenate([length, length])
        chosen = fill[into] & (self.labels[beside] > 0)
        into, beside, length = into[chosen], self.labels[beside[chosen]], length[chosen]
        pairs, which = np.unique(np.stack([into, beside]), axis=1, return_inverse=True)
        total = np.bincount(which.ravel(), length)
        best = np.lexsort((-pairs[1], total, pairs[0]))  # the last of each hole: longest, then the lowest label
        labels = self.labels.copy()
        labels[pairs[0][best]] = pairs[1][best]
        return self._relabelled(labels)

    def _borders(self) -> tuple[_Ints, _Ints, _Ints]:
        """Pairs of neighbouring pieces with the length in pixels of each straight stretch between them."""
        right, down = next_corners(self)
        upper, left = self.xy[:, 0], self.xy[:, 1]
        along = np.flatnonzero(right >= 0)
        below = np.flatnonzero(down >= 0)
        length = np.concatenate([upper[right[along]] - upper[along], left[down[below]] - left[below]])
        pairs = np.concatenate([self.around[along][:, [1, 3]], self.around[below][:, [2, 3]]]).astype(np.int64)
        return pairs[:, 0], pairs[:, 1], length.astype(np.int64)

    def _relabelled(self, labels: _Ints) -> "Components":
        """The map with other labels of its pieces, neighbours of equal label joined."""
        first, second, _ = self._borders()
        same = labels[first] == labels[second]
        joined, count = _joined(len(labels), first[same], second[same])
        new = np.empty(count, np.int64)
        new[joined] = labels
        around = joined[self.around].astype(np.int32)
        kept = is_corner(around)
        return replace(
            self,
            labels=new,
            pixels=np.bincount(joined, self.pixels, count).astype(np.int64),
            sums=None if self.sums is None else np.bincount(joined, self.sums, count).astype(np.float64),
            xy=self.xy[kept],
            around=around[kept],
        )


def find_components(labels: PixelRows, values: PixelRows | None = None, *, pixels_at_once: int = 1 << 20) -> Components:
    """The pieces of a label map (H, W) of whole numbers from 0, and where their outlines turn.

    Args:
        values: (H, W) numbers to sum over each piece, such as probabilities; NaN counts as 0.
        pixels_at_once: about how many pixels are read and looked at together.

    Raises:
        UsageError: the map is not (H, W), does not hold whole numbers, or holds negative ones.
    """
    if len(labels.shape) != 2 or (values is not None and values.shape != labels.shape):
        raise UsageError(
            f"a label map is (H, W) and so are its values; got {labels.shape}, {getattr(values, 'shape', '')}"
        )
    scan = _Scan(labels.shape[1], summed=values is not None)
    outside = np.zeros((1, labels.shape[1]), np.uint8)
    scan.push(outside, None)
    for rows, sums in strips(labels, values, pixels_at_once=pixels_at_once):
        scan.push(_checked(rows), sums)
    scan.push(outside, None)
    return scan.result()


def strips(*maps: PixelRows | None, pixels_at_once: int = 1 << 20) -> Iterator[tuple[Any, ...]]:
    """The rows of several maps of one shape, about so many pixels at a time, each chunk of a Zarr array decoded once.

    None stands for itself.
    """
    there = [each for each in maps if each is not None]
    height, width = there[0].shape[-2:]
    step = max(1, pixels_at_once // max(1, width))
    chunk = max(getattr(each, "chunks", None) or (1,) for each in there)[0]
    block = -(-step // chunk) * chunk
    for top in range(0, height, block):
        loaded = [None if each is None else np.asarray(each[top : top + block]) for each in maps]
        for row in range(0, min(block, height - top), step):
            yield tuple(None if each is None else each[row : row + step] for each in loaded)


def is_corner(around: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(N,) whether an outline turns, or several meet, between these four pieces."""
    nw, ne, sw, se = around.T
    return np.asarray(((nw != ne) | (sw != se)) & ((nw != sw) | (ne != se)))


def next_corners(components: Components) -> tuple[_Ints, _Ints]:
    """For each corner the next one along the outline to its right and below it; -1 where no outline goes that way."""
    _, ne, sw, se = components.around.T
    n = len(components.xy)
    right = np.where(ne != se, np.arange(1, n + 1), -1)
    by_column = np.lexsort((components.xy[:, 1], components.xy[:, 0]))
    down = np.empty(n, np.int64)
    down[by_column] = np.append(by_column[1:], -1)[:n]
    return right, np.where(sw != se, down, -1)


class _Scan:
    """Reads a map from top to bottom; keeps runs and corners."""

    def __init__(self, width: int, *, summed: bool) -> None:
        self.width = width + 2  # a column of background on either side
        self.summed = summed
        self.n_runs = 0
        self.y = -1  # of the last row seen
        self.last: tuple[NDArray[Any], NDArray[np.int32], NDArray[np.bool_]] | None = None
        self.labels: list[NDArray[np.int64]] = []
        self.pixels: list[NDArray[np.int64]] = []
        self.sums: list[NDArray[np.float64]] = []
        self.joins: list[NDArray[np.int32]] = []
        self.xy: list[NDArray[np.int32]] = []
        self.around: list[NDArray[np.int32]] = []

    def push(self, rows: NDArray[Any], values: NDArray[Any] | None) -> None:
        pixels = np.zeros((len(rows), self.width), rows.dtype)
        pixels[:, 1:-1] = rows
        starts = np.ones(pixels.shape, bool)
        np.not_equal(pixels[:, 1:], pixels[:, :-1], out=starts[:, 1:])
        runs = np.cumsum(starts.ravel(), dtype=np.int32).reshape(pixels.shape)
        runs += self.n_runs - 1
        at = np.flatnonzero(starts)
        self.n_runs += len(at)
        self.labels.append(pixels.ravel()[at].astype(np.int64))
        self.pixels.append(np.diff(at, append=pixels.size))
        if self.summed:
            self.sums.append(np.zeros(len(at)) if values is None else _run_sums(values, at, pixels.shape))
        if self.last is not None:
            pixels = np.concatenate([self.last[0].astype(pixels.dtype), pixels])
            runs = np.concatenate([self.last[1], runs])
            starts = np.concatenate([self.last[2], starts])
            self._find(pixels, runs, starts)
        self.y += len(rows)
        self.last = (pixels[-1:].copy(), runs[-1:].copy(), starts[-1:].copy())

    def _find(self, pixels: NDArray[Any], runs: NDArray[np.int32], starts: NDArray[np.bool_]) -> None:
        """Joins and corners between the rows of a strip and the row before it."""
        level = pixels[1:] != pixels[:-1]  # an outline between a pixel and the one below
        joined = (starts[1:] | starts[:-1]) & ~level
        self.joins.append(np.stack([runs[:-1][joined], runs[1:][joined]]))
        upright = starts[:, 1:]
        corner = (upright[:-1] | upright[1:]) & (level[:, :-1] | level[:, 1:])
        y, x = np.nonzero(corner)
        self.xy.append(np.stack([x, y + self.y], axis=1).astype(np.int32))
        self.around.append(np.stack([runs[y, x], runs[y, x + 1], runs[y + 1, x], runs[y + 1, x + 1]], axis=1))

    def result(self) -> Components:
        first, second = np.concatenate(self.joins, axis=1)
        joined, count = _joined(self.n_runs, first, second)
        labels = np.empty(count, np.int64)
        labels[joined] = np.concatenate(self.labels)
        pixels = np.bincount(joined, np.concatenate(self.pixels), count).astype(np.int64)
        sums = np.bincount(joined, np.concatenate(self.sums), count).astype(np.float64) if self.summed else None
        around = joined[np.concatenate(self.around)].astype(np.int32)
        return Components(labels, pixels, sums, np.concatenate(self.xy), around)


def _joined(n: int, first: NDArray[Any], second: NDArray[Any]) -> tuple[NDArray[np.int32], int]:
    """(n,) which group each of n things is in after joining pairs, and how many groups; groups in order of their first."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(first), np.int32), (first, second)), shape=(n, n)).tocsr()
    count, group = connected_components(graph, directed=False)
    _, lead = np.unique(group, return_index=True)
    rank = np.empty(count, np.int32)
    rank[group[np.sort(lead)]] = np.arange(count)
    return rank[group], int(count)


def _run_sums(values: NDArray[Any], starts: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    padded = np.zeros(shape, np.float64)
    padded[:, 1:-1] = np.nan_to_num(values.astype(np.float64), nan=0.0)
    return np.asarray(np.add.reduceat(padded.ravel(), starts), np.float64)


def _checked(rows: NDArray[Any]) -> NDArray[Any]:
    if rows.dtype == bool:
        return rows.astype(np.uint8)  # no view: some bytes of True are 255
    if rows.dtype.kind not in "iu":
        raise UsageError(f"a label map holds whole numbers, not {rows.dtype}")
    if rows.dtype.kind == "i" and rows.size and rows.min() < 0:
        raise UsageError(f"a label map holds numbers from 0, 0 being background; found {rows.min()}")
    return rows
