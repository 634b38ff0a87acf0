"""StoredExamples: what a refinement network learns from, a folder a slide; read from disk when they are asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from segmentation.fit import Example
from wsi._files import make_folder_atomically

__all__ = ["StoredExamples", "save_example"]


def save_example(folder: Path, example: Example) -> None:
    """Write an example; the folder is whole or not there."""
    with make_folder_atomically(folder) as staging:
        staging.mkdir()
        np.save(staging / "image.npy", example.image)
        np.save(staging / "heat.npy", example.heat)
        np.save(staging / "mask.npy", example.mask)


class StoredExamples(Sequence[Example]):
    """Examples in folders; memory holds what of them is looked at."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)

    def __len__(self) -> int:
        return len(self._folders)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> "StoredExamples": ...
    def __getitem__(self, row: int | slice) -> "Example | StoredExamples":
        if isinstance(row, slice):
            return StoredExamples(self._folders[row])
        image, heat, mask = (
            np.load(self._folders[row] / name, mmap_mode="r") for name in ("image.npy", "heat.npy", "mask.npy")
        )
        return Example(image, heat, mask)

    def draw(self, rng: np.random.Generator) -> Example:
        """One of them by chance; a ``Draw``."""
        return self[int(rng.integers(len(self)))]
