"""Embedding a store: one vector a slide by a slide encoder, written into the store beside the features."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.lease import Lease
from features.store import FeatureStore
from features.writing import check_embedding, write_embedding
from mil.bag import Bag
from mil.cohort import LeftOut
from mil.prototypes.embeddings import EmbedReport, Failure, Outcome, encoder_of
from mil.slide_encoders.cobra import COBRA
from mil.slide_encoders.loading import LoadedSlideEncoder
from mil.sources import StoreSource, has_features
from wsi.errors import EncoderChangedError, StoreError, UsageError

__all__ = ["EncodeOptions", "encode_slides", "remarks"]

_MPP_TOLERANCE = 0.1


@dataclass(frozen=True)
class EncodeOptions:
    """What is pooled, and what the vectors are called.

    Attributes:
        encoder: whose features; by default the only one that the store has.
        average: COBRA only: weights from ``encoder``'s features, the mean of those of this one.
        name: of the vectors in the store; by default the slide encoder's.
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
    name = options.name or loaded.spec.name
    lists: dict[Outcome, list[Any]] = {"done": [], "there already": [], "left out": [], "failed": []}
    for key in store.keys:
        try:
            outcome, entry = _encode_slide(sources, key, loaded, name, facts, options.replace)
        except StoreError as error:
            outcome, entry = "failed", Failure(key, error.code, str(error))
        lists[outcome].append(entry)
        if done is not None:
            done(key, outcome)
    return EmbedReport(name, *(tuple(entries) for entries in lists.values()))


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


def _encode_slide(
    sources: list[StoreSource], key: str, loaded: LoadedSlideEncoder, name: str, facts: dict[str, Any], replace: bool
) -> tuple[Outcome, Any]:
    store = sources[0].store
    slide = store.slide(key)
    lacking = [encoder for source in sources for encoder in source.encoders if not has_features(slide, encoder)]
    if lacking or any(source.n_good(key) == 0 for source in sources):
        return "left out", LeftOut(key, f"no features of {lacking[0]}" if lacking else "no tiles")
    for source, features in zip(sources, facts["features"], strict=True):
        weights = slide.features(source.encoders[0]).manifest["encoder"].get("weights_sha256")
        if weights != features["weights_sha256"][0]:
            raise EncoderChangedError(
                f"{slide.path}: features of {source.encoders[0]} were made with other weights than those of the other "
                f"slides; extract the slide again"
            )
    try:
        if check_embedding(slide, name, facts):
            return "there already", key
    except EncoderChangedError:
        if not replace:
            raise
    with Lease(store.root / ".locks", key):
        bags = [source.read(key) for source in sources]
        weighed = Bag(bags[0].features[:, : facts["width"]], bags[0].xy, key)
        if len(bags) == 2 and isinstance(loaded.encoder, COBRA):
            found = loaded.encoder.encode_pair(weighed, bags[1])
        else:
            found = loaded.encoder.encode(weighed)
        write_embedding(store, slide, name, facts, {"vector": found.vector.numpy()}, replace=replace)
    return "done", key
