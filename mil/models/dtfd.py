"""DTFD-MIL: attention in random parts of the bag, then attention over what the parts found.

Zhang, Meng, Zhao, Qiao, Yang, Coupland, Zheng: DTFD-MIL: double-tier feature distillation, CVPR 2022, equations 4 to 10.
Differs from the authors' code: in eval mode the parts are drawn by a generator with a fixed seed, so that a bag always
gets the same answer; with several draws the logits are the logarithm of the mean probability; a bag of fewer tiles than
parts puts its tiles into several parts. What the first tier distils is detached, which gives the gradients that the
authors' two optimisers intend and makes one backward pass of them. Bags are taken one by one inside ``forward``.
"""

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.abmil import GatedAttentionScore
from mil.models.base import (
    MILModel,
    MILOutput,
    PublishedState,
    State,
    class_targets,
    each_bag,
    in_chunks,
    join,
    load_published,
)
from wsi.errors import UsageError

__all__ = ["DTFDMIL"]


class DTFDMIL(MILModel):
    """Two tiers of gated attention; ``part_logits`` (B, G, C) are those of the first tier's pseudo-bags.

    Attention of a tile is its part in the distilled features times their attention in the second tier. With ``"afs"`` all
    tiles have some; otherwise only the distilled tiles have.

    Args:
        embed_dim: width of ReLU(Linear(x)), without bias.
        attention_dim: hidden width of both attentions.
        residual_blocks: number of x + ReLU(W₂ ReLU(W₁ x)) after the embedding.
        pseudo_bags: number of parts.
        distil: ``"afs"`` the attention-pooled vector of each part; ``"maxs"`` its tile that speaks loudest for the last
            class; ``"maxmins"`` that and the quietest.
        tiles_per_part: how many tiles the last two take from either end.
        draws: partitions over which the answer is averaged in eval mode.
    """

    order_matters = True

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        embed_dim: int = 512,
        attention_dim: int = 128,
        residual_blocks: int = 0,
        pseudo_bags: int = 4,
        distil: Literal["afs", "maxs", "maxmins"] = "afs",
        tiles_per_part: int = 1,
        draws: int = 1,
    ) -> None:
        super().__init__(dim, n_classes)
        if distil not in ("afs", "maxs", "maxmins"):
            raise UsageError(f"distil is afs, maxs or maxmins, not {distil!r}")
        if min(pseudo_bags, tiles_per_part, draws) < 1:
            raise UsageError(f"pseudo_bags={pseudo_bags}, tiles_per_part={tiles_per_part}, draws={draws}: one at least")
        self.pseudo_bags = pseudo_bags
        self.distil = distil
        self.tiles_per_part = tiles_per_part
        self.draws = draws
        self.embed = nn.Sequential(nn.Linear(dim, embed_dim, bias=False), nn.ReLU())
        self.embed.extend(_Residual(embed_dim) for _ in range(residual_blocks))
        self.attention = GatedAttentionScore(embed_dim, attention_dim)
        self.classifier = nn.Linear(embed_dim, n_classes)
        self.slide_attention = GatedAttentionScore(embed_dim, attention_dim)
        self.slide_classifier = nn.Linear(embed_dim, n_classes)

    def forward(self, batch: Batch) -> MILOutput:
        """Both tiers, bag by bag."""
        return join((self._one_bag(bag.features) for bag in each_bag(batch)), batch)

    def auxiliary_loss(self, batch: Batch, output: MILOutput, targets: Tensor) -> Tensor:
        """Cross-entropy of the pseudo-bags, each with the class of its bag; weight one as in the paper.

        Raises:
            UsageError: targets are not class indices.
        """
        targets = class_targets(targets, output.part_logits.shape[-1], "DTFD's first tier")
        return F.cross_entropy(output.part_logits.flatten(0, 1), targets.repeat_interleave(self.pseudo_bags))

    def partitions(self, n_tiles: int) -> list[list[Tensor]]:
        """For each draw the tiles of each pseudo-bag; at random in training, always the same in eval mode."""
        generator = None if self.training else torch.Generator().manual_seed(n_tiles)
        draws = []
        for _ in range(1 if self.training else self.draws):
            order = torch.randperm(n_tiles, generator=generator)
            order = order.repeat(math.ceil(self.pseudo_bags / n_tiles)) if n_tiles < self.pseudo_bags else order
            draws.append(list(order.tensor_split(self.pseudo_bags)))
        return draws

    def _one_bag(self, features: Tensor) -> MILOutput:
        h = in_chunks(self.embed, features)[0]  # (N, E)
        raw = in_chunks(self.attention, h[None])[0, :, 0]  # (N,)
        tiers = [self._two_tiers(h, raw, parts) for parts in self.partitions(len(h))]
        logits, attention, embedding, part_logits = (torch.stack(found) for found in zip(*tiers, strict=True))
        # The mean of one is itself: its logits stay as they are.
        joined = logits if len(tiers) == 1 else logits.log_softmax(-1).exp().mean(0, keepdim=True).log()  # (1, C)
        weights = attention.mean(0)[None, None]  # (1, 1, N)
        return MILOutput(
            joined, weights, weights.log(), embedding.mean(0, keepdim=True), part_logits.mean(0, keepdim=True)
        )

    def _two_tiers(self, h: Tensor, raw: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (C,), attention (N,), slide vector (E,), pseudo-bag logits (G, C) for one partition."""
        pseudo, distilled, origins = [], [], []
        for part in parts:
            tiles = part.to(h.device)
            weights = raw[tiles].softmax(0)  # (n,), equation 4
            pooled = weights @ h[tiles]  # (E,), equation 5
            pseudo.append(pooled)
            if self.distil == "afs":
                distilled.append(pooled[None])
                origins.append((tiles, weights[None]))
                continue
            # Equation 8: the class activation of a tile, by which the distilled tiles are chosen.
            activation = (weights[:, None] * h[tiles]) @ self.classifier.weight.T  # (n, C)
            ranked = tiles[activation.softmax(-1)[:, -1].argsort(descending=True)]
            chosen = ranked[: self.tiles_per_part]
            if self.distil == "maxmins":
                chosen = torch.cat([chosen, ranked[-self.tiles_per_part :]])
            distilled.append(h[chosen])
            origins.append((chosen, torch.eye(len(chosen), device=h.device)))
        rows = torch.cat(distilled).detach()  # (R, E)
        slide_weights = self.slide_attention(rows)[:, 0].softmax(0)  # (R,)
        embedding = slide_weights @ rows  # (E,)

        attention = torch.zeros_like(raw)
        of_part = slide_weights.split([len(weights) for _, weights in origins])
        for (tiles, weights), slide_weight in zip(origins, of_part, strict=True):
            attention = attention.index_add(0, tiles, slide_weight @ weights)
        return self.slide_classifier(embedding), attention, embedding, self.classifier(torch.stack(pseudo))

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of the DTFD-MIL checkpoint, its four dicts flattened: ``dim_reduction.fc1.weight``, ….

        A slash between the name of the dict and that of the tensor does as well.
        """
        found = PublishedState({key.replace("/", "."): value for key, value in state.items()})
        embed_dim, dim = found["dim_reduction.fc1.weight"].shape
        blocks = found.count("dim_reduction.resBlocks.{}.")
        names = {
            "embed.0": "dim_reduction.fc1",
            "classifier": "classifier.fc",
            "slide_classifier": "att_classifier.classifier.fc",
        }
        names |= {f"embed.{2 + index}.layers": f"dim_reduction.resBlocks.{index}.block" for index in range(blocks)}
        for ours, theirs in (("attention", "attention"), ("slide_attention", "att_classifier.attention")):
            names |= {
                f"{ours}.content": f"{theirs}.attention_V.0",
                f"{ours}.gate": f"{theirs}.attention_U.0",
                f"{ours}.score": f"{theirs}.attention_weights",
            }
        model = cls(
            dim,
            len(found["classifier.fc.weight"]),
            embed_dim=embed_dim,
            attention_dim=len(found["attention.attention_V.0.weight"]),
            residual_blocks=blocks,
            **hyper,
        )
        return load_published(model, found, names)


class _Residual(nn.Module):
    """x + ReLU(W₂ ReLU(W₁ x)), without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layers(x)
        return result
