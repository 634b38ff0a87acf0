"""EmbedReport: what became of the slides of a store that were to get a vector each; and the loop that gives it to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.lease import Lease
from features.store import FeatureStore, SlideStore
from features.writing import check_embedding, write_embedding
from mil.cohort import LeftOut
from mil.sources import StoreSource
from wsi.errors import EncoderChangedError, StoreError

__all__ = ["EmbedReport", "Embedding", "Failure", "Outcome", "embed_store", "usual_name"]

Outcome = Literal["done", "there already", "left out", "failed"]


class Failure(NamedTuple):
    """A slide that could not be embedded: its key, the stable code of the error, and what it said."""

    slide: str
    code: str
    message: str


@dataclass(frozen=True)
class EmbedReport:
    """What became of a store's slides.

    Attributes:
        name: of the embedding.
        done, skipped: keys of slides embedded now, and of those that were already.
        left_out: slides without tiles of the encoder, and why.
        failed: slides that should have been embedded.
    """

    name: str
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    failed: tuple[Failure, ...]


@dataclass(frozen=True)
class Embedding:
    """What vectors are called, and how one is made.

    Attributes:
        name: in the store.
        facts: what decides a vector, as JSON.
        parts: a slide's key → the parts of its vector, by name.
        replace: make anew what was made otherwise.
    """

    name: str
    facts: Mapping[str, Any]
    parts: Callable[[str], Mapping[str, NDArray[np.float32]]]
    replace: bool = False


def usual_name(method: str, sources: Sequence[StoreSource]) -> str:
    """What vectors are called unless a name is given, such as ``panther-uni2-h``: a method of two encoders' tiles makes two."""
    return f"{method}-{'+'.join(name for source in sources for name in source.facts['encoder'])}"


def embed_store(
    sources: Sequence[StoreSource], embedding: Embedding, done: Callable[[str, Outcome], None] | None = None
) -> EmbedReport:
    """Write one vector a slide into the store of these sources. What is there, made of the same, is not made again.

    A slide that lacks the tiles of a source is left out; one that cannot be read is written down, and the next is taken.

    Args:
        done: is told each slide, by its key, and what became of it.
    """
    store = sources[0].store
    weights = {
        encoder: sha
        for source in sources
        for encoder, sha in zip(source.encoders, source.facts["weights_sha256"], strict=True)
    }
    there: dict[Outcome, list[str]] = {"done": [], "there already": []}
    left_out: list[LeftOut] = []
    failed: list[Failure] = []
    for key in store.keys:
        outcome: Outcome
        try:
            lacks = next((reason for source in sources if (reason := source.lacks(key))), None)
            if lacks is not None:
                outcome = "left out"
                left_out.append(LeftOut(key, lacks))
            else:
                outcome = _embed_slide(store, key, weights, embedding)
                there[outcome].append(key)
        except StoreError as error:
            outcome = "failed"
            failed.append(Failure(key, error.code, str(error)))
        if done is not None:
            done(key, outcome)
    return EmbedReport(
        embedding.name, tuple(there["done"]), tuple(there["there already"]), tuple(left_out), tuple(failed)
    )


def _embed_slide(store: FeatureStore, key: str, weights: Mapping[str, str | None], embedding: Embedding) -> Outcome:
    slide = store.slide(key)
    _check_weights(slide, weights)
    try:
        if check_embedding(slide, embedding.name, embedding.facts):
            return "there already"
    except EncoderChangedError:
        if not embedding.replace:
            raise
    with Lease(store.root / ".locks", key):
        write_embedding(store, slide, embedding.name, embedding.facts, embedding.parts(key), replace=embedding.replace)
    return "done"


def _check_weights(slide: SlideStore, weights: Mapping[str, str | None]) -> None:
    for encoder, wanted in weights.items():
        if slide.features(encoder).manifest["encoder"].get("weights_sha256") != wanted:
            raise EncoderChangedError(
                f"{slide.path}: features of {encoder} were made with other weights than those of the other slides; extract "
                f"the slide again"
            )
