"""TransMIL: Nyström attention between the tiles, with places told by convolutions over a square of tiles.

Shao, Bian, Chen, Wang, Zhang, Ji, Zhang: TransMIL, NeurIPS 2021, figure 3 and algorithm 2.
Differs from the authors' code: bags are taken one by one inside ``forward``, as each has its own square, so that neither
padding nor the bags beside it change a bag; the three convolutions and the identity of PPEG are added up to one kernel
before they are applied; of the last layer only the class token is computed.
"""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.attention import log_mean_attention
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
from mil.models.nystrom import NystromAttention, depthwise

__all__ = ["PPEG", "TransMIL"]


class PPEG(nn.Module):
    """Pyramid position encoding generator: depth-wise convolutions of three sizes over the square of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seven, self.five, self.three = (
            nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in (7, 5, 3)
        )

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """Tokens (B, side², width), row by row → the same shape: x + DW7(x) + DW5(x) + DW3(x)."""
        identity = F.pad(torch.ones_like(self.three.weight[..., :1, :1]), [3] * 4)
        kernel = self.seven.weight + F.pad(self.five.weight, [1] * 4) + F.pad(self.three.weight, [2] * 4) + identity
        bias = torch.stack([c.bias for c in (self.seven, self.five, self.three) if c.bias is not None]).sum(0)
        grid = torch.unflatten(tokens, 1, (side, side)).permute(0, 3, 1, 2)  # (B, width, side, side)
        return depthwise(lambda x: F.conv2d(x, kernel, bias, padding=3, groups=len(kernel)), grid).flatten(2).mT


class TransMIL(MILModel):
    """Transformer with Nyström attention; tiles are taken to lie in a square in the order they come in.

    Attention is the softmax attention that the class token of the last layer pays to the tiles, mean over heads: what
    Nyström attention approximates. A tile that fills the square up a second time gets the weight of both.

    Args:
        width: of the tokens; there are width / 2 landmarks.
        heads: of the attention.
        dropout: after the attention's last Linear.
    """

    order_matters = True
    learning_rate = 2e-4

    def __init__(self, dim: int, n_classes: int, *, width: int = 512, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__(dim, n_classes)
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        landmarks = max(width // 2, 1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention1 = NystromAttention(width, heads, landmarks=landmarks, dropout=dropout)
        self.attention2 = NystromAttention(width, heads, landmarks=landmarks, dropout=dropout)
        self.positions = PPEG(width)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, batch: Batch) -> MILOutput:
        """Algorithm 2, bag by bag."""
        return join((self._one_bag(bag.features) for bag in each_bag(batch)), batch)

    def first_layer(self, features: Tensor) -> Tensor:
        """Features (1, N, D) → class token and ⌈√N⌉² tokens after the first layer (1, 1 + ⌈√N⌉², width)."""
        h = in_chunks(self.embed, features)  # (1, N, width)
        n_tiles = h.shape[1]
        side = math.isqrt(n_tiles - 1) + 1
        tokens = torch.cat([self.class_token, h, h[:, : side * side - n_tiles]], dim=1)  # (1, 1 + side², width)
        first: Tensor = tokens + self.attention1(self.norm1(tokens))
        return first

    def encode_positions(self, tokens: Tensor) -> Tensor:
        """Class token as it is, PPEG on the others: (1, 1 + side², width), the same shape back."""
        placed = self.positions(tokens[:, 1:], math.isqrt(tokens.shape[1] - 1))
        return torch.cat([tokens[:, :1], placed], dim=1)

    def _one_bag(self, features: Tensor) -> MILOutput:
        tokens = self.encode_positions(self.first_layer(features))  # (1, 1 + side², width)
        told, query, keys = self.attention2.of_first(self.norm2(tokens))  # (1, 1, width)
        embedding = self.norm(tokens[:, :1] + told).squeeze(1)  # (1, width)
        logits = self.classifier(embedding)  # (1, C)

        n_tiles, n_tokens = features.shape[1], tokens.shape[1] - 1
        everything = torch.ones((1, n_tokens), dtype=torch.bool, device=features.device)
        log_weights = log_mean_attention(query, keys[..., 1:, :], everything)  # (1, 1, side²)
        twice = n_tokens - n_tiles
        scores = torch.cat(
            [torch.logaddexp(log_weights[..., :twice], log_weights[..., n_tiles:]), log_weights[..., twice:n_tiles]],
            dim=-1,
        )  # (1, 1, N)
        return MILOutput(logits, scores.softmax(-1), scores, embedding, no_parts(logits))

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layouts of the TransMIL repository and of MIL-Lab."""
        found = PublishedState(state)
        millab = found.has("patch_embed.")
        embed, classifier = ("patch_embed", "classifier") if millab else ("_fc1", "_fc2")
        layer, attn = ("blocks.{}", "attention") if millab else ("layer{}", "attn")
        names = {
            "embed": embed,
            "class_token": "cls_token",
            "classifier": classifier,
            "positions.seven": "pos_layer.proj",
            "positions.five": "pos_layer.proj1",
            "positions.three": "pos_layer.proj2",
        }
        for number in (1, 2):
            theirs = layer.format(number - 1 if millab else number)
            names |= {
                f"norm{number}": f"{theirs}.norm",
                f"attention{number}.qkv": f"{theirs}.{attn}.to_qkv",
                f"attention{number}.out": f"{theirs}.{attn}.to_out",
                f"attention{number}.residual": f"{theirs}.{attn}.res_conv",
            }
        width, dim = found[f"{embed}.0.weight"].shape
        heads = len(found[f"{names['attention1.residual']}.weight"])
        model = cls(dim, len(found[f"{classifier}.weight"]), width=width, heads=heads, **hyper)
        return load_published(model, found, names)
