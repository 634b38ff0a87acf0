"""PANTHER's heads: a linear classifier, or a network for each prototype, on the mixture that mil/prototypes/panther.py fits.

Song, Chen, Ding, Williamson, Jaume, Mahmood: Morphological Prototyping for Unsupervised Slide Representation Learning in
Computational Pathology, CVPR 2024.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from mil.models.base import State
from mil.models.prototypes import PrototypeMIL
from mil.prototypes.embedder import SlideVectors
from mil.prototypes.panther import Panther
from wsi.errors import ModelMismatchError

__all__ = ["PantherMIL", "PantherMLP"]


class PantherMIL(PrototypeMIL):
    """A linear classifier on [π | μ | Σ], or on another output.

    Args:
        k: prototypes, fitted on the training bags.
        em_iter, tau, eps, output: of ``mil.prototypes.Panther``.
    """

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        k: int = 16,
        em_iter: int = 1,
        tau: float = 0.001,
        eps: float = 0.1,
        output: str = "allcat",
    ) -> None:
        super().__init__(dim, n_classes, Panther(em_iter, tau, eps, output), k)


class PantherMLP(PrototypeMIL):
    """The published IndivMLPEmb, which the published code cannot build: (π, μ, Σ) of each prototype through networks.

    Every stage is Linear, ReLU, dropout; a width of None leaves the stage out.

    Args:
        k: prototypes, fitted on the training bags.
        shared: width of one network for all prototypes.
        individual: width of a network for each prototype.
        joint: width of a network on all of them, one after the other.
        em_iter, tau, eps: of ``mil.prototypes.Panther``.
    """

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        k: int = 16,
        shared: int | None = 256,
        individual: int | None = 128,
        joint: int | None = 1024,
        dropout: float = 0.1,
        em_iter: int = 1,
        tau: float = 0.001,
        eps: float = 0.1,
    ) -> None:
        token = 2 * dim + 1
        of_each = shared or token
        together = k * (individual or of_each)
        super().__init__(dim, n_classes, Panther(em_iter, tau, eps), k, joint or together)
        self.shared = _stage(token, shared, dropout)
        self.individual = nn.ModuleList(_stage(of_each, individual, dropout) for _ in range(k))
        self.joint = _stage(together, joint, dropout)

    def slide_features(self, vectors: SlideVectors) -> Tensor:
        """The networks on each prototype's (π, μ, Σ)."""
        tokens = torch.cat(
            [vectors["importance"][..., None], vectors["mean"], vectors["variance"]], -1
        )  # (B, K, 2D + 1)
        h = self.shared(tokens)  # (B, K, shared)
        each = [network(h[:, index]) for index, network in enumerate(self.individual)]
        joint: Tensor = self.joint(torch.cat(each, dim=1))  # (B, joint)
        return joint

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """There are no published weights.

        Raises:
            ModelMismatchError: always.
        """
        raise ModelMismatchError("the published code cannot build this head, so there are no weights of it; train it")


def _stage(width: int, hidden: int | None, dropout: float) -> nn.Module:
    return nn.Identity() if hidden is None else nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout))
