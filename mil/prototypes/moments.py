"""Moments: mean, and mean and variance, of a slide's tiles: the baselines without prototypes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mil.prototypes.embedder import Embedder
from mil.prototypes.rows import Rows

__all__ = ["Mean", "MeanVariance"]


@dataclass(frozen=True)
class Mean(Embedder):
    """The mean of the tiles: (D,)."""

    name: ClassVar[str] = "mean"
    needs_prototypes: ClassVar[bool] = False

    def slide(self, rows: Rows, centres: Tensor) -> dict[str, Tensor]:
        """Mean of one slide."""
        return {"mean": _moments(rows)[0].float()}

    def memberships(self, rows: Rows, centres: Tensor) -> Tensor:
        """All tiles are alike."""
        return centres.new_ones((len(rows), 1))


@dataclass(frozen=True)
class MeanVariance(Mean):
    """Mean and variance (of the slide itself, not of a population it is a sample of) of the tiles: (D,) each."""

    name: ClassVar[str] = "mean-variance"

    def slide(self, rows: Rows, centres: Tensor) -> dict[str, Tensor]:
        """Mean and variance of one slide."""
        mean, variance = _moments(rows)
        return {"mean": mean.float(), "variance": variance.float()}


def _moments(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) in float64, block by block (Chan, Golub, LeVeque 1979)."""
    n, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for x in rows:
        there = x.mean(0, dtype=torch.float64)  # (D,)
        delta, total = there - mean, n + len(x)
        spread = (x - there.float()).square().sum(0, dtype=torch.float64)
        squares = spread + squares + delta.square() * (n * len(x) / total)
        mean, n = mean + delta * (len(x) / total), total
    return mean, squares / n
