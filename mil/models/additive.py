"""Additive MIL: the slide's logits are the sum of what each tile contributes.

Javed, Juyal, Padigela, Taylor-Weiner, Yu, Prakash: Additive MIL: intrinsically interpretable multiple instance learning
for pathology, NeurIPS 2022, equation 4, with the attention and classifier networks of the xMIL code.
Differs from it: padding takes part neither in the sums nor in the statistics of the batch norm. In training the batch
norm still sees all real tiles of a batch together, as the authors' does.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.base import MILModel, MILOutput, PublishedState, State, in_chunks, load_published, masked_softmax, pool

__all__ = ["AdditiveMIL"]


class AdditiveMIL(MILModel):
    """Tile contributions that add up; ``part_logits`` (B, N, C) are the contributions, 0 at padding.

    Args:
        attention_dim: width of the two hidden layers of the attention.
        hidden_dim: width of the two hidden layers of the classifier.
    """

    def __init__(self, dim: int, n_classes: int, *, attention_dim: int = 256, hidden_dim: int = 256) -> None:
        super().__init__(dim, n_classes)
        self.attention = nn.Sequential(
            nn.Linear(dim, attention_dim),
            _TileNorm(attention_dim),
            nn.LeakyReLU(0.2),
            nn.Linear(attention_dim, attention_dim),
            _TileNorm(attention_dim),
            nn.LeakyReLU(0.2),
            nn.Linear(attention_dim, 1),
        )
        self.classifier = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, n_classes),
        )

    def forward(self, batch: Batch) -> MILOutput:
        """Equation 4: a tile's contribution is the classifier's answer to the tile times its attention."""
        x = batch.features[batch.mask][None]  # (1, M, D), the real tiles of all bags
        of_tiles = in_chunks(lambda part: self.attention(part.squeeze(0))[None], x)  # (1, M, 1)
        scores = of_tiles.new_full(batch.mask.shape, -torch.inf).masked_scatter(batch.mask, of_tiles)  # (B, N)
        scores, attention = masked_softmax(scores[:, None], batch.mask)  # (B, 1, N)
        weights = attention.squeeze(1)[batch.mask][None, :, None]  # (1, M, 1)
        contributions = in_chunks(lambda part, weight: self.classifier(weight * part), x, weights)  # (1, M, C)
        parts = contributions.new_zeros((*batch.mask.shape, self.n_classes))
        parts = parts.masked_scatter(batch.mask[..., None], contributions)  # (B, N, C)
        return MILOutput(parts.sum(1), attention, scores, pool(attention, batch.features).squeeze(1), parts)

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of xMIL: ``pointer.model``, ``classifier.model``."""
        found = PublishedState(state)
        attention_dim, dim = found["pointer.model.0.weight"].shape
        hidden_dim, n_classes = len(found["classifier.model.0.weight"]), len(found["classifier.model.4.weight"])
        model = cls(dim, n_classes, attention_dim=attention_dim, hidden_dim=hidden_dim, **hyper)
        return load_published(model, found, {"attention": "pointer.model", "classifier": "classifier.model"})


class _TileNorm(nn.BatchNorm1d):
    """Batch norm over tiles (M, D) that in training takes the running statistics where there is but one tile."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)
