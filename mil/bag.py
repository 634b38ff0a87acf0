"""Bag, Batch: one slide's vectors with their places; several of them padded to one length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Bag", "Batch", "collate"]


@dataclass(frozen=True, eq=False)
class Bag:
    """One slide's tiles.

    Attributes:
        features: (N, D) float16 or float32.
        xy: (N, 2) int64 top-left corners in level-0 pixels, or None.
        key: the slide.
    """

    features: NDArray[np.floating]
    xy: NDArray[np.int64] | None = None
    key: str = ""

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, eq=False)
class Batch:
    """Bags padded to one length: features (B, N, D), mask (B, N) True = tile, xy (B, N, 2) or None."""

    features: Tensor
    mask: Tensor
    xy: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.features.to(device), self.mask.to(device), None if self.xy is None else self.xy.to(device))


def collate(bags: Sequence[Bag]) -> Batch:
    """Pad bags to the longest."""
    n = max(len(bag) for bag in bags)
    features = torch.zeros(len(bags), n, bags[0].features.shape[1])
    mask = torch.zeros(len(bags), n, dtype=torch.bool)
    places = all(bag.xy is not None for bag in bags)
    xy = torch.zeros(len(bags), n, 2, dtype=torch.int64) if places else None
    for i, bag in enumerate(bags):
        features[i, : len(bag)] = torch.from_numpy(np.asarray(bag.features, np.float32))
        mask[i, : len(bag)] = True
        if xy is not None and bag.xy is not None:
            xy[i, : len(bag)] = torch.from_numpy(bag.xy)
    return Batch(features, mask, xy)
