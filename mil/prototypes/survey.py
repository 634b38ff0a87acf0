"""Survey: how much of each prototype the slides of a cohort have, and which tiles are nearest to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mil.prototypes.prototypes import Prototypes
from mil.prototypes.rows import Rows, ScaledRows
from mil.prototypes.tiles import HasSlides, rows_of
from mil.sources import BagSource
from wsi.errors import UsageError

__all__ = ["NearTile", "Survey", "assigned_tiles", "survey_slides"]


class NearTile(NamedTuple):
    """A tile that stands for a prototype.

    Attributes:
        slide: name, as the source knows it.
        row: of the slide's bag.
        distance: to the prototype, Euclidean, in the prototypes' scale.
    """

    slide: str
    row: int
    distance: float


@dataclass(frozen=True, eq=False)
class Survey:
    """What a cohort is made of.

    Attributes:
        prototypes: what tiles were compared with; each tile belongs to the nearest.
        slides: (S,) names.
        n_tiles: (S,) tiles of each slide.
        shares: (S, K) share of a slide's tiles that belong to each prototype; rows sum to one.
        nearest: for each prototype, those of its tiles that are nearest to it, nearest first, from different slides.
    """

    prototypes: Prototypes
    slides: tuple[str, ...]
    n_tiles: NDArray[np.int64]
    shares: NDArray[np.float64]
    nearest: tuple[tuple[NearTile, ...], ...]

    @property
    def total(self) -> NDArray[np.float64]:
        """(K,) share of all slides' tiles; a large slide counts for more."""
        return np.asarray(self.n_tiles @ self.shares / self.n_tiles.sum())

    def __repr__(self) -> str:
        return f"<Survey of {len(self.slides)} slides, {self.n_tiles.sum()} tiles, {self.prototypes.k} prototypes>"


def survey_slides(
    slides: HasSlides,
    prototypes: Prototypes,
    *,
    n_near: int = 12,
    per_slide: int = 1,
    done: Callable[[str], None] | None = None,
) -> Survey:
    """Read every slide once and say what it is made of. Memory grows with slides times prototypes, not with tiles.

    Args:
        n_near: tiles to name for each prototype.
        per_slide: how many of them one slide may give.
        done: is told each slide that has been read.

    Raises:
        RunMismatchError: the features are not those that the prototypes were fitted on.
        UsageError: fewer than one tile is asked for.
    """
    if min(n_near, per_slide) < 1:
        raise UsageError(f"n_near and per_slide are whole numbers from 1, not {n_near} and {per_slide}")
    prototypes.check(slides.source.facts, where="the slides")
    k = prototypes.k
    counts = np.zeros((len(slides.slides), k), np.int64)
    near: list[list[NearTile]] = [[] for _ in range(k)]
    for index, slide in enumerate(slides.slides):
        own, distance = assigned_tiles(slides.source, slide, prototypes)
        counts[index] = np.bincount(own, minlength=k)
        for number in range(k):
            rows = np.flatnonzero(own == number)
            rows = rows[np.argsort(distance[rows], kind="stable")[:per_slide]]
            near[number] += [NearTile(slide, int(row), float(distance[row])) for row in rows]
            near[number] = sorted(near[number], key=lambda tile: (tile.distance, tile.slide, tile.row))[:n_near]
        if done is not None:
            done(slide)
    n_tiles = counts.sum(axis=1)
    return Survey(prototypes, tuple(slides.slides), n_tiles, counts / n_tiles[:, None], tuple(map(tuple, near)))


def assigned_tiles(
    source: BagSource, slide: str, prototypes: Prototypes
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest prototype of each tile of a slide's bag (N,), and the distance to it (N,)."""
    rows, centres = rows_of(source, slide), prototypes.tensor
    if prototypes.scale_tensor is not None:
        rows, centres = ScaledRows(rows, prototypes.scale_tensor), centres / prototypes.scale_tensor
    index, distance = zip(*_nearest(rows, centres), strict=True)
    return torch.cat(index).numpy(), torch.cat(distance).numpy()


def _nearest(rows: Rows, centres: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    origin = centres.mean(0)
    m = centres - origin
    for block in rows:
        y = block - origin
        own = (m.square().sum(1) - 2 * y @ m.T).argmin(1)
        yield own, (y - m[own]).norm(dim=1)  # of the difference itself: squares that cancel lose digits
