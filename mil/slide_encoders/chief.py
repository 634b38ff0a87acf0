"""CHIEF: attention over tiles of the CHIEF patch encoder; the slide is the weighted mean of the features themselves.

Wang et al.: A pathology foundation model for cancer diagnosis and prognosis prediction, Nature 2024.
Differs from the authors' code: batches with padding; the instance losses of pre-training are left out.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mil.bag import Bag, Batch, collate
from mil.models.abmil import GatedAttentionScore
from mil.models.base import PublishedState, State, in_chunks, load_published, masked_softmax, pool
from mil.slide_encoders.base import SlideEmbedding, SlideEncoder, pool_tokens
from wsi.errors import UsageError

__all__ = ["CHIEF", "Anatomical"]


class Anatomical(NamedTuple):
    """What CHIEF says of a slide when it is told the organ.

    Attributes:
        logits: (2,), of no tumour and tumour.
        vector: (hidden,), the slide's vector with the organ's added: what the classifier sees.
        tiles: (N,), from 0 to 1, how much each tile speaks for a tumour.
    """

    logits: Tensor
    vector: Tensor
    tiles: Tensor


class CHIEF(SlideEncoder):
    """Gated attention on ReLU(Linear(x)); weighted mean of x.

    Args:
        dim: length of a tile's vector.
        hidden: width of what attention sees.
        attention_dim: hidden width of the attention.
        organs: rows of the table of organs, whose vectors come from the names as a text encoder puts them.
        text_dim: length of such a vector.
        dropout: after the embedding and in the attention.
    """

    def __init__(
        self,
        dim: int = 768,
        *,
        hidden: int = 512,
        attention_dim: int = 256,
        organs: int = 19,
        text_dim: int = 768,
        dropout: float = 0.25,
    ) -> None:
        super().__init__({
            "dim": dim, "hidden": hidden, "attention_dim": attention_dim, "organs": organs, "text_dim": text_dim,
            "dropout": dropout,
        })  # fmt: skip
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.attention = GatedAttentionScore(hidden, attention_dim, dropout=dropout)
        self.organ = nn.Sequential(nn.Linear(text_dim, hidden), nn.ReLU())
        self.classifier = nn.Linear(hidden, 2)
        self.organ_embedding: Tensor
        self.register_buffer("organ_embedding", torch.zeros(organs, text_dim))

    def forward(self, batch: Batch) -> SlideEmbedding:
        """(B, dim) means of the features; one row of attention."""
        self.check_width(batch.features.shape[-1])
        raw = in_chunks(lambda x: self.attention(self.embed(x)), batch.features)  # (B, N, 1)
        scores, attention = masked_softmax(raw.transpose(1, 2), batch.mask)  # (B, 1, N)
        return SlideEmbedding(pool(attention, batch.features).squeeze(1), attention, scores)

    @torch.no_grad()
    def anatomical(self, bag: Bag, organ: int) -> Anatomical:
        """Tumour or not, for a slide of this organ: a row of the authors' table. Puts the encoder into eval mode.

        Raises:
            UsageError: there is no such organ.
        """
        if not 0 <= organ < len(self.organ_embedding):
            raise UsageError(f"CHIEF knows organs 0 to {len(self.organ_embedding) - 1}, not {organ}")
        self.eval().check_width(bag.dim)
        batch = collate([bag]).to(self.device)
        told = self.organ(self.organ_embedding[organ])  # (hidden,)
        scores, pooled = pool_tokens(
            lambda x: self.embed(x)[:, :, None], lambda h: self.attention(h.squeeze(2)), batch
        )  # (1, 1, N), (1, 1, hidden)
        vector = pooled[0, 0] + told
        speaks = in_chunks(lambda x: self.classifier(self.embed(x) + told).softmax(-1)[..., 1:], batch.features)
        tiles = scores[0, 0].sigmoid() * speaks[0, :, 0]
        return Anatomical(self.classifier(vector).cpu(), vector.cpu(), tiles.cpu())

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of the authors; ``organ_embedding`` (their Text_emdding.pth) may be absent, then organs are all alike."""
        found = PublishedState(state)
        hidden, dim = found["attention_net.0.weight"].shape
        text_dim = found["text_to_vision.0.weight"].shape[1]
        if "organ_embedding" not in found:
            found["organ_embedding"] = torch.zeros(19, text_dim)
        model = cls(
            dim,
            hidden=hidden,
            attention_dim=len(found["attention_net.3.attention_a.0.weight"]),
            organs=len(found["organ_embedding"]),
            text_dim=text_dim,
            **hyper,
        )
        names = {
            "embed.0": "attention_net.0",
            "attention.content": "attention_net.3.attention_a.0",
            "attention.gate": "attention_net.3.attention_b.0",
            "attention.score": "attention_net.3.attention_c",
            "organ": "text_to_vision",
            "classifier": "classifiers",
        }
        return load_published(model, found, names, unused=("instance_classifiers.", "att_head."))
