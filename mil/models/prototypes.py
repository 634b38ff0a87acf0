"""Heads on slide embeddings: a fixed method makes one vector of a bag, and a linear classifier is trained on it.

Methods and sources: mil/prototypes. The head is the one of Song et al. (PANTHER), CVPR 2024: no bias, no hidden layer.
Differs from the published protocol: prototypes are fitted anew for each model, on its own training bags.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mil.bag import Batch
from mil.models.base import Bags, MILModel, MILOutput, PublishedState, State, load_published, masked_softmax, no_parts
from mil.prototypes.counts import ProtoCounts
from mil.prototypes.embedder import Embedder, SlideVectors
from mil.prototypes.h2t import H2T
from mil.prototypes.moments import MeanVariance
from mil.prototypes.ot import OptimalTransport
from mil.prototypes.quantiles import Quantiles
from wsi.errors import UsageError

__all__ = ["H2TMIL", "OTMIL", "EmbeddingMIL", "MeanVarianceMIL", "ProtoCountsMIL", "PrototypeMIL", "QuantilesMIL"]

_POOL_TILES = 50_000  # tiles that prototypes are fitted on


class EmbeddingMIL(MILModel):
    """A linear classifier on ``width`` numbers that ``embedder`` makes of a bag.

    Attention of a tile is how common its kind is in the slide: the sum over prototypes of what belongs of the tile to the
    prototype, times the share of all tiles that belongs there, brought to the sum of one. It is uniform for a method
    without prototypes. It says what a slide mostly is, not what the classifier uses; importance and gradients
    (``mil.explain``) do. Scores are its logarithm. No gradient flows through either.
    """

    def __init__(self, dim: int, n_classes: int, embedder: Embedder, width: int) -> None:
        super().__init__(dim, n_classes)
        self.embedder = embedder
        self.classifier = nn.Linear(width, n_classes, bias=False)

    def forward(self, batch: Batch) -> MILOutput:
        """Linear(vector of the bag)."""
        vectors, member = self.embedder.describe(batch, self.prototypes())
        embedding = self.slide_features(vectors)  # (B, E)
        with torch.no_grad():  # member is (B, N, K), 0 at padding
            common = member.sum(1) / batch.mask.sum(1, keepdim=True)  # (B, K)
            kind = torch.einsum("bnk,bk->bn", member, common)  # (B, N)
            scores, attention = masked_softmax(kind.log()[:, None], batch.mask)  # (B, 1, N)
        logits = self.classifier(embedding)  # (B, C)
        return MILOutput(logits, attention, scores, embedding, no_parts(logits))

    def slide_features(self, vectors: SlideVectors) -> Tensor:
        """(B, E): what the classifier sees of the slides' vectors."""
        return vectors.vector

    def prototypes(self) -> Tensor | None:
        """(K, D), for a method that has them."""
        return None

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of PANTHER's linear head: ``classifier.weight``."""
        found = PublishedState(state)
        n_classes, width = found["classifier.weight"].shape
        per_feature = cls(1, n_classes, **hyper).classifier.in_features
        return load_published(cls(width // per_feature, n_classes, **hyper), found, {})


class PrototypeMIL(EmbeddingMIL):
    """A classifier on a vector around K prototypes, which belong to the model's state.

    Until ``prepare`` has fitted them, or a state with prototypes has been loaded, the model answers nothing.
    """

    centres: Tensor

    def __init__(self, dim: int, n_classes: int, embedder: Embedder, k: int, width: int | None = None) -> None:
        if k < 1:
            raise UsageError(f"k={k}: at least one prototype is needed")
        super().__init__(dim, n_classes, embedder, _length(embedder, dim, k) if width is None else width)
        self.register_buffer("centres", torch.full((k, dim), torch.nan))

    def prepare(self, bags: Bags, seed: int) -> None:
        """Fit the prototypes by k-means on tiles drawn from all bags alike."""
        from mil.prototypes.fitting import fit_prototypes  # it imports the training, which imports the models
        from mil.prototypes.tiles import SlideSet

        fitted = fit_prototypes(SlideSet.from_bags(bags), len(self.centres), seed=seed, n_tiles=_POOL_TILES)
        with torch.no_grad():
            self.centres.copy_(fitted.tensor)

    def prototypes(self) -> Tensor:
        """(K, D).

        Raises:
            UsageError: they have not been fitted.
        """
        if bool(self.centres[0, 0].isnan()):
            raise UsageError("the model has no prototypes yet; train it, or call prepare with its training bags")
        return self.centres

    @classmethod
    def from_published(cls, state: State, **hyper: Any) -> Self:
        """Layout of PANTHER's linear head, ``classifier.weight``, and ``prototypes`` (1, K, D) of its prototype file."""
        found = PublishedState(state)
        found["prototypes"] = found["prototypes"].reshape(-1, found["prototypes"].shape[-1])
        k, dim = found["prototypes"].shape
        model = cls(dim, len(found["classifier.weight"]), **{"k": k, **hyper})
        return load_published(model, found, {"centres": "prototypes"})


class ProtoCountsMIL(PrototypeMIL):
    """How many tiles are nearest to each prototype."""

    def __init__(self, dim: int, n_classes: int, *, k: int = 16) -> None:
        super().__init__(dim, n_classes, ProtoCounts(), k)


class H2TMIL(PrototypeMIL):
    """Means of the tiles nearest to each prototype, on the unit sphere."""

    def __init__(self, dim: int, n_classes: int, *, k: int = 16) -> None:
        super().__init__(dim, n_classes, H2T(), k)


class OTMIL(PrototypeMIL):
    """Means of the tiles that optimal transport moves to each prototype.

    Args:
        eps: strength of the entropy, in units of distance between scaled features.
    """

    def __init__(self, dim: int, n_classes: int, *, k: int = 16, eps: float = 0.1, iterations: int = 100) -> None:
        super().__init__(dim, n_classes, OptimalTransport(eps, iterations), k)


class MeanVarianceMIL(EmbeddingMIL):
    """Mean and variance of the tiles."""

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__(dim, n_classes, MeanVariance(), 2 * dim)


class QuantilesMIL(EmbeddingMIL):
    """Quantiles of each feature over the tiles."""

    default_levels: ClassVar[tuple[float, ...]] = Quantiles().levels

    def __init__(self, dim: int, n_classes: int, *, levels: tuple[float, ...] = default_levels) -> None:
        super().__init__(dim, n_classes, Quantiles(levels), len(levels) * dim)


def _length(embedder: Embedder, dim: int, k: int) -> int:
    """Length of the vectors: that of a slide of one tile of zeros, which is the length of any other's."""
    return embedder.embed(torch.zeros(1, dim), torch.zeros(k, dim)).vector.shape[1]
