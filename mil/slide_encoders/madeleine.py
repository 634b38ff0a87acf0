"""MADELEINE: attention of several heads over CONCH tiles, learned by aligning stains; and the two losses that align them.

Jaume, Vaidya, et al.: Multistain Pretraining for Slide Representation Learning in Pathology, ECCV 2024. The second loss is
graph optimal transport: Chen et al., ICML 2020, with the proximal point method of Xie et al., UAI 2020.
Differs from the authors' code: batches with padding; losses run on any device.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.abmil import GatedAttentionScore
from mil.models.base import PublishedState, State, load_published
from mil.slide_encoders.base import SlideEmbedding, SlideEncoder, pool_tokens

__all__ = ["MADELEINE", "GraphTransport", "graph_transport", "info_nce", "transport_plan"]


class MADELEINE(SlideEncoder):
    """Three layers before attention, gated attention with a slice of the channels a head, one Linear after it.

    Args:
        dim: length of a tile's vector.
        width: of a head's channels, and of the slide's vector.
        heads: of the attention.
        attention_dim: hidden width of each head.
        token_dim: length of the vectors that the transport loss compares.
        dropout: in the attention; the layers before it have the authors' 0.1.
    """

    def __init__(
        self,
        dim: int = 512,
        *,
        width: int = 512,
        heads: int = 4,
        attention_dim: int = 512,
        token_dim: int = 128,
        dropout: float = 0.25,
    ) -> None:
        super().__init__({
            "dim": dim, "width": width, "heads": heads, "attention_dim": attention_dim, "token_dim": token_dim,
            "dropout": dropout,
        })  # fmt: skip
        layers: list[nn.Module] = []
        for into, out in ((dim, width), (width, width), (width, width * heads)):
            layers += [nn.Linear(into, out), nn.LayerNorm(out), nn.GELU(), nn.Dropout(0.1)]
        self.embed = nn.Sequential(*layers)
        self.attention = nn.ModuleList(GatedAttentionScore(width, attention_dim, dropout=dropout) for _ in range(heads))
        self.project = nn.Linear(width * heads, width)
        self.project_token = nn.Linear(width * heads, token_dim)

    @property
    def heads(self) -> int:
        return len(self.attention)

    def forward(self, batch: Batch) -> SlideEmbedding:
        """(B, width) vectors, a row of attention for each head: what the authors call ``encode_he``."""
        self.check_width(batch.features.shape[-1])
        scores, pooled = pool_tokens(self._heads_of, self._scores, batch)  # (B, K, N), (B, K, width)
        vector = self.project(pooled.transpose(1, 2).flatten(1))  # heads go fastest
        return SlideEmbedding(vector, scores.softmax(-1), scores)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, N, token_dim) of features (B, N, dim), for the transport loss."""
        projected: Tensor = self.project_token(self.embed(x.float()))
        return projected

    def _heads_of(self, x: Tensor) -> Tensor:
        """(B, n, D) → (B, n, K, width); a head's channels are every K-th."""
        split: Tensor = self.embed(x).unflatten(-1, (-1, len(self.attention))).transpose(-1, -2)
        return split

    def _scores(self, h: Tensor) -> Tensor:
        return torch.cat([head(h[..., i, :]) for i, head in enumerate(self.attention)], -1)  # (B, n, K)

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of the authors' ``model.pt``."""
        found = PublishedState(state)
        width, dim = found["wsi_embedders.pre_attn.0.weight"].shape
        heads = found.count("wsi_embedders.attn.{}.")
        model = cls(
            dim,
            width=width,
            heads=heads,
            attention_dim=len(found["wsi_embedders.attn.0.attention_a.0.weight"]),
            token_dim=len(found["token_projector.weight"]),
            **hyper,
        )
        names = {"embed": "wsi_embedders.pre_attn", "project": "projector", "project_token": "token_projector"}
        for i in range(heads):
            theirs = f"wsi_embedders.attn.{i}.attention_"
            names |= {f"attention.{i}.content": f"{theirs}a.0", f"attention.{i}.gate": f"{theirs}b.0"}
            names |= {f"attention.{i}.score": f"{theirs}c"}
        return load_published(model, found, names, unused=("stain_encoding.",))


def info_nce(query: Tensor, key: Tensor, *, temperature: float, symmetric: bool = True) -> Tensor:
    """Mean cross-entropy of telling each query's own key, of equal row, from the keys of the others, by cosine.

    van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding, 2018.

    Args:
        query, key: (B, E).
        temperature: cosines are divided by it.
        symmetric: also tell each key's query, and take the mean of the two.
    """
    logits = F.normalize(query.float(), dim=-1) @ F.normalize(key.float(), dim=-1).T / temperature  # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, own)
    return (loss + F.cross_entropy(logits.T, own)) / 2 if symmetric else loss


class GraphTransport(NamedTuple):
    """What it costs to move one set of tokens onto another, (B,) each; the authors' loss is the sum of all of it.

    Attributes:
        wasserstein: of moving tokens.
        gromov: of moving pairs of tokens, which compares the shapes of the two sets.
    """

    wasserstein: Tensor
    gromov: Tensor


def graph_transport(v: Tensor, w: Tensor) -> GraphTransport:
    """Wasserstein and Gromov-Wasserstein cost between tokens (B, n, E) and (B, m, E).

    Costs are cosine distances less a tenth of their range over the *whole batch*, as published: what a pair costs depends
    on the pairs beside it. No gradient flows through the plans.
    """
    v, w = v.float(), w.float()
    cost = _cost(v, w)  # (B, n, m)
    moved = (cost * transport_plan(cost.detach(), beta=0.5, rounds=30)).sum((1, 2))
    within_v, within_w = _cost(v, v), _cost(w, w)  # (B, n, n), (B, m, m)
    squares = within_v.square().mean(2)[:, :, None] + within_w.square().mean(2)[:, None]  # (B, n, m)
    plan = torch.full_like(cost, 1 / (cost.shape[1] * cost.shape[2])).detach()
    for _ in range(5):
        pairs = squares - 2 * within_v @ plan @ within_w.mT
        plan = transport_plan(pairs.detach(), beta=0.1, rounds=20)
    pairs = squares - 2 * within_v @ plan @ within_w.mT
    return GraphTransport(moved, (pairs * plan).sum((1, 2)))


def transport_plan(cost: Tensor, *, beta: float, rounds: int) -> Tensor:
    """(B, n, m) plans that move equal weights at ``cost`` (B, n, m), by the inexact proximal point method.

    Args:
        beta: weight of staying near the last plan; smaller is faster and less stable.
        rounds: steps, each with one of Sinkhorn's.
    """
    n, m = cost.shape[1:]
    kernel = (-cost / beta).exp()
    plan, right = torch.ones_like(cost), cost.new_full((len(cost), m, 1), 1 / m)
    for _ in range(rounds):
        kept = kernel * plan
        left = 1 / (n * (kept @ right))  # (B, n, 1)
        right = 1 / (m * (kept.mT @ left))  # (B, m, 1)
        plan = left * kept * right.mT
    return plan


def _cost(v: Tensor, w: Tensor) -> Tensor:
    distance = 1 - F.normalize(v, dim=-1) @ F.normalize(w, dim=-1).mT
    low, high = distance.amin(), distance.amax()
    return F.relu(distance - (low + 0.1 * (high - low)))
