"""PANTHER: a slide as a mixture of Gaussians around prototypes, fitted by expectation maximisation.

Song, Chen, Ding, Williamson, Jaume, Mahmood: Morphological Prototyping for Unsupervised Slide Representation Learning in
Computational Pathology, CVPR 2024. Each prototype becomes the share of the slide that looks like it (importance π), the
mean of those tiles (μ) and their variance (Σ, diagonal); the prior pulls all three towards the prototype with strength τ.

The defaults are what the published embeddings were made with: ``em_iter=1, tau=0.001, eps=0.1``. The authors' command line
names others (1, 1.0, 1), which never reach their model.

Differs from the published code: sums are kept in float64 about the prototypes' mean, so that Σ, a difference of squares,
does not turn negative; tiles are taken in blocks; ``select_top`` and ``select_bot`` pick for each slide of a batch.
"""

import math
import re
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mil.bag import Bag, Batch
from mil.prototypes.embedder import Embedder
from mil.prototypes.prototypes import Prototypes
from mil.prototypes.rows import Rows
from wsi.errors import UsageError

__all__ = ["Mixture", "Panther"]

_OUTPUTS = ("allcat", "weight_all_cat", "weight_avg_all", "weight_avg_mean", "select_topK", "select_botK")


class Mixture(NamedTuple):
    """Gaussian mixtures of B slides; all float32.

    Attributes:
        importance: (B, K), π: sums to one.
        mean: (B, K, D), μ.
        variance: (B, K, D), Σ, its diagonal.
    """

    importance: Tensor
    mean: Tensor
    variance: Tensor


class _State(NamedTuple):
    """A mixture of one slide in float64, about ``origin``, which is float32."""

    origin: Tensor  # (D,)
    importance: Tensor  # (K,)
    mean: Tensor  # (K, D)
    variance: Tensor  # (K, D)


@dataclass(frozen=True)
class Panther(Embedder):
    """PANTHER's embedding.

    Attributes:
        em_iter: steps of expectation and maximisation.
        tau: strength of the prior, in tiles.
        eps: variance of the prior, in units of the features squared.
        output: ``"allcat"`` [π | μ | Σ]; ``"weight_all_cat"`` [πμ | πΣ]; ``"weight_avg_all"`` and ``"weight_avg_mean"``, their
            sums over prototypes; ``"select_top3"`` and ``"select_bot3"``, the 3 prototypes of most or least importance.

    >>> vectors = Panther().embed(bag, prototypes)
    >>> vectors["importance"], vectors["mean"], vectors["variance"], vectors.vector
    """

    name: ClassVar[str] = "panther"

    em_iter: int = 1
    tau: float = 0.001
    eps: float = 0.1
    output: str = "allcat"

    def __post_init__(self) -> None:
        if self.em_iter < 1 or not 0 < self.tau < math.inf or not 0 < self.eps < math.inf:
            raise UsageError(
                f"panther needs em_iter of 1 or more and tau and eps above 0, not {self.em_iter}, {self.tau:g}, {self.eps:g}"
            )
        if self._selected is None and self.output not in _OUTPUTS[:4]:
            raise UsageError(f"output is one of {', '.join(_OUTPUTS)}, not {self.output!r}")

    def mixture(self, tiles: Batch | Bag | Tensor, prototypes: Prototypes | Tensor) -> Mixture:
        """π, μ and Σ of each bag, whatever ``output`` says; args and errors as for ``embed``."""
        parts = Panther(self.em_iter, self.tau, self.eps).embed(tiles, prototypes)
        return Mixture(parts["importance"], parts["mean"], parts["variance"])

    def slide(self, rows: Rows, centres: Tensor) -> dict[str, Tensor]:
        """The mixture of one slide, as ``output`` says."""
        state = self._prior(centres)
        for _ in range(self.em_iter):
            state = self._step(rows, centres, state)
        pi, mu, sigma = state.importance, state.mean + state.origin, state.variance
        weighted = {"mean": pi[:, None] * mu, "variance": pi[:, None] * sigma}
        if self._selected is not None:
            top, count = self._selected
            if count > len(pi):
                raise UsageError(f"{self.output} asks for more prototypes than the {len(pi)} there are")
            chosen = pi.topk(count, largest=top).indices
            parts = {"importance": pi[chosen], "mean": mu[chosen], "variance": sigma[chosen]}
        elif self.output == "weight_all_cat":
            parts = weighted
        elif self.output == "weight_avg_all":
            parts = {part: value.sum(0) for part, value in weighted.items()}
        elif self.output == "weight_avg_mean":
            parts = {"mean": weighted["mean"].sum(0)}
        else:
            parts = {"importance": pi, "mean": mu, "variance": sigma}
        return {part: value.float() for part, value in parts.items()}

    def memberships(self, rows: Rows, centres: Tensor) -> Tensor:
        """Responsibilities of the last expectation step, as published: before the last maximisation."""
        state = self._prior(centres)
        for _ in range(self.em_iter - 1):
            state = self._step(rows, centres, state)
        return torch.cat([_responsibilities(x - state.origin, state).float() for x in rows])

    @property
    def _selected(self) -> tuple[bool, int] | None:
        """Whether the most important prototypes are selected or the least, and how many; None where all are used."""
        found = re.fullmatch(r"select_(top|bot)(\d*)", self.output)
        if found is None or found[2] == "0":
            return None
        return found[1] == "top", int(found[2] or 1)

    def _prior(self, centres: Tensor) -> _State:
        k = len(centres)
        origin = centres.mean(0)  # the same in every step: sums of squares about it lose few digits
        mean = centres.double() - origin
        return _State(origin, mean.new_full((k,), 1 / k), mean, torch.full_like(mean, self.eps))

    def _step(self, rows: Rows, centres: Tensor, state: _State) -> _State:
        """One expectation and one maximisation, a pass over the tiles."""
        prior = centres.double() - state.origin  # (K, D)
        tiles, sums, squares = (prior.new_zeros(()) for _ in range(3))
        for x in rows:
            y = x - state.origin  # (n, D) float32
            q = _responsibilities(y, state)  # (n, K) float64
            weights = q.T.float()
            tiles = tiles + q.sum(0)  # (K,)
            sums = sums + (weights @ y).double()  # (K, D)
            squares = squares + (weights @ y.square()).double()
        weight = (tiles + self.tau)[:, None]  # (K, 1)
        mean = (sums + self.tau * prior) / weight
        variance = (squares + self.tau * (self.eps + prior.square())) / weight - mean.square()
        # What the prior alone adds is the least that Σ can be; below it lie rounding errors only.
        variance = torch.maximum(variance, self.tau * self.eps / weight)
        return _State(state.origin, weight[:, 0] / weight.sum(), mean, variance)


def _responsibilities(y: Tensor, state: _State) -> Tensor:
    """(n, K) float64: softmax over the prototypes of log π + log N(y; μ, Σ), with the square written out for matmuls.

    In the first step every Σ is one number, what y² adds is the same for all prototypes and drops out. In later steps Σ may
    be minute, and terms that cancel vast: those are computed in float64.
    """
    precision = state.variance.reciprocal()  # (K, D)
    weighted = state.mean * precision
    constant = state.importance.log() - 0.5 * (state.variance.log() + state.mean * weighted).sum(1)  # (K,)
    if bool((state.variance == state.variance[0, 0]).all()):
        return ((y @ weighted.T.float()).double() + constant).softmax(1)
    y = y.double()
    return (y @ weighted.T - 0.5 * y.square() @ precision.T + constant).softmax(1)
