"""Rows: the tiles of one slide a few thousand at a time, as often as they are asked for, in float32."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from features.arrays import read_rows, row_blocks
from features.store import GOOD, Features

__all__ = ["Rows", "ScaledRows", "StoredRows", "TensorRows"]

_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # of float32: what stays in a core's cache; what fills a GPU


class Rows(Protocol):
    """What methods read tiles from. Iterating yields (n, D) float32 blocks in order, each time from the start."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def whole(self) -> Tensor:
        """(N, D) in the precision in which the tiles are kept; for what cannot be done block by block."""
        ...


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Rows of (N, D) vectors in memory; half precision is widened block by block, never as a whole."""

    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[Tensor]:
        rows = max(1, _BLOCK_BYTES.get(self.x.device.type, _BLOCK_BYTES["cpu"]) // (4 * self.x.shape[1]))
        for start in range(0, len(self.x), rows):
            yield self.x[start : start + rows].float()

    def whole(self) -> Tensor:
        return self.x


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Other rows, each feature divided by its number of ``scale`` (D,)."""

    rows: Rows
    scale: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        for block in self.rows:
            yield block / self.scale.to(block.device)

    def whole(self) -> Tensor:
        whole = self.rows.whole().float()
        return whole / self.scale.to(whole.device)


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a store's features, read from disk shard by shard; tiles that could not be read are left out."""

    features: Features

    def __len__(self) -> int:
        return int((self.features.status == GOOD).sum())

    def __iter__(self) -> Iterator[Tensor]:
        for block in self._blocks():
            yield from TensorRows(block)

    def whole(self) -> Tensor:
        return torch.cat(list(self._blocks()))

    def _blocks(self) -> Iterator[Tensor]:
        for block in row_blocks(self.features.shape[0]):
            rows = read_rows(self.features.array, block)[self.features.status[block] == GOOD]
            if len(rows):
                yield torch.from_numpy(rows)
