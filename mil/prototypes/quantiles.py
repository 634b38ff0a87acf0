"""Quantiles: of each feature over a slide's tiles; a fixed deep set, which sees rare tiles where a mean does not.

Zaheer et al.: Deep Sets, NeurIPS 2017, with order statistics in place of the sum.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mil.prototypes.embedder import Embedder
from mil.prototypes.rows import Rows
from wsi.errors import UsageError

__all__ = ["Quantiles"]

_COLUMNS = 64  # sorted at once


@dataclass(frozen=True)
class Quantiles(Embedder):
    """Quantiles of each feature, with values between two tiles interpolated linearly: (Q, D).

    The tiles are held in memory, in the precision in which they are kept, as sorting needs all of them.
    """

    name: ClassVar[str] = "quantiles"
    needs_prototypes: ClassVar[bool] = False

    levels: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or not all(0 <= level <= 1 for level in self.levels):
            raise UsageError(f"levels of quantiles lie from 0 to 1, not {self.levels}")

    def slide(self, rows: Rows, centres: Tensor) -> dict[str, Tensor]:
        """Quantiles of one slide."""
        x = rows.whole()  # (N, D)
        places = torch.tensor(self.levels, dtype=torch.float64) * (len(x) - 1)
        below = places.floor().long()
        above = (below + 1).clamp(max=len(x) - 1)
        share = (places - below)[:, None].float().to(x.device)  # (Q, 1)
        found = []
        for start in range(0, x.shape[1], _COLUMNS):
            ordered = x[:, start : start + _COLUMNS].float().sort(0).values  # (N, n)
            found.append(torch.lerp(ordered[below.to(x.device)], ordered[above.to(x.device)], share))
        return {"quantiles": torch.cat(found, dim=1)}

    def memberships(self, rows: Rows, centres: Tensor) -> Tensor:
        """All tiles are alike."""
        return centres.new_ones((len(rows), 1))
