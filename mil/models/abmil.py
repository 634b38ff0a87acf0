"""ABMIL: attention pooling, plain and gated.

Ilse, Tomczak, Welling: Attention-based Deep MIL, ICML 2018, equations 7 to 9. Defaults are those of MIL-Lab and of the
FEATHER slide encoders (embedding 512, attention 384); ``embed_dim=None, attention_dim=128`` is the paper's own head.
Differs from the paper: any number of classes; tiles of padding are masked before the softmax.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from wsi.errors import UsageError

__all__ = ["ABMIL", "AttentionScore", "GatedABMIL", "GatedAttentionScore"]


class AttentionScore(nn.Module):
    """Equation 8: w · tanh(V h), for ``branches`` different w at once: (B, N, dim) → (B, N, branches)."""

    def __init__(self, dim: int, hidden: int, branches: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.content = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(hidden, branches)

    def forward(self, h: Tensor) -> Tensor:
        """Raw scores of every tile."""
        scores: Tensor = self.score(self.dropout(torch.tanh(self.content(h))))
        return scores


class GatedAttentionScore(AttentionScore):
    """Equation 9: w · (tanh(V h) ⊙ σ(U h)): (B, N, dim) → (B, N, branches)."""

    def __init__(self, dim: int, hidden: int, branches: int = 1, dropout: float = 0.0) -> None:
        super().__init__(dim, hidden, branches, dropout)
        self.gate = nn.Linear(dim, hidden)

    def forward(self, h: Tensor) -> Tensor:
        """Raw scores of every tile."""
        # One product for both, as reading the tiles is much of its cost.
        weight = torch.cat([self.content.weight, self.gate.weight])
        both = F.linear(h, weight, torch.cat([self.content.bias, self.gate.bias]))
        content, gate = both.chunk(2, -1)  # (B, N, hidden)
        scores: Tensor = self.score(self.dropout(torch.tanh(content)) * self.dropout(torch.sigmoid(gate)))
        return scores


class ABMIL(MILModel):
    """Attention pooling.

    Args:
        embed_dim: width of the tiles' embedding, ReLU(Linear(x)); None attends to the features themselves.
        attention_dim: hidden width of the attention.
        embed_layers: number of Linear-ReLU layers of the embedding.
        dropout: in the attention's branches, and between layers of the embedding.
    """

    scorer: type[AttentionScore] = AttentionScore

    def __init__(
        self,
        dim: int,
        n_classes: int,
        *,
        embed_dim: int | None = 512,
        attention_dim: int = 384,
        embed_layers: int = 1,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(dim, n_classes)
        if embed_layers < 1:
            raise UsageError(f"embed_layers={embed_layers}: at least one, or embed_dim=None for no embedding")
        layers: list[nn.Module] = []
        width = dim
        if embed_dim is not None:
            for _ in range(embed_layers - 1):
                layers += [nn.Linear(width, embed_dim), nn.ReLU(), nn.Dropout(dropout)]
                width = embed_dim
            layers += [nn.Linear(width, embed_dim), nn.ReLU()]
            width = embed_dim
        self.embed = nn.Sequential(*layers)
        self.attention = self.scorer(width, attention_dim, dropout=dropout)
        self.classifier = nn.Linear(width, n_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, batch: Batch) -> MILOutput:
        """Equations 7 to 9."""
        h = in_chunks(self.embed, batch.features, mask=batch.mask) if len(self.embed) else batch.features  # (B, N, E)
        scores, attention = masked_softmax(
            in_chunks(self.attention, h, mask=batch.mask).transpose(1, 2), batch.mask
        )  # (B, 1, N)
        embedding = pool(attention, h).squeeze(1)  # (B, E)
        logits = self.classifier(embedding)  # (B, C)
        return MILOutput(logits, attention, scores, embedding, no_parts(logits))

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layouts of MIL-Lab (FEATHER) and of AMLab's AttentionDeepMIL.

        AMLab's convolutional trunk for digits is left out: ``features`` are what it puts out (500 wide). Its classifier
        has one logit, of the positive class. With ``n_classes`` a slide encoder of MIL-Lab gets a new classifier, for
        fine-tuning, in place of what it has, if it has one.
        """
        found = PublishedState(state)
        if found.has("patch_embed."):
            return cls._from_millab(found, **hyper)
        names = cls._names_amlab()
        attention_dim, dim = found[f"{names['attention.content']}.weight"].shape
        model = cls(dim, len(found["classifier.0.weight"]), embed_dim=None, attention_dim=attention_dim, **hyper)
        return load_published(model, found, names, unused=("feature_extractor_part",))

    @classmethod
    def _from_millab(cls, found: PublishedState, n_classes: int | None = None, **hyper: Any) -> Self:
        names = cls._names_millab()
        model = cls(
            found["patch_embed.0.weight"].shape[1],
            len(found["classifier.weight"]) if n_classes is None else n_classes,
            embed_dim=len(found["patch_embed.0.weight"]),
            attention_dim=len(found[f"{names['attention.content']}.weight"]),
            embed_layers=sum(key.startswith("patch_embed.") and key.endswith(".weight") for key in found),
            **hyper,
        )
        if n_classes is None:
            return load_published(model, found, names)
        return load_published(model, found, names, unused=("classifier.",), new="classifier")

    @staticmethod
    def _names_millab() -> Mapping[str, str]:
        return {
            "embed": "patch_embed",
            "attention.content": "global_attn.module.0",
            "attention.score": "global_attn.module.3",
        }

    @staticmethod
    def _names_amlab() -> Mapping[str, str]:
        return {"attention.content": "attention.0", "attention.score": "attention.2", "classifier": "classifier.0"}


class GatedABMIL(ABMIL):
    """Gated attention pooling; arguments as ``ABMIL``."""

    scorer = GatedAttentionScore

    @staticmethod
    def _names_millab() -> Mapping[str, str]:
        return {
            "embed": "patch_embed",
            "attention.content": "global_attn.attention_a.0",
            "attention.gate": "global_attn.attention_b.0",
            "attention.score": "global_attn.attention_c",
        }

    @staticmethod
    def _names_amlab() -> Mapping[str, str]:
        return {
            "attention.content": "attention_V.0",
            "attention.gate": "attention_U.0",
            "attention.score": "attention_w",
            "classifier": "classifier.0",
        }
