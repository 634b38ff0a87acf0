"""ProtoCounts: how many of a slide's tiles are nearest to each prototype, as a vector of length one.

Baseline of Song et al. (PANTHER), CVPR 2024; a bag of visual words. Differs from the published code: any number of slides
in a batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mil.prototypes.embedder import Embedder, hard_assignment, one_hot
from mil.prototypes.rows import Rows

__all__ = ["ProtoCounts"]


@dataclass(frozen=True)
class ProtoCounts(Embedder):
    """Counts by Euclidean distance to the prototypes, divided by their norm: (K,)."""

    name: ClassVar[str] = "protocounts"

    def slide(self, rows: Rows, centres: Tensor) -> dict[str, Tensor]:
        """Counts of one slide."""
        counts = self.memberships(rows, centres).sum(0, dtype=torch.float64)
        return {"counts": (counts / counts.norm()).float()}

    def memberships(self, rows: Rows, centres: Tensor) -> Tensor:
        """One for the nearest prototype."""
        return torch.cat([one_hot(hard_assignment(x, centres), len(centres)) for x in rows])
