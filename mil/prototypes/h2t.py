"""H2T: for each prototype the mean of the tiles that are nearest to it, all on the unit sphere.

Vu, Rajpoot, Raza, Rajpoot: Handcrafted Histological Transformer (H2T), Medical Image Analysis 2023; the baseline of Song et
al. (PANTHER), CVPR 2024. Differs from the published code: any number of slides in a batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mil.prototypes.embedder import Embedder, hard_assignment, one_hot
from mil.prototypes.rows import Rows

__all__ = ["H2T"]


@dataclass(frozen=True)
class H2T(Embedder):
    """Means of normalised tiles by nearest normalised prototype, zeros for a prototype without tiles: (K, D)."""

    name: ClassVar[str] = "h2t"

    def slide(self, rows: Rows, centres: Tensor) -> dict[str, Tensor]:
        """Means of one slide."""
        unit = F.normalize(centres, dim=1)
        tiles, sums = (unit.new_zeros((), dtype=torch.float64) for _ in range(2))
        for x in rows:
            y = F.normalize(x, dim=1)  # (n, D)
            q = one_hot(hard_assignment(y, unit), len(unit))  # (n, K)
            tiles = tiles + q.sum(0, dtype=torch.float64)
            sums = sums + (q.T @ y).double()
        return {"mean": (sums / tiles.clamp(min=1)[:, None]).float()}

    def memberships(self, rows: Rows, centres: Tensor) -> Tensor:
        """One for the nearest prototype."""
        unit = F.normalize(centres, dim=1)
        return torch.cat([one_hot(hard_assignment(F.normalize(x, dim=1), unit), len(unit)) for x in rows])
