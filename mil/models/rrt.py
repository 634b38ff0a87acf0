"""RRT-MIL: tiles are embedded again in the light of their region before attention pooling.

Tang, Zhou, Huang, Zhu, Zhang, Liu: Feature re-embedding: towards foundation model-level performance in computational
pathology, CVPR 2024, equations 3 to 9 (R²T), as its code computes them.
Differs from the code: bags are taken one by one inside ``forward``, as each has its own square; the square matrices of
attention logits are never written out. As there, ``regions`` and ``epeg_kernel`` are those of the first layers only: the
cross-region layer has 8 × 8 regions and no convolution.
"""

import math
from typing import Any, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.attention import MultiHeadAttention
from mil.models.base import (
    MILModel,
    MILOutput,
    PublishedState,
    State,
    each_bag,
    in_chunks,
    join,
    load_published,
    no_parts,
)
from wsi.errors import UsageError

__all__ = ["RRTMIL"]

_CROSS_REGIONS = 8


def _to_regions(x: Tensor, regions: int) -> Tensor:
    """Tokens (N, width) → (regions², tokens of a region, width): row by row into a square, zeros at its end."""
    n, width = x.shape
    side = math.isqrt(n - 1) + 1
    side += -side % regions
    square = F.pad(x, (0, 0, 0, side * side - n)).view(regions, side // regions, regions, side // regions, width)
    return square.transpose(1, 2).reshape(regions * regions, -1, width)


def _from_regions(x: Tensor, n: int) -> Tensor:
    """The opposite of ``_to_regions``: (regions², tokens of a region, width) → (n, width)."""
    regions, side = math.isqrt(x.shape[0]), math.isqrt(x.shape[1])
    return x.view(regions, regions, side, side, -1).transpose(1, 2).reshape(-1, x.shape[-1])[:n]


class _RegionAttention(nn.Module):
    """R-MSA: attention within regions, with a convolution over the attention logits that tells places (EPEG).

    Logits Q Kᵀ are linear in the queries, and the convolution runs along the queries: it is done on Q, which is narrow,
    and the logits are never written out. A bias of the convolution would shift all logits of a query alike: it does
    nothing, and there is none.
    """

    def __init__(self, width: int, heads: int, regions: int, epeg_kernel: int) -> None:
        super().__init__()
        self.regions = regions
        self.attention = MultiHeadAttention(width, heads)
        self.epeg = nn.Conv2d(heads, heads, (epeg_kernel, 1), padding=(epeg_kernel // 2, 0), groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) → (N, width)."""
        regions = _to_regions(x, self.regions)  # (R, n, width)
        q, k, v = self.attention.project(regions, regions, regions)  # (R, heads, n, ·)
        return _from_regions(self.attention.attend(q + self.epeg(q), k, v, None), len(x))


class _CrossRegionAttention(nn.Module):
    """CR-MSA: a few representatives of each region attend to those of the other regions and report to their tiles."""

    def __init__(self, width: int, heads: int, slots: int, hidden: int | None) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, heads)
        self.choose = nn.Sequential(nn.Linear(width, slots if hidden is None else hidden, bias=False))
        if hidden is not None:
            self.choose.extend([nn.Tanh(), nn.Linear(hidden, slots, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) → (N, width)."""
        regions = _to_regions(x, _CROSS_REGIONS)  # (R, n, width)
        logits = self.choose(regions)  # (R, n, k)
        low, high = logits.amin(1, keepdim=True), logits.amax(1, keepdim=True)  # (R, 1, k)
        strength = (logits - low) / (high - low + 1e-8)  # (R, n, k)
        chosen = (logits.softmax(1).mT @ regions).transpose(0, 1)  # (k, R, width)
        told = self.attention(chosen, chosen, chosen).transpose(0, 1)  # (R, k, width)
        return _from_regions((logits.softmax(-1) * strength) @ told, len(x))


class _Layer(nn.Module):
    """x + mix(LN(x)), and, if ``mlp``, LN-Linear-GELU-Linear with another residual."""

    def __init__(self, width: int, mix: nn.Module, *, mlp: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = mix
        self.mlp: nn.Sequential | None = None
        if mlp:
            self.mlp = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) → (N, width)."""
        x = x + self.mix(self.norm(x))
        return x if self.mlp is None else x + in_chunks(self.mlp, x[None])[0]


class RRTMIL(MILModel):
    """Regional re-embedding and attention pooling; tiles are taken to lie in a square in the order they come in.

    Args:
        width: of the tokens.
        heads: of both attentions.
        region_layers: number of R-MSA layers before the CR-MSA layer.
        regions: per side of the square, in the R-MSA layers.
        epeg_kernel: length of the convolution over the attention logits.
        slots: representatives of a region.
        slot_hidden: hidden width of the MLP that chooses them; None for a Linear.
        mlp: layers have an MLP.
        shortcut: the input of the layers is added to their output.
        pooling_dim: hidden width of the attention pooling.
        pooling_activation: ReLU is the code's default, tanh what its scripts ask for.
        dropout: after the embedding.
    """

    order_matters = True
    learning_rate = 2e-4

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        width: int = 512,
        heads: int = 8,
        region_layers: int = 1,
        regions: int = 8,
        epeg_kernel: int = 15,
        slots: int = 3,
        slot_hidden: int | None = None,
        mlp: bool = False,
        shortcut: bool = False,
        pooling_dim: int = 128,
        pooling_activation: Literal["relu", "tanh"] = "relu",
        dropout: float = 0.25,
    ) -> None:
        super().__init__(dim, n_classes)
        if pooling_activation not in ("relu", "tanh"):
            raise UsageError(f"pooling_activation is relu or tanh, not {pooling_activation!r}")
        self.shortcut = shortcut
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.layers = nn.Sequential(
            *(
                _Layer(width, _RegionAttention(width, heads, regions, epeg_kernel), mlp=mlp)
                for _ in range(region_layers)
            ),
            _Layer(width, _CrossRegionAttention(width, heads, slots, slot_hidden), mlp=mlp),
        )
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Sequential(
            nn.Linear(width, pooling_dim, bias=False),
            nn.ReLU() if pooling_activation == "relu" else nn.Tanh(),
            nn.Linear(pooling_dim, 1, bias=False),
        )
        self.classifier = nn.Linear(width, n_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, batch: Batch) -> MILOutput:
        """Embedding, re-embedding, attention pooling, classifier; bag by bag."""
        return join((self._one_bag(bag.features) for bag in each_bag(batch)), batch)

    def reembed(self, features: Tensor) -> Tensor:
        """Features (1, N, D) → tiles in the light of their regions (1, N, width)."""
        h = in_chunks(self.embed, features)[0]  # (N, width)
        seen = self.layers(h)
        result: Tensor = self.norm(seen + h if self.shortcut else seen)
        return result[None]

    def _one_bag(self, features: Tensor) -> MILOutput:
        h = self.reembed(features)  # (1, N, width)
        scores = in_chunks(self.attention, h).mT  # (1, 1, N)
        attention = scores.softmax(-1)
        embedding = (attention @ h).squeeze(1)  # (1, width)
        logits = self.classifier(embedding)  # (1, C)
        return MILOutput(logits, attention, scores, embedding, no_parts(logits))

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of RRT-MIL; ``regions``, ``shortcut`` and ``pooling_activation`` cannot be told from it."""
        found = PublishedState(state)
        # The choice of representatives is a bare matrix (width, k) where it is not an MLP.
        if (phi := found.pop("online_encoder.cr_msa.attn.phi", None)) is not None:
            found["online_encoder.cr_msa.attn.phi.0.weight"] = phi.T
        hidden = found.has("online_encoder.cr_msa.attn.phi.2.")
        depth = found.count("online_encoder.layers.{}.")
        layers = {f"layers.{index}": f"online_encoder.layers.{index}" for index in range(depth)}
        layers[f"layers.{depth}"] = "online_encoder.cr_msa"
        names = {
            "embed": "patch_to_emb",
            "norm": "online_encoder.norm",
            "attention": "pool_fn.attention.attention",
            "classifier": "predictor",
        }
        for ours, theirs in layers.items():
            names |= {
                f"{ours}.norm": f"{theirs}.norm",
                f"{ours}.mix.attention.qkv": f"{theirs}.attn.attn.qkv",
                f"{ours}.mix.attention.out": f"{theirs}.attn.attn.proj",
                f"{ours}.mix.epeg": f"{theirs}.attn.attn.pe",
                f"{ours}.mix.choose": f"{theirs}.attn.phi",
                f"{ours}.mlp.0": f"{theirs}.norm2",
                f"{ours}.mlp.1": f"{theirs}.mlp.fc1",
                f"{ours}.mlp.3": f"{theirs}.mlp.fc2",
            }
        width, dim = found["patch_to_emb.0.weight"].shape
        epeg = found["online_encoder.layers.0.attn.attn.pe.weight"]
        choose = found["online_encoder.cr_msa.attn.phi.0.weight"]
        model = cls(
            dim,
            len(found["predictor.weight"]),
            width=width,
            heads=len(epeg),
            region_layers=depth,
            epeg_kernel=epeg.shape[2],
            slots=len(found["online_encoder.cr_msa.attn.phi.2.weight"]) if hidden else len(choose),
            slot_hidden=len(choose) if hidden else None,
            mlp=found.has("online_encoder.cr_msa.mlp."),
            pooling_dim=len(found["pool_fn.attention.attention.0.weight"]),
            **hyper,
        )
        no_effect = tuple(f"online_encoder.layers.{index}.attn.attn.pe.bias" for index in range(depth))
        return load_published(model, found, names, unused=no_effect)
