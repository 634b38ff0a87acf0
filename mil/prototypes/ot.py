"""OT: each prototype gets an equal part of the slide's tiles, moved there at the least cost, and is their mean.

Mialon, Chen, d'Aspremont, Mairal: A Trainable Optimal Transport Embedding for Feature Aggregation (OTKE), ICLR 2021; the
baseline of Song et al. (PANTHER), CVPR 2024.

Differs from the published code: near prototypes attract, as in the paper (``published_sign=True`` gives the code's sign, by
which far ones do); Sinkhorn's iteration runs on logarithms, where the code's default of ``eps=0.1`` overflows float32.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mil.prototypes.embedder import Embedder
from mil.prototypes.rows import Rows
from wsi.errors import UsageError

__all__ = ["OptimalTransport"]


@dataclass(frozen=True)
class OptimalTransport(Embedder):
    """Means of tiles under a transport plan whose columns sum to one and rows to K/N: (K, D).

    Attributes:
        eps: strength of the entropy, in units of distance; the smaller, the harder the assignment.
        iterations: of Sinkhorn, at most; fewer where nothing changes any more.
        published_sign: far prototypes attract, for parity with the published code.
    """

    name: ClassVar[str] = "ot"

    eps: float = 0.1
    iterations: int = 100
    published_sign: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf or self.iterations < 1:
            raise UsageError(f"ot needs eps above 0 and at least one iteration, not {self.eps:g}, {self.iterations}")

    def slide(self, rows: Rows, centres: Tensor) -> dict[str, Tensor]:
        """Transported means of one slide."""
        return _means(rows, self.plan(rows, centres))

    def memberships(self, rows: Rows, centres: Tensor) -> Tensor:
        """Rows of the plan, each divided by its sum."""
        return _shares(self.plan(rows, centres))

    def both(self, rows: Rows, centres: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Both from one plan."""
        plan = self.plan(rows, centres)
        return _means(rows, plan), _shares(plan)

    def plan(self, rows: Rows, centres: Tensor) -> Tensor:
        """(N, K) float64 transport plan."""
        distance = torch.cat([_distances(x, centres) for x in rows])  # (N, K)
        kernel = distance / self.eps if self.published_sign else -distance / self.eps  # its logarithm
        n, k = kernel.shape
        v = kernel.new_zeros(k)
        for _ in range(self.iterations):
            u = math.log(k / n) - (kernel + v).logsumexp(1)  # (N,)
            before, v = v, -(kernel + u[:, None]).logsumexp(0)  # (K,)
            if float((v - before).detach().abs().max()) < 1e-10:
                break
        return (u[:, None] + kernel + v).exp()


def _means(rows: Rows, plan: Tensor) -> dict[str, Tensor]:
    total, start = plan.new_zeros(()), 0
    for x in rows:
        total = total + (plan[start : start + len(x)].T.float() @ x).double()  # (K, D)
        start += len(x)
    return {"mean": total.float()}


def _shares(plan: Tensor) -> Tensor:
    return (plan / plan.sum(1, keepdim=True)).float()


def _distances(x: Tensor, centres: Tensor) -> Tensor:
    """(n, K) Euclidean distances in float64, by matmul about the centres' mean."""
    origin = centres.mean(0)
    y, m = (x - origin).double(), (centres - origin).double()
    squares = y.square().sum(1, keepdim=True) + m.square().sum(1) - 2 * y @ m.T
    return squares.clamp(min=1e-12).sqrt()  # not zero, where the root has no slope
