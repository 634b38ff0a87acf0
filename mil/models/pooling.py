"""Mean and maximum over the tiles, and the linear probe: the baselines that attention has to beat.

Ilse, Tomczak, Welling: Attention-based Deep MIL, ICML 2018, equations 4 and 5 (on embeddings).
Differs from the paper: the mean is over real tiles only, whatever the padding.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.base import (
    MILModel,
    MILOutput,
    PublishedState,
    State,
    in_chunks,
    load_published,
    masked_softmax,
    no_parts,
    pool,
)

__all__ = ["LinearProbe", "MaxMIL", "MeanMIL"]


class _PoolingMIL(MILModel):
    """What mean and maximum share: an optional embedding before, a linear classifier after.

    Args:
        embed_dim: width of ReLU(Linear(x)) before pooling; None pools the features themselves.
        dropout: after the embedding.
    """

    def __init__(self, dim: int, n_classes: int, *, embed_dim: int | None = 512, dropout: float = 0.25) -> None:
        super().__init__(dim, n_classes)
        self.embed: nn.Module = nn.Identity()
        if embed_dim is not None:
            self.embed = nn.Sequential(nn.Linear(dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(embed_dim or dim, n_classes)

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of MIL-Lab: ``patch_embed.0`` (may be absent), ``classifier``."""
        found = PublishedState(state)
        n_classes, width = found["classifier.weight"].shape
        if not found.has("patch_embed."):
            return load_published(cls(width, n_classes, embed_dim=None, **hyper), found, {})
        model = cls(found["patch_embed.0.weight"].shape[1], n_classes, embed_dim=width, **hyper)
        return load_published(model, found, {"embed": "patch_embed"})


class MeanMIL(_PoolingMIL):
    """The mean over the tiles; attention is uniform, scores are zero."""

    def forward(self, batch: Batch) -> MILOutput:
        """One linear classifier on the mean of the embedded tiles."""
        return _mean_pooled(in_chunks(self.embed, batch.features, mask=batch.mask), batch.mask, self.classifier)


class MaxMIL(_PoolingMIL):
    """The largest value of each feature over the tiles.

    Attention of a tile is the share of the features which it gives the maximum of (ties: the first tile): it sums to
    one, and tiles that do not touch the result have none. Scores are its logarithm. No gradient flows through either.
    """

    def forward(self, batch: Batch) -> MILOutput:
        """One linear classifier on the maximum of the embedded tiles."""
        h = in_chunks(self.embed, batch.features, mask=batch.mask)  # (B, N, E)
        embedding, winner = h.masked_fill(~batch.mask[..., None], -torch.inf).max(1)  # (B, E), (B, E)
        wins = torch.zeros_like(batch.mask, dtype=torch.float32).scatter_add(1, winner, torch.ones_like(embedding))
        scores, attention = masked_softmax((wins / h.shape[-1]).log()[:, None], batch.mask)  # (B, 1, N)
        logits = self.classifier(embedding)  # (B, C)
        return MILOutput(logits, attention, scores, embedding, no_parts(logits))


class LinearProbe(MILModel):
    """A linear classifier on the mean of the features: what the encoder alone can do."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__(dim, n_classes)
        self.classifier = nn.Linear(dim, n_classes)

    def forward(self, batch: Batch) -> MILOutput:
        """Linear(mean of the tiles)."""
        return _mean_pooled(batch.features, batch.mask, self.classifier)

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of ``nn.Linear``: ``weight``, ``bias``."""
        found = PublishedState(state)
        n_classes, dim = found["weight"].shape
        return load_published(
            cls(dim, n_classes, **hyper), found, {"classifier.weight": "weight", "classifier.bias": "bias"}
        )


def _mean_pooled(h: Tensor, mask: Tensor, classifier: nn.Linear) -> MILOutput:
    scores, attention = masked_softmax(torch.zeros_like(mask, dtype=torch.float32)[:, None], mask)  # (B, 1, N)
    embedding = pool(attention, h).squeeze(1)  # (B, E)
    logits = classifier(embedding)  # (B, C)
    return MILOutput(logits, attention, scores, embedding, no_parts(logits))
