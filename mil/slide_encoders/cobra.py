"""COBRA: a state-space model that weighs a slide's tiles; the slide is the weighted mean of their plain features.

Lenz, Neidlinger, Ligero, Wölflein, van Treeck, Kather: Unsupervised Foundation Model-Agnostic Slide-Level Representation
Learning, CVPR 2025. As only weights come out of the network, the mean may be of any other encoder's features.
Differs from the authors' code: runs on any device; padding is left out of the scan and the softmax; a bag of any size
is read in pieces; one head gives the same shapes as several.
"""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mil.bag import Bag, Batch
from mil.models.abmil import GatedAttentionScore
from mil.models.base import PublishedState, State, load_published, masked_softmax, pool
from mil.slide_encoders.base import SlideEmbedding, SlideEncoder
from mil.slide_encoders.mamba import Carry, Mamba2
from wsi.errors import BadFeaturesError, ModelMismatchError, UsageError

__all__ = ["COBRA", "Matched", "match_places"]

_PIECE_TILES = 2048


class Matched(NamedTuple):
    """Rows of two lists of places that lie at the same place, pair by pair, in the first one's order."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]


class _Layer(nn.Module):
    def __init__(self, width: int, state: int, head: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = Mamba2(width, state=state, head=head)

    def forward(self, u: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
        """What is added to tokens (B, n, width)."""
        found: tuple[Tensor, Carry] = self.mix(self.norm(u), carry)
        return found


class COBRA(SlideEncoder):
    """Embedding by input width, Mamba-2 layers, gated attention of several heads whose scores are averaged.

    Args:
        widths: lengths of tile vectors that it takes; each has an embedding of its own.
        width: of the tokens.
        layers: Mamba-2 blocks.
        heads: of the attention; head i sees every ``heads``-th channel of a token, from the i-th on.
        attention_dim: hidden width of each head.
        state: width of the state of a Mamba-2 channel.
        channels: inner channels of a Mamba-2 head.
        dropout: between layers, in training; embedding and attention have the authors' 0.25.
        top_k: only so many tiles of the largest weights count. As in the authors' code their weights, which sum to less
            than one, go through another softmax: they become nearly equal.
    """

    order_matters: ClassVar[bool] = True

    def __init__(
        self,
        widths: Iterable[int] = (768, 1024, 1280, 1536),
        *,
        width: int = 768,
        layers: int = 2,
        heads: int = 8,
        attention_dim: int = 96,
        state: int = 128,
        channels: int = 64,
        dropout: float = 0.25,
        top_k: int | None = None,
    ) -> None:
        if width % heads:
            raise UsageError(f"a width of {width} does not divide into {heads} heads")
        if top_k is not None and top_k < 1:
            raise UsageError(f"top_k is at least 1, not {top_k}")
        super().__init__({
            "widths": sorted(set(widths)), "width": width, "layers": layers, "heads": heads,
            "attention_dim": attention_dim, "state": state, "channels": channels, "dropout": dropout, "top_k": top_k,
        })  # fmt: skip
        self.top_k = top_k
        self.embed = nn.ModuleDict(
            {
                str(dim): nn.Sequential(
                    nn.LayerNorm(dim), nn.Linear(dim, width), nn.Dropout(0.25), nn.SiLU(), nn.Linear(width, width)
                )
                for dim in self.widths
            }
        )
        self.enter = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))
        self.layers = nn.ModuleList(_Layer(width, state, channels) for _ in range(layers))
        self.leave = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleList(
            GatedAttentionScore(width // heads, attention_dim, dropout=0.25) for _ in range(heads)
        )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self._facts["widths"])

    def forward(self, batch: Batch) -> SlideEmbedding:
        """(B, D) means of the features, one row of attention."""
        return self._pooled(batch, batch.features)

    @torch.no_grad()
    def encode_pair(self, weighed: Bag, averaged: Bag) -> SlideEmbedding:
        """Weights from one encoder's features, the mean of another's: (E,), (1, n), (1, n) for the n common tiles.

        Tiles are common where they have one place; they count in the order of ``weighed``.

        Raises:
            BadFeaturesError: the bags have no tile in common, or do not say where their tiles lie.
        """
        if weighed.xy is None or averaged.xy is None:
            raise BadFeaturesError(
                f"{weighed.key}: tiles of two encoders are matched by place, and a bag has no places"
            )
        rows = match_places(weighed.xy.numpy(), averaged.xy.numpy())
        if not len(rows.first):
            raise BadFeaturesError(f"{weighed.key}: two encoders have no tile in common; extract both with one tiling")
        first, second = (_rows(bag, at) for bag, at in zip((weighed, averaged), rows, strict=True))
        batch = Batch(first[None], torch.ones(1, len(first), dtype=torch.bool)).to(self.device)
        found = self.eval()._pooled(batch, second[None].to(self.device))
        return SlideEmbedding(*(part[0].cpu() for part in found))

    def tokens(self, x: Tensor) -> Iterator[Tensor]:
        """(B, n, width) tokens of consecutive tiles of features (B, N, D): all at once with gradients, else in pieces."""
        self.check_width(x.shape[-1])
        embed = self.embed[str(x.shape[-1])]
        step = x.shape[1] if torch.is_grad_enabled() else _PIECE_TILES
        carries: list[Carry | None] = [None] * len(self.layers)
        for start in range(0, x.shape[1], step):
            u = self.enter(embed(x[:, start : start + step].float()))  # (B, n, width)
            for i, layer in enumerate(self.layers):
                mixed, carries[i] = layer(u, carries[i])
                u = u + mixed
            yield self.norm(self.leave(u))

    def score(self, h: Tensor) -> Tensor:
        """(B, n) mean of the heads' raw scores of tokens (B, n, width)."""
        count = len(self.attention)
        of_heads = [head(h[..., i::count]).squeeze(-1) for i, head in enumerate(self.attention)]
        return torch.stack(of_heads).mean(0)

    def pooled_tokens(self, batch: Batch) -> Tensor:
        """(B, width) tokens pooled by the weights: what pre-training compares, where the slide's vector has features."""
        x, order = _packed(batch)
        mask = batch.mask if order is None else batch.mask.gather(1, order)
        h = torch.cat(list(self.tokens(x)), 1)  # (B, N, width)
        _, attention = masked_softmax(self.score(h)[:, None], mask)  # (B, 1, N)
        return (attention @ h.float()).squeeze(1)

    def _pooled(self, batch: Batch, values: Tensor) -> SlideEmbedding:
        x, order = _packed(batch)
        scores = torch.cat([self.score(h) for h in self.tokens(x)], 1)  # (B, N)
        if order is not None:  # back to where the tiles came from
            scores = torch.zeros_like(scores).scatter(1, order, scores)
        scores, attention = masked_softmax(scores[:, None], batch.mask)  # (B, 1, N)
        if self.top_k is not None:
            attention = _sharpened(attention, min(self.top_k, attention.shape[-1]), batch.mask)
        return SlideEmbedding(pool(attention, values).squeeze(1), attention, scores)

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layouts of the authors: pre-training (``momentum_enc.``), STAMP's (``cobra.``), or plain."""
        found = PublishedState(_own_part(state))
        widths = sorted({int(key.split(".")[1]) for key in found if key.startswith("embed.")})
        if not widths:
            raise ModelMismatchError("the published weights do not fit COBRA: missing embed.<width>.head.1.weight")
        heads, layers = found.count("attn.{}."), found.count("mamba_enc.layers.{}.")
        mixer = "mamba_enc.layers.0.1"
        width, inner = found[f"{mixer}.out_proj.weight"].shape
        model = cls(
            widths,
            width=width,
            layers=layers,
            heads=heads,
            attention_dim=len(found["attn.0.attention_a.0.weight"]),
            state=(len(found[f"{mixer}.conv1d.bias"]) - inner) // 2,
            channels=inner // len(found[f"{mixer}.D"]),
            **hyper,
        )
        names = {"enter": "mamba_enc._fc1", "leave": "mamba_enc.classifier"}
        names |= {f"embed.{dim}": f"embed.{dim}.head" for dim in widths}
        for i in range(layers):
            names |= {f"layers.{i}.norm": f"mamba_enc.layers.{i}.0", f"layers.{i}.mix": f"mamba_enc.layers.{i}.1"}
        for i in range(heads):
            names |= {
                f"attention.{i}.content": f"attn.{i}.attention_a.0",
                f"attention.{i}.gate": f"attn.{i}.attention_b.0",
            }
            names |= {f"attention.{i}.score": f"attn.{i}.attention_c"}
        return load_published(model, found, names, unused=("mamba_enc.norm.",))


