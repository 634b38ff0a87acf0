"""SlideEmbedding: one vector of a whole slide in a store, in named parts."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.arrays import open_array, read_rows

__all__ = ["SlideEmbedding"]


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
