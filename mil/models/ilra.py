"""ILRA-MIL: attention through a few latent vectors, which keeps what tiles can say to each other of low rank.

Xiang, Zhang: Exploring low-rank property in multiple instance learning for whole slide image classification, ICLR 2023,
section 3.3, as its code computes it.
Differs from the code: batched, with padding masked wherever tiles are keys.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.attention import MultiHeadAttention, log_mean_attention
from mil.models.base import MILModel, MILOutput, PublishedState, State, in_chunks, load_published, no_parts

__all__ = ["ILRAMIL"]


class _Projected(NamedTuple):
    residual: Tensor  # (B, M, width)
    q: Tensor  # (B, heads, M, ·)
    k: Tensor  # (B, heads, N, ·)
    v: Tensor  # (B, heads, N, ·)


class _AttentionBlock(nn.Module):
    """The code's MAB(Q, K): O = q + Attention(q, k, v), [LN], O + ReLU(Linear(O)), [LN], [O ⊙ SiLU(Linear(Q))]."""

    def __init__(self, query_dim: int, key_dim: int, width: int, heads: int, *, gated: bool, norm: bool) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, width)
        self.key = nn.Linear(key_dim, width)
        self.value = nn.Linear(key_dim, width)
        self.attention = MultiHeadAttention(width, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))
        self.output = nn.Linear(width, width)
        self.gate = nn.Linear(query_dim, width) if gated else None

    def project(self, query: Tensor, key: Tensor) -> _Projected:
        """Q (B, M, query_dim), K (B, N, key_dim): what attention is made of."""
        q = self.query(query)
        return _Projected(q, *self.attention.project(q, in_chunks(self.key, key), in_chunks(self.value, key)))

    def respond(self, query: Tensor, projected: _Projected, mask: Tensor | None) -> Tensor:
        """What becomes of Q (B, M, query_dim), mask of the keys (B, N) → (B, M, width)."""
        o = self.norms[0](projected.residual + self.attention.attend(*projected[1:], mask))
        o = self.norms[1](o + F.relu(self.output(o)))
        result: Tensor = o if self.gate is None else o * F.silu(self.gate(query))
        return result

    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Q (B, M, query_dim), K (B, N, key_dim), mask of the keys (B, N) → (B, M, width)."""
        return in_chunks(lambda part: self.respond(part, self.project(part, key), mask), query)


class _LowRankLayer(nn.Module):
    """The code's GAB: latents ask the tiles, tiles ask the latents, both gated."""

    def __init__(self, dim: int, width: int, heads: int, rank: int, *, norm: bool) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.empty(1, rank, width))
        self.gather = _AttentionBlock(width, dim, width, heads, gated=True, norm=norm)
        self.spread = _AttentionBlock(dim, width, width, heads, gated=True, norm=norm)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tiles (B, N, dim), mask (B, N) → (B, N, width)."""
        latents = self.gather(self.latent.expand(len(x), -1, -1), x, mask)  # (B, rank, width)
        result: Tensor = self.spread(x, latents)
        return result


class ILRAMIL(MILModel):
    """Low-rank layers, then attention of one learned query; its weights, mean over heads, are the attention.

    Args:
        width: of all tokens.
        heads: of all attention.
        rank: number of latent vectors (the code's topk; 2 there, 64 in MIL-Lab).
        depth: number of low-rank layers.
        norm: LayerNorm in the blocks.
    """

    learning_rate = 2e-4

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        width: int = 256,
        heads: int = 8,
        rank: int = 2,
        depth: int = 2,
        norm: bool = False,
    ) -> None:
        super().__init__(dim, n_classes)
        self.layers = nn.ModuleList(
            _LowRankLayer(width if index else dim, width, heads, rank, norm=norm) for index in range(depth)
        )
        self.slide_query = nn.Parameter(torch.empty(1, 1, width))
        self.pooling = _AttentionBlock(width, width, width, heads, gated=False, norm=norm)
        self.classifier = nn.Linear(width, n_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
            elif isinstance(layer, _LowRankLayer):
                nn.init.xavier_uniform_(layer.latent)
        nn.init.xavier_uniform_(self.slide_query)

    def forward(self, batch: Batch) -> MILOutput:
        """Low-rank layers, non-local pooling, classifier."""
        x = batch.features
        for layer in self.layers:
            x = layer(x, batch.mask)  # (B, N, width)
        query = self.slide_query.expand(len(batch), -1, -1)  # (B, 1, width)
        projected = self.pooling.project(query, x)
        embedding = self.pooling.respond(query, projected, batch.mask).squeeze(1)  # (B, width)
        logits = self.classifier(embedding)  # (B, C)
        scores = log_mean_attention(projected.q, projected.k, batch.mask)  # (B, 1, N)
        return MILOutput(logits, scores.softmax(-1), scores, embedding, no_parts(logits))

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layouts of the ILRA repository and of MIL-Lab; ``heads`` cannot be told from it."""
        found = PublishedState(state)
        depth = found.count("gab_blocks.{}.")
        attention = "multihead_attention" if found.has("pooling.mha.multihead_attention.") else "multihead_attn"
        names = {"slide_query": "pooling.S"}
        blocks = {"pooling": "pooling.mha"}
        for index in range(depth):
            names[f"layers.{index}.latent"] = f"gab_blocks.{index}.latent"
            blocks[f"layers.{index}.gather"] = f"gab_blocks.{index}.project_forward"
            blocks[f"layers.{index}.spread"] = f"gab_blocks.{index}.project_backward"
        for ours, theirs in blocks.items():
            names |= {
                f"{ours}.query": f"{theirs}.fc_q",
                f"{ours}.key": f"{theirs}.fc_k",
                f"{ours}.value": f"{theirs}.fc_v",
                f"{ours}.output": f"{theirs}.fc_o",
                f"{ours}.gate": f"{theirs}.gate.0",
                f"{ours}.norms.0": f"{theirs}.ln0",
                f"{ours}.norms.1": f"{theirs}.ln1",
                f"{ours}.attention.qkv.weight": f"{theirs}.{attention}.in_proj_weight",
                f"{ours}.attention.qkv.bias": f"{theirs}.{attention}.in_proj_bias",
                f"{ours}.attention.out": f"{theirs}.{attention}.out_proj",
            }
        latent = found["gab_blocks.0.latent"]
        model = cls(
            found["gab_blocks.0.project_forward.fc_k.weight"].shape[1],
            len(found["classifier.weight"]),
            width=latent.shape[-1],
            rank=latent.shape[-2],
            depth=depth,
            norm=found.has("pooling.mha.ln0."),
            **hyper,
        )
        return load_published(model, found, names)
