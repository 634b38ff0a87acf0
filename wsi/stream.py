"""TileStream: a grid in, uint8 batches out, decoded by threads while the caller works on the batch before."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi.errors import ReadError
from wsi.grid import TileGrid
from wsi.readers.base import Pixels
from wsi.slide import Slide

__all__ = ["TileBatch", "TileStream", "default_read_threads"]


@dataclass(frozen=True)
class TileBatch:
    """Consecutive tiles of a grid.

    Attributes:
        start: the first tile's row in the grid.
        pixels: (B, tile_px, tile_px, 3) uint8. Where ``readable`` is False nothing is to be made of them.
        readable: (B,) whether the tile's pixels could be read.
    """

    start: int
    pixels: Pixels
    readable: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class TileStream:
    """The tiles of ``grid`` from ``first`` on, in grid order, as batches.

    Order and values depend on nothing but the grid. Memory is ``ahead + 1`` batches, whatever the slide's size. A tile
    that cannot be read is marked; the others go on.
    """

    slide: Slide
    grid: TileGrid
    batch_size: int = 64
    threads: int = 2
    ahead: int = 3
    first: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1 or self.ahead < 1:
            raise ValueError("batch_size, threads and ahead are at least 1")

    def __iter__(self) -> Iterator[TileBatch]:
        starts = iter(range(self.first, len(self.grid), self.batch_size))
        waiting: deque[tuple[TileBatch, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="read")
        try:
            for start in starts:
                waiting.append(self._submit(pool, start))
                if len(waiting) > self.ahead:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, start: int) -> tuple[TileBatch, list[Future[None]]]:
        count = min(self.batch_size, len(self.grid) - start)
        pixels = np.empty((count, self.grid.tile_px, self.grid.tile_px, 3), np.uint8)
        batch = TileBatch(start, pixels, np.ones(count, np.bool_))
        return batch, [pool.submit(self._fill, batch, row) for row in range(count)]

    def _fill(self, batch: TileBatch, row: int) -> None:
        try:
            batch.pixels[row] = self.slide.read_tile(self.grid, batch.start + row)
        except ReadError:
            batch.readable[row] = False  # marked, never replaced by made-up pixels


def default_read_threads() -> int:
    """As many as there are cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(8, cores))


def _finished(batch: TileBatch, tasks: list[Future[None]]) -> TileBatch:
    for task in tasks:
        task.result()
    return batch
