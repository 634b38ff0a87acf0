"""Extract one slide into memory: tiles in, vectors out. And what the stages of a cohort's pipeline are linked by."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from features.encoder import Encoder
from features.runner import EncoderRunner, Encoding, batch_memory
from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.stream import TileBatch, TileJob, default_read_threads, stream_jobs

__all__ = ["Conveyor", "encode_batches", "encode_slide", "prefetch"]

Item = TypeVar("Item")


def encode_slide(
    slide: Slide, grid: TileGrid, encoder: Encoder | EncoderRunner, *, batch_size: int = 64, threads: int | None = None
) -> NDArray[np.float32]:
    """(N, D) vectors of a slide's tiles in memory, for a notebook; NaN where a tile could not be read.

    ``features.cohort.extract_slides`` does the same into a store, resumable.
    """
    runner = encoder if isinstance(encoder, EncoderRunner) else EncoderRunner(encoder)
    vectors = np.full((len(grid), runner.encoder.dim), np.nan, np.float32)
    for first, part in encode_batches(slide, grid, runner, batch_size=batch_size, threads=threads):
        vectors[first : first + len(part)] = part
    return vectors


def encode_batches(
    slide: Slide, grid: TileGrid, runner: EncoderRunner, *, batch_size: int = 64, threads: int | None = None
) -> Generator[tuple[int, NDArray[np.float32]], None, None]:
    """The vectors of a slide's tiles as they come: the row of the first tile and (B, D), NaN where one cannot be read.

    Tiles are decoded while those before are encoded, and on a GPU copied in as well.
    """
    job = TileJob(slide, grid)
    threads = threads or default_read_threads()
    memory = batch_memory(runner.encoder.device)
    flying: deque[tuple[TileBatch, Encoding]] = deque()
    for batch in stream_jobs([job], batch_size=batch_size, threads=threads, allocate=memory):
        if job.error is not None:
            raise job.error
        if not len(batch):
            continue
        pixels = batch.pixels if batch.readable.all() else batch.pixels[batch.readable]
        flying.append((batch, runner.start(pixels)))
        if len(flying) >= runner.in_flight:
            yield _landed(*flying.popleft())
    while flying:
        yield _landed(*flying.popleft())


def _landed(batch: TileBatch, encoding: Encoding) -> tuple[int, NDArray[np.float32]]:
    encoded = encoding.result().vectors
    vectors = np.full((len(batch), encoded.shape[1]), np.nan, np.float32)
    vectors[batch.readable] = encoded
    batch.release()
    return batch.start, vectors


class Conveyor(Generic[Item]):
    """Carries items from other threads to the one that iterates; at most ``depth`` are on it.

    What a source raises is raised where the items are taken. It ends when all sources have.
    """

    def __init__(self, depth: int) -> None:
        self._items: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def put(self, item: Item) -> bool:
        """Wait for room and add an item; False when nobody takes any more."""
        return self._put((False, item))

    def feed(self, make: Callable[[], Iterable[Item]]) -> None:
        """Take the items of an iterable, made and run in a thread of its own."""
        thread = threading.Thread(target=self._run, args=(make,), name="conveyor", daemon=True)
        self._threads.append(thread)
        thread.start()

    def __iter__(self) -> Iterator[Item]:
        ended = 0
        while ended < len(self._threads):
            last, value = self._items.get()
            if not last:
                yield value  # type: ignore[misc]  # not an error and not the end, so an item
            elif isinstance(value, BaseException):
                raise value
            else:
                ended += 1

    def close(self) -> None:
        """Stop the sources before their next items, and wait for them."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _put(self, entry: tuple[bool, Item | BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._items.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _run(self, make: Callable[[], Iterable[Item]]) -> None:
        try:
            source = iter(make())
            try:
                for item in source:
                    if not self.put(item):
                        break
            finally:
                close = getattr(source, "close", None)
                if close is not None:
                    close()
            self._put((True, None))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self._put((True, error))


def prefetch(make: Callable[[], Iterable[Item]], depth: int) -> Generator[Item, None, None]:
    """Items of an iterable that runs in a thread of its own, at most ``depth`` items ahead.

    What it raises is raised here. Leaving the loop early stops the thread before the next item.
    """
    conveyor: Conveyor[Item] = Conveyor(depth)
    with closing(conveyor):
        conveyor.feed(make)
        yield from conveyor
