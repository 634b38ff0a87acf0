"""WiKG: the slide as a graph in which each tile draws edges to the few tiles that it finds most alike.

Li, Chen, Chu, Sun, Jin, Han, Xie: Dynamic graph representation with knowledge-aware attention for whole slide image
analysis, CVPR 2024, equations 1 to 9, as its code computes them.
Differs from the code: rows of the N × N likeness are made a few at a time and only their largest values are computed
with gradients, so that memory grows with N; bags are taken one by one inside ``forward``; the gates that the code
makes and never uses are left out.
"""

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.bag import Batch
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

__all__ = ["WiKG"]

_PAIRS_AT_ONCE = 1 << 23  # likenesses held at once: 32 MiB


class WiKG(MILModel):
    """Head and tail embeddings, edges to the likeliest tails, knowledge-aware attention over the edges, soft-max readout.

    Args:
        width: of all embeddings.
        neighbours: edges that a tile draws.
        aggregation: how a tile and its neighbourhood are joined: ``"bi-interaction"``, ``"sum"`` (the code's gcn) or
            ``"concatenation"`` (sage).
        dropout: of the joined embeddings.
        edge_score: ``"product-of-sums"`` is what the authors' code computes, ``"inner-product"`` what the paper writes
            and MIL-Lab computes; the latter also has no head in its edges and ReLU in place of LeakyReLU at the start.
    """

    quadratic = True
    learning_rate = 2e-4

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        width: int = 512,
        neighbours: int = 6,
        aggregation: Literal["bi-interaction", "sum", "concatenation"] = "bi-interaction",
        dropout: float = 0.3,
        edge_score: Literal["product-of-sums", "inner-product"] = "product-of-sums",
    ) -> None:
        super().__init__(dim, n_classes)
        if aggregation not in ("bi-interaction", "sum", "concatenation"):
            raise UsageError(f"aggregation is bi-interaction, sum or concatenation, not {aggregation!r}")
        if edge_score not in ("product-of-sums", "inner-product"):
            raise UsageError(f"edge_score is product-of-sums or inner-product, not {edge_score!r}")
        self.neighbours = neighbours
        self.aggregation = aggregation
        self.edge_score = edge_score
        self.embed = nn.Sequential(
            nn.Linear(dim, width), nn.LeakyReLU() if edge_score == "product-of-sums" else nn.ReLU()
        )
        self.head = nn.Linear(width, width)
        self.tail = nn.Linear(width, width)
        self.join = nn.Linear(2 * width if aggregation == "concatenation" else width, width)
        self.join_product = nn.Linear(width, width) if aggregation == "bi-interaction" else None
        self.dropout = nn.Dropout(dropout)
        self.readout = nn.Sequential(nn.Linear(width, width // 2), nn.LeakyReLU(), nn.Linear(width // 2, 1))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, batch: Batch) -> MILOutput:
        """Equations 1 to 9, bag by bag."""
        return join((self._one_bag(bag.features) for bag in each_bag(batch)), batch)

    def nodes(self, features: Tensor) -> Tensor:
        """Features (1, N, D) → embeddings of the tiles with their neighbourhoods (1, N, width)."""
        x = in_chunks(self.embed, features)  # (1, N, width)
        x = 0.5 * (x + x.mean(1, keepdim=True))
        head, tail = self.head(x), self.tail(x)  # (1, N, width)
        rows = max(1, _PAIRS_AT_ONCE // x.shape[1])
        joined = torch.cat([self._joined(part, tail[0]) for part in torch.split(head[0], rows)])[None]
        result: Tensor = self.dropout(joined)
        return result

    def _joined(self, head: Tensor, tail: Tensor) -> Tensor:
        """Heads (n, width) of some tiles, tails (N, width) of all → (n, width)."""
        with torch.no_grad():
            likest = (head @ tail.T).topk(min(self.neighbours, len(tail)), dim=1).indices  # (n, k)
        near = tail[likest]  # (n, k, width)
        share = ((head[:, None] * near).sum(-1) / math.sqrt(head.shape[1])).softmax(-1)[..., None]  # (n, k, 1)
        if self.edge_score == "product-of-sums":
            gate = torch.tanh(head[:, None] + share * near + (1 - share) * head[:, None])  # (n, k, width)
            score = near.sum(-1) * gate.sum(-1)  # (n, k)
        else:
            gate = torch.tanh(head[:, None] + share * near)
            score = (near * gate).sum(-1)
        around = torch.einsum("nk,nkw->nw", score.softmax(-1), near)  # (n, width)
        if self.aggregation == "concatenation":
            return F.leaky_relu(self.join(torch.cat([head, around], dim=-1)))
        joined = F.leaky_relu(self.join(head + around))
        return joined if self.join_product is None else joined + F.leaky_relu(self.join_product(head * around))

    def _one_bag(self, features: Tensor) -> MILOutput:
        nodes = self.nodes(features)  # (1, N, width)
        scores = in_chunks(self.readout, nodes).mT  # (1, 1, N)
        attention = scores.softmax(-1)
        embedding = self.norm((attention @ nodes).squeeze(1))  # (1, width)
        logits = self.classifier(embedding)  # (1, C)
        return MILOutput(logits, attention, scores, embedding, no_parts(logits))

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layouts of WiKG and of MIL-Lab; ``neighbours`` cannot be told from it (MIL-Lab's configuration has 4)."""
        found = PublishedState(state)
        millab = found.has("patch_embed.")
        embed, classifier = ("patch_embed", "classifier") if millab else ("_fc1", "fc")
        width, dim = found[f"{embed}.0.weight"].shape
        two = found.has("linear1.")
        concatenation = not two and found["linear.weight"].shape[1] == 2 * width
        names = {
            "embed": embed,
            "head": "W_head",
            "tail": "W_tail",
            "join": "linear1" if two else "linear",
            "join_product": "linear2",
            "readout": "readout.gate_nn",
            "classifier": classifier,
        }
        model = cls(
            dim,
            len(found[f"{classifier}.weight"]),
            width=width,
            aggregation="bi-interaction" if two else "concatenation" if concatenation else "sum",
            edge_score="inner-product" if millab else "product-of-sums",
            **hyper,
        )
        return load_published(model, found, names, unused=("gate_U.", "gate_V.", "gate_W."))
