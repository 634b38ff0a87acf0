"""Gated attention pooling.

Ilse, Tomczak, Welling: Attention-based Deep MIL, ICML 2018, equations 8 and 9.
"""

import torch
from torch import nn

from mil.bag import Batch
from mil.models.base import MILModel, MILOutput

__all__ = ["ABMIL"]


class ABMIL(MILModel):
    """Gated attention over embedded tiles."""

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        width: int = 256,
        hidden: int = 128,
        dropout: float = 0.25,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.content = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden) if gated else None
        self.score = nn.Linear(hidden, 1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, n_classes)

    def forward(self, batch: Batch) -> MILOutput:
        x = self.embed(batch.features)
        h = torch.tanh(self.content(x))
        if self.gate is not None:
            h = h * torch.sigmoid(self.gate(x))
        scores = self.score(self.drop(h)).squeeze(-1).float().masked_fill(~batch.mask, -torch.inf)
        attention = scores.softmax(-1)
        slide = torch.einsum("bn,bnd->bd", attention, x.float())
        return MILOutput(self.head(slide), attention[:, None], scores[:, None], slide)
