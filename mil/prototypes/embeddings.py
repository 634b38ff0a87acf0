"""Embeddings: one vector a slide, written into a store and read from it as a matrix."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.embedding import SlideEmbedding
from features.store import FeatureStore
from mil.embedding import Embedding, EmbedReport, Outcome, embed_store, usual_name
from mil.prototypes.embedder import Embedder
from mil.prototypes.embedders import build_embedder
from mil.prototypes.prototypes import Prototypes
from mil.prototypes.tiles import rows_of
from mil.sources import StoreSource, encoder_of
from wsi.errors import NotExtractedError, RunMismatchError, UsageError

__all__ = ["Embeddings", "embed_slides"]


def embed_slides(
    store: FeatureStore | str | Path,
    prototypes: Prototypes | None,
    method: Embedder | str = "panther",
    *,
    encoder: str | None = None,
    name: str | None = None,
    replace: bool = False,
    done: Callable[[str, Outcome], None] | None = None,
) -> EmbedReport:
    """Write one vector a slide into a store. What is there, made of the same, is not made again.

    A slide that cannot be read is written down and the next one is taken. Memory does not grow with a slide.

    Args:
        prototypes: what tiles are measured against; None for methods that need none.
        method: a name of ``EMBEDDERS``, with its defaults, or a method with its hyper-parameters.
        encoder: whose features; by default that of the prototypes, or the only one that the store has.
        name: of the embedding; by default method and encoder, such as ``panther-uni2-h``.
        replace: make anew what was made otherwise.
        done: is told each slide, by its key, and what became of it.

    Raises:
        RunMismatchError: the store's features are not those that the prototypes were fitted on.
        UsageError: prototypes are missing, or no encoder is named.
        NotExtractedError: no slide has features of the encoder.
    """
    store = store if isinstance(store, FeatureStore) else FeatureStore(store)
    method = build_embedder(method) if isinstance(method, str) else method
    if method.needs_prototypes and prototypes is None:
        raise UsageError(f"{method.name} needs prototypes; make them with fit_prototypes or wsi prototypes fit")
    if encoder is not None:
        encoders: tuple[str, ...] = (encoder,)
    else:
        encoders = (prototypes.encoders if prototypes is not None else ()) or (encoder_of(store),)
    source = StoreSource(store, encoders)
    facts = {"method": method.name, "hyper": method.hyper, "features": dict(source.facts), "prototypes": None}
    if method.needs_prototypes and prototypes is not None:
        prototypes.check(source.facts, where=str(store.root))
        facts["prototypes"] = prototypes.digest
    facts = json.loads(json.dumps(facts))  # as it will read back
    name = name or usual_name(method.name, [source])

    @torch.inference_mode()
    def parts(key: str) -> dict[str, NDArray[np.float32]]:
        stored = rows_of(source, key)
        rows, centres = method.rows(stored, prototypes), method.centres(next(iter(stored)), prototypes)
        return {part: value.numpy() for part, value in method.slide(rows, centres).items()}

    return embed_store([source], Embedding(name, facts, parts, replace), done)


@dataclass(frozen=True, eq=False)
class Embeddings:
    """One vector for each of S slides.

    Attributes:
        name: of the embedding.
        slides: (S,) keys in the store, sorted.
        matrix: (S, E) float32, a row a slide.
        shapes: shape of each part of a vector, in order.
        facts: how they were made: method, hyper-parameters, features, digest of the prototypes.
    """

    name: str
    slides: tuple[str, ...]
    matrix: NDArray[np.float32]
    shapes: dict[str, tuple[int, ...]]
    facts: dict[str, Any]

    def __len__(self) -> int:
        """Number of slides."""
        return len(self.slides)

    @classmethod
    def from_store(
        cls, store: FeatureStore | str | Path, name: str | None = None, *, slides: Sequence[str] | None = None
    ) -> "Embeddings":
        """The embeddings of this name, such as ``panther-uni2-h``.

        Args:
            name: may be left out where the store has one.
            slides: which, by key, relative path, file name or stem; by default all that have one.

        Raises:
            NotExtractedError: there are none, or a slide that was named has none.
            UsageError: no name, and there are several.
            RunMismatchError: they were not all made of the same.
        """
        store = store if isinstance(store, FeatureStore) else FeatureStore(store)
        name = name or _only_name(store)
        keys = store.keys if slides is None else tuple(sorted({store.key_of(slide) for slide in slides}))
        found: dict[str, SlideEmbedding] = {}
        for key in keys:
            slide = store.slide(key)
            if slides is not None or slide.embedding_path(name).exists():
                found[key] = slide.embedding(name)
        if not found:
            raise NotExtractedError(
                f"{store.root}: no slide has an embedding {name!r} (there are: {', '.join(_names(store)) or 'none yet'}); "
                f"make it with wsi prototypes embed"
            )
        first = next(iter(found.values()))
        for key, each in found.items():
            if each.facts != first.facts:
                raise RunMismatchError(
                    f"{store.root}: the embeddings {name!r} of {next(iter(found))} and {key} were made differently; run wsi "
                    f"prototypes embed with --replace"
                )
        matrix = np.stack([each.numpy() for each in found.values()])
        return cls(name, tuple(found), matrix, first.shapes, first.facts)

    def part(self, name: str) -> NDArray[np.float32]:
        """(S, …) one part of every slide, such as ``"importance"``.

        Raises:
            UsageError: the vectors have no such part.
        """
        start = 0
        for part, shape in self.shapes.items():
            size = int(np.prod(shape))
            if part == name:
                return self.matrix[:, start : start + size].reshape(len(self), *shape)
            start += size
        raise UsageError(f"{self.name} has no part {name!r}; it has {', '.join(self.shapes)}")

    def __repr__(self) -> str:
        return f"<Embeddings {self.name}: {len(self)} slides × {self.matrix.shape[1]}>"


def _names(store: FeatureStore) -> list[str]:
    return sorted({each.name for each in store.embeddings})


def _only_name(store: FeatureStore) -> str:
    there = _names(store)
    if not there:
        raise NotExtractedError(f"{store.root}: holds no embeddings yet; make them with wsi prototypes embed")
    if len(there) > 1:
        raise UsageError(f"{store.root}: holds embeddings {', '.join(there)}; say which (wsi search: --embedding)")
    return there[0]