def match_places(first: NDArray[np.int64], second: NDArray[np.int64]) -> Matched:
    """Rows of (N, 2) and (M, 2) places that both have.

    Raises:
        BadFeaturesError: one of them has a place twice.
    """
    at: list[dict[tuple[int, int], int]] = []
    for places in (first, second):
        at.append({(x, y): row for row, (x, y) in enumerate(places.tolist())})
        if len(at[-1]) != len(places):
            raise BadFeaturesError("two tiles lie at one place; tiles of two encoders cannot be matched")
    common = [place for place in at[0] if place in at[1]]
    rows = np.array([[each[place] for place in common] for each in at], np.int64).reshape(2, -1)
    return Matched(rows[0], rows[1])


def _own_part(state: State) -> State:
    inside, head = "momentum_enc.", "momentum_enc.proj"
    if any(inside in key for key in state):
        return {key.split(inside, 1)[1]: value for key, value in state.items() if inside in key and head not in key}
    if state and all(key.startswith("cobra.") for key in state):
        return {key.removeprefix("cobra."): value for key, value in state.items()}
    return state


def _packed(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Features with padding at the end of each bag, and from where each row came; a scan must not run through padding."""
    mask = batch.mask
    if not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return batch.features, None
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # (B, N)
    return batch.features.gather(1, order[..., None].expand_as(batch.features)), order


def _sharpened(attention: Tensor, k: int, mask: Tensor) -> Tensor:
    """The k largest weights of each row through a softmax of their own, the others 0."""
    values, at = attention.topk(k, -1)
    values = values.masked_fill(~mask[:, None].expand_as(attention).gather(-1, at), -torch.inf)
    return torch.zeros_like(attention).scatter(-1, at, values.softmax(-1))


def _rows(bag: Bag, rows: NDArray[np.int64]) -> Tensor:
    """The features at these rows; no copy where that is all of them in their order."""
    if len(rows) == len(bag) and np.array_equal(rows, np.arange(len(bag))):
        return bag.features
    return bag.features[torch.from_numpy(rows)]
