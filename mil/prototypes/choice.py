"""KReport: how good and how stable prototypes are for several k, to choose one by.

Rand: Objective Criteria for the Evaluation of Clustering Methods, JASA 1971, adjusted by Hubert, Arabie 1985; Rousseeuw:
Silhouettes, JCAM 1987; stability as in Lange, Roth, Braun, Buhmann: Stability-Based Validation, Neural Computation 2004.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mil.prototypes.kmeans import Scale, kmeans, nearest, scale_of
from mil.prototypes.tiles import TilePool
from wsi.errors import UsageError

__all__ = ["KReport", "KRow", "report_k"]

_SILHOUETTE_TILES = 2000  # a matrix of distances between all of them
_KS = (4, 8, 16, 32)


@dataclass(frozen=True)
class KRow:
    """What prototypes of one k are worth.

    Attributes:
        inertia: mean squared distance of a tile to its prototype; falls with every further prototype.
        silhouette: from −1 to 1, how much nearer a tile is to its own prototype's tiles than to the next one's.
        halves: adjusted Rand index, from about 0 to 1, of fits on disjoint halves of the slides; mean over draws. Low: the
            prototypes are those of these slides, not of the disease.
        halves_sd: its deviation over draws; NaN of a single draw.
        seeds: adjusted Rand index of fits on all tiles with different seeds; mean over pairs. Low: which prototypes come out
            is chance.
    """

    k: int
    inertia: float
    silhouette: float
    halves: float
    halves_sd: float
    seeds: float


@dataclass(frozen=True)
class KReport:
    """A row for each k; prints as a table."""

    rows: tuple[KRow, ...]
    n_tiles: int
    n_slides: int
    repeats: int

    def __str__(self) -> str:
        head = f"{'k':>4} {'inertia':>10} {'silhouette':>10} {'halves ARI':>15} {'seeds ARI':>10}"
        lines = [
            f"{row.k:>4} {row.inertia:>10.4g} {row.silhouette:>10.3f} {row.halves:>7.3f} ± {row.halves_sd:.3f} {row.seeds:>10.3f}"
            for row in self.rows
        ]
        about = f"{self.n_tiles} tiles of {self.n_slides} slides, {self.repeats} draws"
        return "\n".join((head, *lines, about))


def report_k(
    pool: TilePool,
    ks: Sequence[int] = _KS,
    *,
    repeats: int = 5,
    restarts: int = 3,
    seed: int = 0,
    scale: Scale = "none",
    done: Callable[[int], None] | None = None,
) -> KReport:
    """Fit prototypes of every k, again and again, and say how good and how much alike they are.

    Args:
        repeats: draws of halves, and different seeds.
        scale: as for ``fit_prototypes``; inertia and silhouette are measured in it.
        done: is told each k that is finished.

    Raises:
        UsageError: a single slide, which has no halves; or half of the slides have fewer tiles than some k.
    """
    if len(pool.slides) < 2 or repeats < 1:
        raise UsageError(f"stability needs two slides and a repeat, not {len(pool.slides)} and {repeats}")
    ks = tuple(dict.fromkeys(ks))
    divisor = scale_of(pool.x, scale)
    x = pool.x if divisor is None else pool.x / divisor
    rng = np.random.default_rng(seed)
    splits = [_halves(pool, rng) for _ in range(repeats)]
    fewest = min(int(side.sum()) for left in splits for side in (left, ~left))
    if not ks or min(ks) < 2 or max(ks) >= fewest:
        raise UsageError(f"ks lie from 2 to below the {fewest} tiles of half the slides, not {ks}")
    sample = rng.choice(len(pool), min(len(pool), _SILHOUETTE_TILES), replace=False)
    rows = []
    for k in ks:
        fits = [kmeans(x, k, seed=seed + number, restarts=restarts) for number in range(max(2, repeats))]
        labels = [nearest(x, fit.centres) for fit in fits]
        halves = []
        for left in splits:
            parts = [kmeans(x[side], k, seed=seed, restarts=restarts).centres for side in (left, ~left)]
            halves.append(_agreement(*(nearest(x, centres) for centres in parts)))
        rows.append(
            KRow(
                k=k,
                inertia=fits[0].inertia,
                silhouette=_silhouette(x[sample], labels[0][sample]),
                halves=float(np.mean(halves)),
                halves_sd=float(np.std(halves, ddof=1)) if len(halves) > 1 else float("nan"),
                seeds=float(np.mean([_agreement(a, b) for a, b in combinations(labels, 2)])),
            )
        )
        if done is not None:
            done(k)
    return KReport(tuple(rows), len(pool), len(pool.slides), repeats)


def _halves(pool: TilePool, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(n,) which tiles belong to the slides of the first half."""
    slides = rng.permutation(len(pool.slides))[: len(pool.slides) // 2]
    return np.isin(pool.slide, slides)


def _agreement(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(a, b))


def _silhouette(x: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """NaN where the sample is of one prototype alone, or each tile of its own."""
    from sklearn.metrics import silhouette_score

    if not 2 <= len(np.unique(labels)) < len(x):
        return float("nan")
    return float(silhouette_score(x, labels))
