"""Bag: the tiles of one slide as vectors; Batch: several bags side by side, padded, with a mask that says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi.errors import UsageError

__all__ = ["Bag", "Batch", "collate"]

_ROWS_AT_ONCE = 8192  # keeps the check for NaN from making a mask as large as the bag


@dataclass(frozen=True, eq=False)
class Bag:
    """The tiles of one slide.

    An array becomes a tensor; no copy is made unless the array is read-only.

    Attributes:
        features: (N, D) float16 or float32, one row a tile.
        xy: (N, 2) int64, top-left corner of each tile in level-0 pixels; None where the places are not known.
        key: the slide's key in its store, or any name that messages shall carry.

    Raises:
        UsageError: no tiles, not two-dimensional, another dtype, a value that is not finite, or places that do not fit.
    """

    features: Tensor
    xy: Tensor | None = None
    key: str = ""

    def __init__(
        self, features: Tensor | NDArray[Any], xy: Tensor | NDArray[np.int64] | None = None, key: str = ""
    ) -> None:
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "features", _tensor(features))
        object.__setattr__(self, "xy", None if xy is None else _tensor(xy))
        self._check()

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.features)

    def __repr__(self) -> str:
        return f"Bag({self.key!r}, {len(self)} tiles × {self.dim}, {self.features.dtype})"

    @property
    def dim(self) -> int:
        """Length of a tile's vector."""
        return self.features.shape[1]

    def _check(self) -> None:
        name, shape = f"bag {self.key!r}", tuple(self.features.shape)
        if self.features.ndim != 2:
            raise UsageError(f"{name}: features are (tiles, dim), not {shape}")
        if 0 in shape:
            raise UsageError(
                f"{name}: has no tiles ({shape[0]} × {shape[1]}); leave the slide out or lower the tissue threshold"
            )
        if self.features.dtype not in (torch.float16, torch.float32):
            raise UsageError(f"{name}: features are float16 or float32, not {self.features.dtype}")
        for start in range(0, len(self), _ROWS_AT_ONCE):
            finite = torch.isfinite(self.features[start : start + _ROWS_AT_ONCE]).all(1)
            if not finite.all():
                tile = start + int(finite.logical_not().nonzero()[0])
                raise UsageError(
                    f"{name}: the features of tile {tile} are not finite; read good tiles only (good_only=True)"
                )
        if self.xy is not None and (tuple(self.xy.shape) != (len(self), 2) or self.xy.dtype != torch.int64):
            raise UsageError(f"{name}: xy is ({len(self)}, 2) int64, not {tuple(self.xy.shape)} {self.xy.dtype}")


@dataclass(frozen=True, eq=False)
class Batch:
    """Several bags side by side.

    Attributes:
        features: (B, N, D) float16 or float32; zeros where there is no tile. Models compute in float32 in any case.
        mask: (B, N) bool, True where there is a tile.
        xy: (B, N, 2) level-0 pixels, or None.
    """

    features: Tensor
    mask: Tensor
    xy: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or self.mask.shape != self.features.shape[:2] or self.mask.dtype != torch.bool:
            raise UsageError(
                f"a batch has features (B, N, D) and a bool mask (B, N), not {tuple(self.features.shape)} "
                f"and {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        if self.xy is not None and self.xy.shape != (*self.mask.shape, 2):
            raise UsageError(f"xy of a batch is {(*self.mask.shape, 2)}, not {tuple(self.xy.shape)}")
        if not self.mask.any(1).all():
            raise UsageError("a batch holds a bag without tiles")

    def __len__(self) -> int:
        """Number of bags."""
        return len(self.mask)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        xy = None if self.xy is None else self.xy.to(device)
        return Batch(self.features.to(device), self.mask.to(device), xy)


def collate(bags: Sequence[Bag]) -> Batch:
    """Pad bags to the longest of them.

    Half precision stays half precision if all bags have it. The places are kept if all bags have them. A single bag is
    not copied.

    Raises:
        UsageError: no bags, or bags of different widths.
    """
    if not bags:
        raise UsageError("no bags to make a batch of")
    dims = sorted({bag.dim for bag in bags})
    if len(dims) > 1:
        raise UsageError(f"bags of one batch have one width, not {dims}; were they made by one encoder?")
    if len(bags) == 1:
        (bag,) = bags
        mask = torch.ones((1, len(bag)), dtype=torch.bool, device=bag.features.device)
        return Batch(bag.features[None], mask, None if bag.xy is None else bag.xy[None])
    places = [bag.xy for bag in bags if bag.xy is not None]
    lengths = torch.tensor([len(bag) for bag in bags], device=bags[0].features.device)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (B, N)
    dtype = torch.float16 if all(bag.features.dtype == torch.float16 for bag in bags) else torch.float32
    features = _padded([bag.features.to(dtype) for bag in bags], mask.shape[1])
    return Batch(features, mask, _padded(places, mask.shape[1]) if len(places) == len(bags) else None)


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Tensors (N_i, …) into one (B, length, …) with zeros at the ends."""
    padded = rows[0].new_zeros((len(rows), length, *rows[0].shape[1:]))
    for target, source in zip(padded, rows, strict=True):
        target[: len(source)] = source
    return padded


def _tensor(values: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(values, Tensor):
        return values
    # PyTorch has no read-only tensors and warns of sharing such memory.
    return torch.from_numpy(np.require(values, requirements=["C"]) if values.flags.writeable else values.copy())
