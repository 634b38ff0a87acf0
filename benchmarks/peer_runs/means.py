"""The free encoder that every engine runs: the mean of each colour, from 0 to 1. And the one form results leave in."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WORKERS, BATCH = 2, 64
TILE_PX, MPP, MIN_TISSUE = 256, 0.5, 0.25


class Means(nn.Module):
    """float (B, 3, H, W) from 0 to 1 → float32 (B, 3)."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3))


class MeansOfBytes(nn.Module):
    """uint8 (B, H, W, 3) → float32 (B, 3). Tile by tile: a batch in float32 would not fit a processor's cache."""

    def forward(self, pixels: Tensor) -> Tensor:
        rows = torch.stack([tile.to(torch.float32).flatten(1).mean(0) for tile in pixels])  # (B, W·3)
        return rows.view(len(pixels), -1, 3).mean(1) / 255


def build() -> nn.Module:
    """What ``wsi-extract --encoder means.py:build`` runs."""
    return MeansOfBytes()


def save(file: Path, slides: Mapping[str, tuple[NDArray[np.integer], NDArray[np.floating]]]) -> None:
    """Write level-0 corners (N, 2) and features (N, 3) by the slides' names without ending."""
    parts = {
        f"{name}/{what}": array
        for name, pair in slides.items()
        for what, array in zip(("xy", "means"), pair, strict=True)
    }
    np.savez(file, **parts)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
