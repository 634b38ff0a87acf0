"""SlideEmbedding: one vector of a whole slide in a store, in named parts."""

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.arrays import open_array, read_rows

__all__ = ["SlideEmbedding", "StoredEmbedding"]


class StoredEmbedding(NamedTuple):
    """What slides of a store have under one name: made by what, of whose features, of how many numbers, and how many have it."""

    name: str
    made_by: str
    encoders: tuple[str, ...]
    size: int
    n_slides: int


class SlideEmbedding:
    """A slide's vector, as ``wsi prototypes embed`` writes it.

    Attributes:
        manifest: how it was made; ``facts`` among it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the vector: method, its hyper-parameters, encoder, digest of the prototypes."""
        return dict(self.manifest["facts"])

    @property
    def made_by(self) -> str:
        """The method, such as ``panther``, or the name of the slide encoder."""
        facts = self.facts
        return str(facts["slide_encoder"]["name"] if "slide_encoder" in facts else facts["method"])

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders of whose features it was made."""
        features = self.facts.get("features", [])
        return tuple(
            str(name) for each in (features if isinstance(features, list) else [features]) for name in each["encoder"]
        )

    @property
    def size(self) -> int:
        """E, the length of the vector."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each part, in the order in which they make up the vector."""
        return {part: tuple(self.manifest["arrays"][part]["shape"]) for part in self.manifest["parts"]}

    def part(self, name: str) -> NDArray[np.float32]:
        """One part, such as ``"importance"`` (K,) or ``"variance"`` (K, D) of PANTHER.

        Raises:
            KeyError: the vector has no such part.
        """
        return np.asarray(read_rows(open_array(self.path / name), slice(0, self.shapes[name][0])))

    def numpy(self) -> NDArray[np.float32]:
        """(E,): all parts one after the other, each flattened in row order."""
        return np.concatenate([self.part(name).ravel() for name in self.shapes])

    def __repr__(self) -> str:
        parts = ", ".join(f"{part} {' × '.join(map(str, shape))}" for part, shape in self.shapes.items())
        return f"<SlideEmbedding {self.name}: {parts}>"
