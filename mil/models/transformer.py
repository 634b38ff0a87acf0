"""Transformer MIL: full attention between the tiles and a class token, without places.

Vaswani et al.: Attention is all you need, NeurIPS 2017, pre-norm, in the form and with the defaults of MIL-Lab.
Differs from MIL-Lab: any batch size; padding is masked; asking for attention never changes the logits; of the last layer
only the class token is computed.
"""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.attention import MultiHeadAttention, log_mean_attention
from mil.models.base import (
    MILModel,
    MILOutput,
    PublishedState,
    State,
    in_chunks,
    load_published,
    no_parts,
)

__all__ = ["TransformerMIL"]


class _Block(nn.Module):
    """Pre-norm attention with a residual, and, if ``mlp_dim``, LN-Linear-ReLU-Dropout-Linear-ReLU with another."""

    def __init__(self, width: int, heads: int, mlp_dim: int | None, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, heads, dropout=dropout)
        self.mlp: nn.Sequential | None = None
        if mlp_dim is not None:
            self.mlp = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, mlp_dim),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(mlp_dim, width),
                nn.ReLU(),
            )

    def forward(self, tokens: Tensor, mask: Tensor, n_first: int | None = None) -> Tensor:
        """Tokens (B, 1 + N, width), mask (B, 1 + N) → the same, or no more than the first ``n_first`` tokens."""
        q, k, v = self.project(tokens)
        tokens = tokens[:, :n_first] + self.attention.attend(q[..., :n_first, :], k, v, mask)
        return tokens if self.mlp is None else tokens + in_chunks(self.mlp, tokens)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.norm(tokens)
        return self.attention.project(normed, normed, normed)


class TransformerMIL(MILModel):
    """Class token of a small transformer; attention is what it pays to the tiles in the last layer, mean over heads.

    Args:
        width: of the tokens.
        depth: number of layers.
        heads: of the attention.
        mlp_dim: hidden width of the layers' MLP; None for layers without one.
        dropout: of attention weights and in the MLP.
    """

    quadratic = True
    learning_rate = 2e-4

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        width: int = 512,
        depth: int = 2,
        heads: int = 8,
        mlp_dim: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(dim, n_classes)
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_dim, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, batch: Batch) -> MILOutput:
        """Class token and tiles through the layers; the class token is the slide."""
        tokens = torch.cat([self.class_token.expand(len(batch), -1, -1), in_chunks(self.embed, batch.features)], dim=1)
        mask = torch.cat([torch.ones_like(batch.mask[:, :1]), batch.mask], dim=1)  # (B, 1 + N)
        for block in self.blocks[:-1]:
            tokens = block(tokens, mask)  # (B, 1 + N, width)
        last = cast(_Block, self.blocks[-1])
        embedding = self.norm(last(tokens, mask, n_first=1)).squeeze(1)  # (B, width)
        logits = self.classifier(embedding)  # (B, C)
        q, k, _ = last.project(tokens)
        scores = log_mean_attention(q[..., :1, :], k[..., 1:, :], batch.mask)  # (B, 1, N)
        return MILOutput(logits, scores.softmax(-1), scores, embedding, no_parts(logits))

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of MIL-Lab; ``heads`` cannot be told from it."""
        found = PublishedState(state)
        width, dim = found["patch_embed.0.weight"].shape
        depth = found.count("blocks.{}.")
        mlp_dim = len(found["blocks.0.mlp.0.weight"]) if found.has("blocks.0.mlp.") else None
        names = {"embed": "patch_embed", "class_token": "cls_token"}
        for index in range(depth):
            names |= {
                f"blocks.{index}.attention.qkv.weight": f"blocks.{index}.attention.in_proj_weight",
                f"blocks.{index}.attention.qkv.bias": f"blocks.{index}.attention.in_proj_bias",
                f"blocks.{index}.attention.out": f"blocks.{index}.attention.out_proj",
                f"blocks.{index}.mlp.0": f"blocks.{index}.norm2",
                f"blocks.{index}.mlp.1": f"blocks.{index}.mlp.0",
                f"blocks.{index}.mlp.4": f"blocks.{index}.mlp.3",
            }
        model = cls(dim, len(found["classifier.weight"]), width=width, depth=depth, mlp_dim=mlp_dim, **hyper)
        return load_published(model, found, names)
