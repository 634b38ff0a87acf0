"""SlideEncoder: what every network is that makes one vector of a slide's tile features; SlideEmbedding, what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from mil.bag import Bag, Batch, collate
from mil.models.base import State
from wsi.errors import UsageError

__all__ = ["SlideEmbedding", "SlideEncoder", "pool_tokens"]

_CHUNK_TILES = 2048  # tiles whose tokens, several times as wide as the features, are held at once without gradients


class SlideEmbedding(NamedTuple):
    """What an encoder says of B slides of up to N tiles; all float32. ``encode`` has one slide, and no first axis.

    Attributes:
        vector: (B, E), the slide's embedding.
        attention: (B, K, N), how much each tile counts, for each of K heads: sums to one, 0 at padding.
        scores: (B, K, N), the attention before it is normalised; −inf at padding.
    """

    vector: Tensor
    attention: Tensor
    scores: Tensor


class SlideEncoder(nn.Module, ABC):
    """A bag of vectors in, one vector out. It is not trained with a slide's label; ``mil.models`` are.

    Args:
        facts: the arguments of the constructor, as JSON.

    Attributes:
        order_matters: whether the order of the tiles is information.
    """

    order_matters: ClassVar[bool] = False

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self._facts = dict(facts)

    def facts(self) -> dict[str, Any]:
        """The arguments of its constructor, as JSON."""
        return dict(self._facts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Lengths of the tile vectors that it takes, sorted."""
        return (int(self._facts["dim"]),)

    @property
    def heads(self) -> int:
        """K, the rows of its attention."""
        return 1

    @abstractmethod
    def forward(self, batch: Batch) -> SlideEmbedding:
        """The embedding of every bag; what a bag gets depends neither on the bags beside it nor on padding."""

    @classmethod
    @abstractmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """An encoder in eval mode with the authors' weights, in the authors' layout; sizes are deduced from it.

        Raises:
            ModelMismatchError: keys are missing or unexpected, or a shape does not fit.
        """

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def encode(self, bag: Bag) -> SlideEmbedding:
        """The embedding of one slide, on the CPU: (E,), (K, N), (K, N). Puts the encoder into eval mode.

        Memory beside the bag itself grows by a few numbers a tile.

        Raises:
            UsageError: the bag's vectors have a length that the encoder does not know.
        """
        found: SlideEmbedding = self.eval()(collate([bag]).to(self.device))
        return SlideEmbedding(*(part[0].cpu() for part in found))

    def check_width(self, width: int) -> None:
        """Refuse vectors of another length."""
        if width not in self.widths:
            takes = ", ".join(str(each) for each in self.widths)
            raise UsageError(
                f"{type(self).__name__} takes tile vectors of length {takes}, not {width}; "
                f"extract features with the patch encoder that it was trained on"
            )


def pool_tokens(
    tokens: Callable[[Tensor], Tensor], score: Callable[[Tensor], Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Scores of all tiles, and tokens pooled by the softmax of them, while the tokens of few tiles are there at a time.

    Args:
        tokens: features (B, n, D) float32 → tokens (B, n, K, E), each tile by itself.
        score: tokens → (B, n, K).

    Returns:
        (B, K, N) scores, −inf at padding; (B, K, E) pooled tokens. With gradients all tiles are taken at once.
    """
    n_tiles = batch.mask.shape[1]
    step = n_tiles if torch.is_grad_enabled() else _CHUNK_TILES
    scores: list[Tensor] = []
    top = total = pooled = None
    for start in range(0, n_tiles, step):
        part = slice(start, start + step)
        h = tokens(batch.features[:, part].float())  # (B, n, K, E)
        raw = score(h).float().transpose(1, 2).masked_fill(~batch.mask[:, None, part], -torch.inf)  # (B, K, n)
        scores.append(raw)
        # A softmax in pieces: sums are relative to the largest score so far, and brought along when it rises.
        here = raw.amax(-1).clamp_min(torch.finfo(raw.dtype).min).detach()  # (B, K); padding alone has none
        highest = here if top is None else torch.maximum(top, here)
        weights = (raw - highest[..., None]).exp()  # (B, K, n)
        mixed = torch.einsum("bkn,bnke->bke", weights, h.float())
        if top is None or total is None or pooled is None:
            total, pooled = weights.sum(-1), mixed
        else:
            shrink = (top - highest).exp()
            total, pooled = total * shrink + weights.sum(-1), pooled * shrink[..., None] + mixed
        top = highest
    assert total is not None
    assert pooled is not None
    return torch.cat(scores, -1), pooled / total[..., None]
