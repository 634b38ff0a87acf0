"""The free encoder that every engine runs: the mean of each colour, from 0 to 1. And the one form results leave in."""

from collections.abc import Mapping
from pathlib import Path

import cv2
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
    """uint8 (B, H, W, 3) on the CPU → float32 (B, 3). By OpenCV: torch would start its threads for every tile."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.tensor([cv2.mean(tile)[:3] for tile in pixels.numpy()], dtype=torch.float32) / 255


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
