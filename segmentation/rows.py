"""Rows of a probability map as classes, made when they are asked for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["KindRows", "LabelRows", "LikeliestRows"]


class _Rows:
    """(H, W) numbers from (K, H, W) probabilities, background the first; what was not scored is background for sure."""

    def __init__(self, probabilities: Any) -> None:
        self._probabilities = probabilities
        self.shape: tuple[int, ...] = probabilities.shape[1:]
        self.chunks: tuple[int, ...] = (getattr(probabilities, "chunks", None) or (0, 1, 1))[1:]

    def _read(self, rows: slice) -> NDArray[np.floating[Any]]:
        values: NDArray[np.floating[Any]] = np.array(self._probabilities[:, rows])
        silent = np.isnan(values).any(axis=0)
        values[:, silent] = 0
        values[0, silent] = 1
        return values


class LabelRows(_Rows):
    """uint8 likeliest classes."""

    def __getitem__(self, rows: slice) -> NDArray[np.uint8]:
        return np.asarray(self._read(rows).argmax(0), np.uint8)


class KindRows(_Rows):
    """uint8 likeliest classes where anything but background is likely enough, one that is only a part of others left out."""

    def __init__(self, probabilities: Any, part: int, threshold: float) -> None:
        super().__init__(probabilities)
        self._part = part
        self._threshold = threshold

    def __getitem__(self, rows: slice) -> NDArray[np.uint8]:
        values = self._read(rows)
        there = values[1:].sum(0) > self._threshold
        values[self._part] = -1
        return np.asarray(np.where(there, values[1:].argmax(0) + 1, 0), np.uint8)


class LikeliestRows(_Rows):
    """float32 probability of the likeliest class."""

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        return np.asarray(self._read(rows).max(0), np.float32)
