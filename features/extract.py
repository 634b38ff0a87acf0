"""Extract one slide: tiles in, vectors out. The loop, short enough to read at once."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from features.encoder import Encoder, EncoderRunner
from features.store import GOOD, NONFINITE, UNREADABLE
from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.stream import TileBatch, TileStream, default_read_threads

__all__ = ["encode_batch", "encode_slide", "prefetch"]

Item = TypeVar("Item")


class RowSink(Protocol):
    """Takes rows in grid order."""

    def write(self, vectors: NDArray[np.float32], status: NDArray[np.uint8]) -> None: ...


def encode_batch(batch: TileBatch, runner: EncoderRunner, sink: RowSink) -> None:
    """Vectors of one batch, in order, into ``sink``. Tiles that could not be read never reach the encoder."""
    status = np.where(batch.readable, GOOD, UNREADABLE).astype(np.uint8)
    vectors = np.full((len(batch), runner.encoder.dim), np.nan, np.float32)
    if batch.readable.any():
        encoded = runner.encode(batch.pixels if batch.readable.all() else batch.pixels[batch.readable])
        vectors[batch.readable] = encoded.vectors
        status[np.flatnonzero(batch.readable)[~encoded.finite]] = NONFINITE
    sink.write(vectors, status)


def encode_slide(
    slide: Slide, grid: TileGrid, encoder: Encoder | EncoderRunner, *, batch_size: int = 64, threads: int | None = None
) -> NDArray[np.float32]:
    """(N, D) vectors of a slide's tiles in memory, for a notebook; NaN where a tile could not be read.

    ``features.cohort.extract`` does the same into a store, resumable.
    """
    runner = encoder if isinstance(encoder, EncoderRunner) else EncoderRunner(encoder)
    rows = _Rows(len(grid), runner.encoder.dim)
    stream = TileStream(slide, grid, batch_size=batch_size, threads=threads or default_read_threads())
    for batch in stream:
        encode_batch(batch, runner, rows)
    return rows.vectors


class _Rows:
    def __init__(self, n: int, dim: int) -> None:
        self.vectors = np.empty((n, dim), np.float32)
        self._done = 0

    def write(self, vectors: NDArray[np.float32], status: NDArray[np.uint8]) -> None:
        self.vectors[self._done : self._done + len(vectors)] = vectors
        self._done += len(vectors)


def prefetch(make: Callable[[], Iterable[Item]], depth: int) -> Generator[Item, None, None]:
    """Items of an iterable that runs in a thread of its own, at most ``depth`` items ahead.

    What it raises is raised here. Leaving the loop early stops the thread before the next item.
    """
    items: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[bool, Item | BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                items.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        source = iter(make())
        try:
            for item in source:
                if not put((False, item)):
                    break
            put((True, None))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            put((True, error))
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            last, value = items.get()
            if last:
                if isinstance(value, BaseException):
                    raise value
                return
            yield value  # type: ignore[misc]  # not an error and not the end, so an item
    finally:
        stop.set()
        thread.join()
