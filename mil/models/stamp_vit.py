"""The vision transformer over tiles of STAMP, with or without distances between tiles.

El Nahhas, van Treeck, Wölflein et al.: From whole-slide image to biomarker prediction: end-to-end weakly supervised deep
learning in computational pathology, Nature Protocols 2025; the layers as its code computes them.
Differs from the code: padding is masked as a key, where there it takes part in attention; the mean distance is over pairs
of real tokens; of the last layer only the class token is computed.
"""

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.attention import MultiHeadAttention, log_mean_attention, merge_heads, split_heads
from mil.models.base import MILModel, MILOutput, PublishedState, State, in_chunks, load_published, no_parts
from wsi.errors import UsageError

__all__ = ["STAMPViT"]

_PAIRS_AT_ONCE = 1 << 23  # distances held at once: 32 MiB


class _DistancePenalty(nn.Module):
    """What distance takes from attention weights: each head's scale times the distance in units of the mean distance.

    The mean is over what was seen in training; there is one for each head as in the code, whose checkpoints have it so.
    """

    mean_distance: Tensor
    batches_seen: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(heads))
        self.register_buffer("mean_distance", torch.ones(heads))
        self.register_buffer("batches_seen", torch.zeros(heads))

    def forward(self, v: Tensor, places: Tensor, mask: Tensor, n_first: int | None = None) -> Tensor:
        """Values (B, heads, N, ·), places (B, N, 2), mask (B, N) → Σⱼ penalty(i, j) vⱼ for all or the first few i."""
        if self.training:
            self._see(places, mask)
        values = merge_heads(v * mask[:, None, :, None])  # (B, N, width)
        rows = torch.split(places[:, :n_first], max(1, _PAIRS_AT_ONCE // mask.numel()), dim=1)
        taken = torch.cat([_distances(part, places) @ values for part in rows], dim=1)  # (B, n, width)
        return split_heads(taken, v.shape[1]) * (self.scale / self.mean_distance)[:, None, None]

    @torch.no_grad()
    def _see(self, places: Tensor, mask: Tensor) -> None:
        distances = [_distances(of_bag[real], of_bag[real]) for of_bag, real in zip(places, mask, strict=True)]
        mean = torch.cat([d.flatten() for d in distances]).mean()
        if mean > 0:
            self.mean_distance.mul_(self.batches_seen).add_(mean).div_(self.batches_seen + 1)
            self.batches_seen += 1


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (…, M, N) of places (…, M, 2), (…, N, 2); not by way of products, which lose a tile's width of a slide."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class _Layer(nn.Module):
    """Pre-norm attention, less the distance penalty between tiles, and LN-Linear-GELU-Linear; both with residuals."""

    def __init__(
        self, width: int, heads: int, mlp_dim: int, dropout: float, mlp_dropout: float, *, distances: bool
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, heads, dropout=dropout)
        self.penalty = _DistancePenalty(heads) if distances else None
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, mlp_dim),
            nn.GELU(),
            nn.Dropout(mlp_dropout),
            nn.Linear(mlp_dim, width),
            nn.Dropout(mlp_dropout),
        )

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens (B, N, width), each (B, heads, N, ·)."""
        normed = self.norm(tokens)
        return self.attention.project(normed, normed, normed)

    def forward(self, tokens: Tensor, mask: Tensor, places: Tensor | None, n_first: int | None = None) -> Tensor:
        """Tokens (B, N, width), mask (B, N), places (B, N, 2) → the same tokens, or no more than the first few."""
        q, k, v = self.project(tokens)
        mixed = self.attention.mix(q[..., :n_first, :], k, v, mask)  # (B, heads, n, ·)
        if self.penalty is not None and places is not None:
            mixed = mixed - self.penalty(v, places, mask, n_first)
        tokens = tokens[:, :n_first] + self.attention.out(merge_heads(mixed))
        return tokens + in_chunks(self.mlp, tokens)


class STAMPViT(MILModel):
    """Class token of a vision transformer; attention is what it pays to the tiles in the last layer, mean over heads.

    Args:
        width: of the tokens.
        depth: number of layers.
        heads: of the attention.
        mlp_dim: hidden width of the layers' MLP.
        distances: attention between tiles, once normalised, is lessened in proportion to their distance (the code's
            ALiBi); bags then need places. As there, the class token lies at (0, 0). Attention is given without it.
        dropout: of the tiles' embedding and of attention weights.
        mlp_dropout: in the MLP; 0.5 whatever ``dropout`` in the authors' code.
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
        mlp_dim: int = 512,
        distances: bool = False,
        dropout: float = 0.0,
        mlp_dropout: float = 0.5,
    ) -> None:
        super().__init__(dim, n_classes)
        self.distances = distances
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout))
        self.class_token = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(
            _Layer(width, heads, mlp_dim, dropout, mlp_dropout, distances=distances) for index in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, batch: Batch) -> MILOutput:
        """Class token and tiles through the layers; the class token is the slide.

        Raises:
            UsageError: the model looks at distances and the batch has no places.
        """
        if self.distances and batch.xy is None:
            raise UsageError("this model looks at the distances between tiles; the bags need xy")
        h = in_chunks(self.embed, batch.features)  # (B, N, width)
        tokens = torch.cat([self.class_token.expand(len(batch), 1, -1), h], dim=1)  # (B, 1 + N, width)
        mask = torch.cat([torch.ones_like(batch.mask[:, :1]), batch.mask], dim=1)  # (B, 1 + N)
        places = (
            F.pad(batch.xy.float(), (0, 0, 1, 0)) if self.distances and batch.xy is not None else None
        )  # (B, 1 + N, 2)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, mask, places)
        last = cast(_Layer, self.layers[-1])
        embedding = self.norm(last(tokens, mask, places, n_first=1)).squeeze(1)  # (B, width)
        logits = self.classifier(embedding)  # (B, C)
        q, k, _ = last.project(tokens)
        scores = log_mean_attention(q[..., :1, :], k[..., 1:, :], batch.mask)  # (B, 1, N)
        return MILOutput(logits, scores.softmax(-1), scores, embedding, no_parts(logits))

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of STAMP, with and without ALiBi; without it ``heads`` cannot be told."""
        found = PublishedState(state)
        depth = found.count("transformer.layers.{}.")
        distances = found.has("transformer.layers.0.0.mhsa.query_encoders.")
        if distances:
            hyper["heads"] = found.count("transformer.layers.0.0.mhsa.query_encoders.{}.")
            for index in range(depth):
                _stack_heads(found, f"transformer.layers.{index}.0.mhsa", hyper["heads"])
        names = {"embed": "project_features", "norm": "transformer.norm", "classifier": "mlp_head.0"}
        for index in range(depth):
            theirs = f"transformer.layers.{index}"
            names |= {
                f"layers.{index}.norm": f"{theirs}.0.norm",
                f"layers.{index}.attention.qkv.weight": f"{theirs}.0.mhsa.in_proj_weight",
                f"layers.{index}.attention.qkv.bias": f"{theirs}.0.mhsa.in_proj_bias",
                f"layers.{index}.attention.out": f"{theirs}.0.mhsa.{'fc' if distances else 'out_proj'}",
                f"layers.{index}.penalty": f"{theirs}.0.mhsa.penalty",
                f"layers.{index}.mlp": f"{theirs}.1",
            }
        width, dim = found["project_features.0.weight"].shape
        mlp_dim = len(found["transformer.layers.0.1.1.weight"])
        n_classes = len(found["mlp_head.0.weight"])
        model = cls(dim, n_classes, width=width, depth=depth, mlp_dim=mlp_dim, distances=distances, **hyper)
        return load_published(model, found, names)


def _stack_heads(state: PublishedState, prefix: str, heads: int) -> None:
    """Put what ALiBi checkpoints keep for each head by itself into one tensor, in place."""
    for what in ("weight", "bias"):
        parts = [
            state.pop(f"{prefix}.{role}_encoders.{head}.{what}")
            for role in ("query", "key", "value")
            for head in range(heads)
        ]
        state[f"{prefix}.in_proj_{what}"] = torch.cat(parts)
    for ours, theirs in (
        ("scale", "bias_scale"),
        ("mean_distance", "scale_distance.running_mean"),
        ("batches_seen", "scale_distance.items_so_far"),
    ):
        scalars = [state.pop(f"{prefix}.attentions.{head}.{theirs}") for head in range(heads)]
        state[f"{prefix}.penalty.{ours}"] = torch.cat(scalars)
