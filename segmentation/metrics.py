"""Metrics: how well areas, borders, objects and probabilities agree with the truth.

Areas are counted and borders collected strip by strip, so that memory does not grow with the slide. Dice, IoU, precision
and recall are those of pixels. HD95 is the larger of the two 95th percentiles of the distances from the border pixels of
one to those of the other, as MONAI has it. The three object measures are those of the GlaS contest: Sirinukunwattana et
al., Gland segmentation in colon histology images, Medical Image Analysis 35, 2017, section 4; here objects are polygons
and not sets of pixels, and distances are between outlines. Calibration: Guo et al., On Calibration of Modern Neural
Networks, ICML 2017, equation 5, of the probability of the class itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from segmentation.components import PixelRows, strips
from segmentation.place import MapPlace
from wsi.errors import UsageError

__all__ = [
    "Calibration",
    "Interval",
    "Objects",
    "Overlap",
    "calibration",
    "compare_maps",
    "compare_objects",
    "interval_of_mean",
    "paired_difference",
]

_PERCENTILE = 95
_Points = NDArray[np.int64]
_MATCH = 0.5  # of the true object that a found one must cover


@dataclass(frozen=True)
class Overlap:
    """How one class's areas in two maps agree. What is not defined is NaN.

    Attributes:
        both, only_found, only_true: pixels.
        hd95_um: distance between borders; NaN where either map has none.
    """

    both: int
    only_found: int
    only_true: int
    hd95_um: float

    @property
    def dice(self) -> float:
        return _ratio(2 * self.both, 2 * self.both + self.only_found + self.only_true)

    @property
    def iou(self) -> float:
        return _ratio(self.both, self.both + self.only_found + self.only_true)

    @property
    def precision(self) -> float:
        return _ratio(self.both, self.both + self.only_found)

    @property
    def recall(self) -> float:
        return _ratio(self.both, self.both + self.only_true)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def compare_maps(
    found: PixelRows, truth: PixelRows, place: MapPlace, classes: Mapping[int, str], *, ignore: int | None = None
) -> dict[str, Overlap]:
    """Compare two label maps (H, W) class by class, a strip at a time.

    Args:
        classes: the name of each label that is compared.
        ignore: a label of the truth whose pixels do not count, neither for areas nor for borders.

    Raises:
        UsageError: the maps have different shapes.
    """
    if found.shape != truth.shape:
        raise UsageError(f"two maps are compared pixel by pixel; these are {found.shape} and {truth.shape}")
    counts = {label: np.zeros(3, np.int64) for label in classes}
    borders: dict[int, tuple[list[_Points], list[_Points]]] = {label: ([], []) for label in classes}
    for rows, inner in _overlapping_strips(found, truth):
        mine, true = (np.asarray(each[rows]).astype(np.int64) for each in (found, truth))
        if ignore is not None:
            mine = np.where(true == ignore, ignore, mine)
        for label, count in counts.items():
            is_mine, is_true = mine == label, true == label
            pairs = (is_mine & is_true, is_mine & ~is_true, ~is_mine & is_true)
            count += [np.count_nonzero(pixels[inner]) for pixels in pairs]
            for mask, points in zip((is_mine, is_true), borders[label], strict=True):
                points.append(_border(mask, inner) + np.array((0, rows.start + inner.start)))
    result = {}
    for label, name in classes.items():
        mine, true = (np.concatenate(points) for points in borders[label])
        both, only_found, only_true = counts[label].tolist()
        result[name] = Overlap(both, only_found, only_true, _hd_um(mine, true, place))
    return result


def _overlapping_strips(*maps: PixelRows, pixels_at_once: int = 1 << 22) -> Iterator[tuple[slice, slice]]:
    """Rows to read, with a row more above and below where there is one, and which of them are the strip's own."""
    height, width = maps[0].shape
    chunk = max((getattr(each, "chunks", None) or (1,))[0] for each in maps)
    step = -(-max(1, pixels_at_once // max(1, width)) // chunk) * chunk
    for top in range(0, height, step):
        bottom = min(top + step, height)
        rows = slice(max(0, top - 1), min(height, bottom + 1))
        yield rows, slice(top - rows.start, bottom - rows.start)


def _border(mask: NDArray[np.bool_], rows: slice) -> _Points:
    """(N, 2) x and y, in these rows, of pixels that have one outside the mask above, below or beside them."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    y, x = np.nonzero((mask & ~inside)[rows])
    return np.stack([x, y], axis=1)


def _hd_um(first: _Points, second: _Points, place: MapPlace) -> float:
    from scipy.spatial import cKDTree

    if not len(first) or not len(second):
        return math.nan
    one, other = (points * np.array(place.pixel_um) for points in (first, second))
    there, _ = cKDTree(other).query(one)
    back, _ = cKDTree(one).query(other)
    return float(max(np.percentile(there, _PERCENTILE), np.percentile(back, _PERCENTILE)))


# Objects


@dataclass(frozen=True)
class Objects:
    """How one class's objects agree with the true ones. What is not defined is NaN.

    Attributes:
        n_found, n_true: how many objects there are.
        n_matched: found objects that cover at least half of the true object they overlap most.
        dice: object-level Dice, each object weighted by its area.
        hausdorff_um: object-level Hausdorff distance, weighted likewise; NaN where either side has no object.
    """

    n_found: int
    n_true: int
    n_matched: int
    dice: float
    hausdorff_um: float

    @property
    def precision(self) -> float:
        return _ratio(self.n_matched, self.n_found)

    @property
    def recall(self) -> float:
        return _ratio(self.n_matched, self.n_true)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.n_matched, self.n_found + self.n_true)


@np.errstate(all="ignore")  # GEOS leaves floating-point flags behind, which numpy would report as warnings
def compare_objects(
    found: Sequence[shapely.Geometry], truth: Sequence[shapely.Geometry], mpp: tuple[float, float]
) -> Objects:
    """Compare the objects of one class, valid polygons in level-0 pixels each.

    Args:
        mpp: microns per level-0 pixel in x and y.
    """
    mine, true = (
        shapely.transform(np.array(list(shapes), dtype=object), lambda xy: xy * np.array(mpp))
        for shapes in (found, truth)
    )
    if not len(mine) or not len(true):
        return Objects(len(mine), len(true), 0, math.nan if len(mine) == len(true) else 0.0, math.nan)
    i, j = shapely.STRtree(true).query(mine, predicate="intersects")
    overlap = shapely.area(shapely.intersection(mine[i], true[j]))
    i, j, overlap = i[overlap > 0], j[overlap > 0], overlap[overlap > 0]
    best_true = _best(i, j, overlap, len(mine))
    best_mine = _best(j, i, overlap, len(true))
    area_mine, area_true = shapely.area(mine), shapely.area(true)
    shared = {(a, b): value for a, b, value in zip(i.tolist(), j.tolist(), overlap.tolist(), strict=True)}
    of_mine = np.array([shared.get((a, b), 0.0) for a, b in enumerate(best_true.tolist())])
    of_true = np.array([shared.get((a, b), 0.0) for b, a in enumerate(best_mine.tolist())])
    matched = {int(b) for b, value in zip(best_true, of_mine, strict=True) if b >= 0 and value >= _MATCH * area_true[b]}
    dice_mine = 2 * of_mine / (area_mine + area_true[best_true])
    dice_true = 2 * of_true / (area_true + area_mine[best_mine])
    away_mine, away_true = _away(mine, true, best_true), _away(true, mine, best_mine)
    return Objects(
        len(mine),
        len(true),
        len(matched),
        float(np.average(dice_mine, weights=area_mine) + np.average(dice_true, weights=area_true)) / 2,
        float(np.average(away_mine, weights=area_mine) + np.average(away_true, weights=area_true)) / 2,
    )


def _best(
    owner: NDArray[np.int64], other: NDArray[np.int64], overlap: NDArray[np.float64], n: int
) -> NDArray[np.int64]:
    """(n,) the other object each overlaps most; -1 where it overlaps none."""
    best = np.full(n, -1, np.int64)
    order = np.lexsort((-other, overlap, owner))  # the last of each is the largest, then the lowest number
    best[owner[order]] = other[order]
    return best


def _away(shapes: NDArray[np.object_], others: NDArray[np.object_], best: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) Hausdorff distance of each shape to the one it overlaps most, else to the one where it is least."""
    away = np.empty(len(shapes))
    there = best >= 0
    away[there] = _hausdorff(shapes[there], others[best[there]])
    if there.all():
        return away
    bounds = shapely.bounds(others)
    for i in np.flatnonzero(~there):
        # No two shapes are nearer than their boxes' sides are, so most need not be measured.
        least = np.abs(bounds - shapely.bounds(shapes[i])).max(axis=1)
        away[i] = math.inf
        for j in np.argsort(least):
            if least[j] >= away[i]:
                break
            away[i] = min(away[i], float(_hausdorff(shapes[i], others[j])))
    return away


def _hausdorff(first: Any, second: Any) -> Any:
    return shapely.hausdorff_distance(shapely.boundary(first), shapely.boundary(second))


# Probabilities


@dataclass(frozen=True, eq=False)
class Calibration:
    """How often what was said with a probability is so, in bins of equal width.

    Attributes:
        counts: (B,) pixels in each bin.
        said: (B,) mean probability in each; NaN in empty ones.
        so: (B,) share of true pixels in each; NaN in empty ones.
        brier: mean squared distance of probability from truth.
    """

    counts: NDArray[np.int64]
    said: NDArray[np.float64]
    so: NDArray[np.float64]
    brier: float

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean distance of what was said from what is so; NaN without pixels."""
        n = self.counts.sum()
        return float(np.nansum(self.counts * np.abs(self.said - self.so)) / n) if n else math.nan


def calibration(probabilities: PixelRows, truth: PixelRows, label: int, *, bins: int = 15) -> Calibration:
    """How probabilities (H, W) of a class agree with a label map, a strip at a time; NaN was not scored.

    Raises:
        UsageError: the maps have different shapes, or a probability is not from 0 to 1.
    """
    if probabilities.shape != truth.shape:
        raise UsageError(f"probabilities {probabilities.shape} and truth {truth.shape} have different shapes")
    counts, said, so = np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins)
    squares = 0.0
    for each, labels in strips(probabilities, truth):
        scored = ~np.isnan(each)
        p = each[scored].astype(np.float64)
        y = labels[scored] == label
        if len(p) and not (p.min() >= 0 and p.max() <= 1):
            raise UsageError(f"probabilities are from 0 to 1; found {p.min()} to {p.max()}")
        bin_of = np.minimum((p * bins).astype(np.int64), bins - 1)
        counts += np.bincount(bin_of, minlength=bins)
        said += np.bincount(bin_of, p, bins)
        so += np.bincount(bin_of, y, bins)
        squares += float(((p - y) ** 2).sum())
    with np.errstate(invalid="ignore"):
        return Calibration(counts, said / counts, so / counts, _ratio(squares, int(counts.sum())))


# Intervals over slides


class Interval(NamedTuple):
    """A mean over slides with its bootstrap interval, and how many slides it is defined for."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval_of_mean(values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """The mean over slides with the percentile interval over slides drawn with replacement; NaN slides do not count."""
    there = np.array([value for value in values if not math.isnan(value)])
    if not len(there):
        return Interval(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(seed)
    means = there[rng.integers(0, len(there), (draws, len(there)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(there.mean()), float(low), float(high), len(there))


def paired_difference(first: Sequence[float], second: Sequence[float], **options: Any) -> Interval:
    """How much larger the first's mean is over slides that both have; options as for ``interval_of_mean``."""
    return interval_of_mean([a - b for a, b in zip(first, second, strict=True)], **options)
