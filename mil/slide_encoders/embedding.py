"""Embedding a store: one vector a slide by a slide encoder, written into the store beside the features."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features.store import FeatureStore
from mil.bag import Bag
from mil.embedding import Embedding, EmbedReport, Outcome, embed_store, usual_name
from mil.slide_encoders.cobra import COBRA
from mil.slide_encoders.loading import LoadedSlideEncoder
from mil.sources import StoreSource, encoder_of
from wsi.errors import UsageError

__all__ = ["EncodeOptions", "encode_slides", "remarks"]

_MPP_TOLERANCE = 0.1


@dataclass(frozen=True)
class EncodeOptions:
    """What is pooled, and what the vectors are called.

    Attributes:
        encoder: whose features; by default the only one that the store has.
        average: COBRA only: weights from ``encoder``'s features, the mean of those of this one.
        name: of the vectors in the store; by default slide encoder and tile encoder, such as ``cobra-uni``.
        replace: make anew what was made otherwise.
    """

    encoder: str | None = None
    average: str | None = None
    name: str | None = None
    replace: bool = False


def encode_slides(
    store: FeatureStore | str | Path,
    loaded: LoadedSlideEncoder,
    options: EncodeOptions | None = None,
    *,
    done: Callable[[str, Outcome], None] | None = None,
) -> EmbedReport:
    """Write one vector a slide into a store: part ``vector`` (E,). What is there, made of the same, is not made again.

    A slide that cannot be read is written down and the next one is taken. ``mil.prototypes.Embeddings`` reads them all.

    Args:
        done: is told each slide, by its key, and what became of it.

    Raises:
        UsageError: no encoder is named, its vectors have a length that the slide encoder does not take, or ``average``
            is asked of another encoder than COBRA.
        NotExtractedError: no slide has features of the encoder.
    """
    options = options or EncodeOptions()
    store = store if isinstance(store, FeatureStore) else FeatureStore(store)
    weighed = StoreSource(store, [options.encoder or encoder_of(store)])
    averaged = None if options.average is None else StoreSource(store, [options.average])
    if averaged is not None and not isinstance(loaded.encoder, COBRA):
        raise UsageError(f"{loaded.spec.name}: only COBRA weighs one encoder's tiles and takes the mean of another's")
    width, _ = _width(weighed, loaded)
    loaded.encoder.check_width(width)
    sources = [weighed] if averaged is None else [weighed, averaged]
    facts = {
        "method": "slide-encoder", "slide_encoder": loaded.identity, "width": width,
        "features": [dict(source.facts) for source in sources],
    }  # fmt: skip
    facts = json.loads(json.dumps(facts))  # as it will read back
    name = options.name or usual_name(loaded.spec.name, sources)

    def parts(key: str) -> dict[str, NDArray[np.float32]]:
        return {"vector": _vector(loaded, [source.read(key) for source in sources], width)}

    return embed_store(sources, Embedding(name, facts, parts, options.replace), done)


def remarks(store: FeatureStore, loaded: LoadedSlideEncoder, options: EncodeOptions) -> tuple[str, ...]:
    """What a person should know before these vectors are used: other tiles than the encoder was trained on."""
    _, said = _width(StoreSource(store, [options.encoder or encoder_of(store)]), loaded)
    wanted = loaded.spec.mpp
    if wanted is not None and abs(store.tiling.mpp / wanted - 1) > _MPP_TOLERANCE:
        said = (*said, f"{loaded.spec.name} was trained on tiles of {wanted:.3g} mpp; these have {store.tiling.mpp:g}")
    return said


def _width(source: StoreSource, loaded: LoadedSlideEncoder) -> tuple[int, tuple[str, ...]]:
    facts = source.facts
    return loaded.tiles_of(str(facts["encoder"][0]), int(facts["dim"][0]))


def _vector(loaded: LoadedSlideEncoder, bags: list[Bag], width: int) -> NDArray[np.float32]:
    """(E,) of bags of the encoder that is weighed and, with COBRA, perhaps of the one that is averaged."""
    weighed = Bag(bags[0].features[:, :width], bags[0].xy, bags[0].key)
    if len(bags) == 2 and isinstance(loaded.encoder, COBRA):
        found = loaded.encoder.encode_pair(weighed, bags[1])
    else:
        found = loaded.encoder.encode(weighed)
    return np.asarray(found.vector.numpy())
