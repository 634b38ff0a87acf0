"""DSMIL: two streams, one that finds the critical tile of each class, one that pools the tiles by likeness to it.

Li, Li, Eliceiri: Dual-stream multiple instance learning network, CVPR 2021, equations 2 to 6.
Differs from the authors' code: batched, with padding masked in the arg max and in the softmax.
"""

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mil.bag import Batch
from mil.losses import binary_cross_entropy
from mil.models.base import MILModel, MILOutput, PublishedState, State, in_chunks, load_published, masked_softmax, pool
from wsi.errors import UsageError

__all__ = ["DSMIL"]


class DSMIL(MILModel):
    """Attention by likeness to the critical tile of each class.

    ``part_logits`` are the tiles' own logits. The loss on the slide should be logistic (``losses.binary_cross_entropy``)
    as in the paper: a negative class has no logit of its own.

    Args:
        query_dim: width of the queries.
        nonlinear: queries by Linear-ReLU-Linear-tanh; False is the single Linear of the first release.
        value: what is pooled: the ``"features"`` themselves, or Dropout-Linear of them, with ReLU (``"relu"``, the
            authors' ``passing_v``) or without (``"linear"``, MIL-Lab).
        dropout: before the value's Linear.
        embed_dim: width of ReLU(Linear(x)) before everything (MIL-Lab); None works on the features themselves.
        norm: LayerNorm on the slide vectors (MIL-Lab).
        mean_logits: the logits are the mean of both streams' (MIL-Lab), not the second stream's alone.
    """

    attention_per_class = True
    bag_weight = 0.5

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        query_dim: int = 128,
        nonlinear: bool = True,
        value: Literal["features", "linear", "relu"] = "features",
        dropout: float = 0.0,
        embed_dim: int | None = None,
        norm: bool = False,
        mean_logits: bool = False,
    ) -> None:
        super().__init__(dim, n_classes)
        if value not in ("features", "linear", "relu"):
            raise UsageError(f"value is features, linear or relu, not {value!r}")
        width = embed_dim or dim
        self.mean_logits = mean_logits
        self.embed = nn.Sequential() if embed_dim is None else nn.Sequential(nn.Linear(dim, embed_dim), nn.ReLU())
        self.tile_classifier = nn.Linear(width, n_classes)
        self.query = nn.Sequential(nn.Linear(width, query_dim))
        if nonlinear:
            self.query.extend([nn.ReLU(), nn.Linear(query_dim, query_dim), nn.Tanh()])
        self.value = nn.Sequential()
        if value != "features":
            self.value.extend([nn.Dropout(dropout), nn.Linear(width, width)])
        if value == "relu":
            self.value.append(nn.ReLU())
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.classifier = nn.Conv1d(n_classes, n_classes, kernel_size=width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d):
                nn.init.orthogonal_(layer.weight)

    def forward(self, batch: Batch) -> MILOutput:
        """Critical tiles by equation 2, attention by 3 and 4, slide vectors by 5, logits by 6."""
        h = in_chunks(self.embed, batch.features, mask=batch.mask) if len(self.embed) else batch.features  # (B, N, E)
        tile_logits = in_chunks(self.tile_classifier, h, mask=batch.mask)  # (B, N, C)
        critical = tile_logits.masked_fill(~batch.mask[..., None], -torch.inf).argmax(1)  # (B, C)
        q = in_chunks(self.query, h, mask=batch.mask)  # (B, N, Q)
        q_critical = q.gather(1, critical[..., None].expand(-1, -1, q.shape[-1]))  # (B, C, Q)
        scores, attention = masked_softmax(q_critical @ q.mT / math.sqrt(q.shape[-1]), batch.mask)  # (B, C, N)
        v = in_chunks(self.value, h, mask=batch.mask) if len(self.value) else h  # (B, N, E)
        embedding = self.norm(pool(attention, v))  # (B, C, E)
        logits = self.classifier(embedding).squeeze(-1)  # (B, C)
        if self.mean_logits:
            logits = 0.5 * (logits + tile_logits.gather(1, critical[:, None]).squeeze(1))
        parts = tile_logits * batch.mask[..., None]
        return MILOutput(logits, attention, scores, embedding.flatten(1), parts)

    def auxiliary_loss(self, batch: Batch, output: MILOutput, targets: Tensor) -> Tensor:
        """Half the logistic loss of each class's largest tile logit; targets are indices (B,) or 0/1 (B, C)."""
        largest = output.part_logits.masked_fill(~batch.mask[..., None], -torch.inf).amax(1)  # (B, C)
        return (1 - self.bag_weight) * binary_cross_entropy(largest, targets)

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layouts of the DSMIL repository (new and first release) and of MIL-Lab's variant."""
        found = PublishedState(state)
        millab = found.has("patch_embed.")
        nonlinear = found.has("b_classifier.q.0.")
        tile_classifier = "i_classifier.inst_classifier" if millab else "i_classifier.fc.0"
        query = found["b_classifier.q.0.weight" if nonlinear else "b_classifier.q.weight"]
        n_classes, width = found[f"{tile_classifier}.weight"].shape
        model = cls(
            found["patch_embed.0.weight"].shape[1] if millab else width,
            n_classes,
            query_dim=len(query),
            nonlinear=nonlinear,
            value="features" if not found.has("b_classifier.v.1.") else "linear" if millab else "relu",
            embed_dim=width if millab else None,
            norm=millab,
            mean_logits=millab,
            **hyper,
        )
        names = {
            "embed": "patch_embed",
            "tile_classifier": tile_classifier,
            "query": "b_classifier.q",
            "value": "b_classifier.v",
            "norm": "b_classifier.norm",
            "classifier": "classifier" if millab else "b_classifier.fcc",
        }
        if not nonlinear:
            names["query.0"] = "b_classifier.q"
        return load_published(model, found, names, unused=("b_classifier.fcc.",) if millab else ())
