"""TileStream: a grid in, uint8 batches out, decoded by threads while the caller works on the batch before.

Threads take the tiles in order, each with the cells it is made of and nobody has taken yet; whoever decodes the last cell
of a tile puts the tile together. Nobody waits for another's cell. What is kept in memory is the batches ahead, and the
cells that tiles further on will touch again.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi.area import area_resize
from wsi.cells import Cells, plan_cells
from wsi.errors import ReadError
from wsi.grid import TileGrid
from wsi.readers.base import Pixels, TiledReader, tile_memory
from wsi.slide import Slide

__all__ = ["TileBatch", "TileJob", "TileSpan", "TileStream", "available_cores", "default_read_threads", "stream_jobs"]

_NO_TILES = np.empty((0, 0, 0, 3), np.uint8)
_KEPT_BYTES = 256 << 20  # of decoded cells that wait for tiles further on; past it some are decoded again
_KEPT_CELLS = 64  # so many are kept whatever their size: those under the tiles being put together are among them


@dataclass(eq=False)
class TileJob:
    """The tiles of one slide from ``first`` on, to be streamed.

    Attributes:
        cells_needed: cells that these tiles touch, known once the job has begun.
        cells_decoded: how often one was decoded so far; more than needed only where memory did not suffice to keep them.
        error: what ended the job early, other than pixels that cannot be read.
    """

    slide: Slide
    grid: TileGrid
    first: int = 0
    cells_needed: int = field(default=0, init=False)
    cells_decoded: int = field(default=0, init=False)
    error: Exception | None = field(default=None, init=False)
    is_cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Deliver no more of its tiles than those that are on their way."""
        self.is_cancelled = True


@dataclass(frozen=True)
class TileSpan:
    """Consecutive tiles of one job in a batch: rows ``start`` to ``stop`` of the batch are tiles ``first`` on of its grid."""

    job: TileJob
    first: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def at(self) -> slice:
        """The rows of the batch."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class TileBatch:
    """Tiles of one slide, or of the end of one and the beginning of the next.

    Attributes:
        pixels: (B, tile_px, tile_px, 3) uint8. Where ``readable`` is False nothing is to be made of them.
        readable: (B,) whether the tile's pixels could be read.
        spans: which tiles of which jobs these are, in order.
        ended: jobs that have no tiles after these, in order. A batch of no tiles may carry some.
        release: call it to let a later batch have the memory of ``pixels``, which are not to be looked at any more then.
    """

    pixels: Pixels
    readable: NDArray[np.bool_]
    spans: tuple[TileSpan, ...]
    ended: tuple[TileJob, ...]
    release: Callable[[], None]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def start(self) -> int:
        """Row of the first tile in its grid."""
        return self.spans[0].first


@dataclass(frozen=True)
class TileStream:
    """The tiles of ``grid`` from ``first`` on, in grid order, as batches.

    Order and values depend on nothing but the grid. Memory is ``ahead + 1`` batches and a bounded store of decoded
    cells, whatever the slide's size. A tile that cannot be read is marked; the others go on.
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
        job = TileJob(self.slide, self.grid, self.first)
        for batch in stream_jobs([job], batch_size=self.batch_size, threads=self.threads, ahead=self.ahead):
            if job.error is not None:
                raise job.error
            if len(batch):
                yield batch


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def default_read_threads(processes: int = 1) -> int:
    """As many as there are cores for each of so many processes, at most 8."""
    return max(1, min(8, available_cores() // processes))


def stream_jobs(
    jobs: Iterable[TileJob],
    *,
    batch_size: int = 64,
    threads: int = 2,
    ahead: int = 3,
    allocate: Callable[[tuple[int, ...]], Pixels] = lambda shape: np.empty(shape, np.uint8),
) -> Generator[TileBatch, None, None]:
    """Batches of the tiles of all jobs, one job after the other; a batch is full unless it is the last.

    ``jobs`` is gone through in the threads, one at a time, and may make them wait. All tiles have the same size; a job whose
    have another gets a ValueError as its ``error``.

    Args:
        allocate: makes the memory for a batch, such as memory that a GPU can copy from.

    Raises:
        Exception: what ``jobs`` or ``allocate`` raises. What a job's reader raises becomes that job's ``error``.
    """
    pool = _Pool(jobs, batch_size, ahead, allocate)
    workers = [threading.Thread(target=pool.work, name=f"read-{n}", daemon=True) for n in range(threads)]
    for thread in workers:
        thread.start()
    try:
        while (batch := pool.take()) is not None:
            yield batch
    finally:
        pool.stop()
        for thread in workers:
            thread.join()
        pool.close()


@dataclass(eq=False, slots=True)
class _Cell:
    """A cell and who waits for it; ``waiting`` is None once it is decoded, ``pixels`` then None if it cannot be.

    ``place`` is where its pixels belong in the batch, if one tile alone has it, and has all of it.
    """

    source: "_Source"
    corner: tuple[int, int]
    place: Pixels | None = None
    waiting: "list[_Tile] | None" = field(default_factory=list)
    pixels: Pixels | None = None


@dataclass(eq=False, slots=True)
class _Tile:
    batch: "_Batch"
    row: int
    source: "_Source"
    index: int
    cells: list[_Cell] = field(default_factory=list)
    missing: int = 0


class _Task(NamedTuple):
    """What a thread takes: a tile, the cells to decode for it, and whether it has them all without these."""

    tile: _Tile
    cells: list[_Cell]
    is_ready: bool


@dataclass(eq=False, slots=True)
class _Batch:
    pixels: Pixels
    readable: NDArray[np.bool_]
    spans: list[TileSpan] = field(default_factory=list)
    ended: list[TileJob] = field(default_factory=list)
    planned: int = 0
    made: int = 0
    is_planned: bool = False

    @property
    def is_whole(self) -> bool:
        return self.is_planned and self.made == self.planned

    def freeze(self, release: Callable[["_Batch"], None]) -> TileBatch:
        n = self.planned
        ends = tuple(self.spans), tuple(self.ended)
        return TileBatch(self.pixels[:n], self.readable[:n], *ends, lambda: release(self))


class _Scratch:
    """Memory of one thread for pixels that are reduced at once: new pages cost a third of what decoding does."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, int], Pixels] = {}

    def of(self, size: tuple[int, int]) -> Pixels:
        """(height, width, 3) for a ``size`` (width, height); what was in it does not matter any more."""
        if size not in self._arrays:
            if len(self._arrays) == 2:  # a cell's and a tile's: another slide may have others
                self._arrays.clear()
            self._arrays[size] = tile_memory(*size)
        return self._arrays[size]


class _Source:
    """Where one job's cells come from, and how its tiles are made of them."""

    def __init__(self, job: TileJob) -> None:
        reader, level = job.slide.reader, job.grid.level
        self.job = job
        self._reader, self._level = reader, level
        self._tiled = reader if isinstance(reader, TiledReader) else None
        self.cells: Cells = plan_cells(job.grid, None if self._tiled is None else self._tiled.tile_size(level))
        self._tile_px = job.grid.tile_px
        self._factor = self.cells.factor or (1, 1)
        w, h = self.cells.size
        self._cell_size = (w // self._factor[0], h // self._factor[1])  # as it is kept
        self.cell_bytes = 3 * self._cell_size[0] * self._cell_size[1]

    def place(self, tile: _Tile, corner: tuple[int, int]) -> Pixels | None:
        """The part of a tile's row in its batch that a cell's pixels make up, if it takes them as they are kept."""
        if self.cells.factor is None:
            return None
        dx, dy = self._offset(tile, corner)
        w, h = self._cell_size
        inside = 0 <= dx <= self._tile_px - w and 0 <= dy <= self._tile_px - h
        return tile.batch.pixels[tile.row, dy : dy + h, dx : dx + w] if inside else None

    def decode(self, cell: _Cell, scratch: "_Scratch") -> Pixels | None:
        """A cell's pixels, reduced where that can be done by cell; None where they cannot be read, or need not be."""
        if self.job.is_cancelled:
            return None
        try:
            if self._tiled is not None:
                passing = cell.place is not None or self._factor != (1, 1)
                out = scratch.of(self.cells.size) if passing else None
                pixels = self._tiled.read_stored(self._level, *cell.corner, out)
            else:
                pixels = self._reader.read(self._level, *cell.corner, *self.cells.size)
            return area_resize(pixels, self._cell_size, cell.place)
        except ReadError:
            return None  # its tiles are marked, never filled with made-up pixels
        except Exception as error:  # noqa: BLE001 - kept, and raised by whoever asked for the job
            self.job.error = error
            self.job.cancel()
            return None

    def assemble(self, tile: _Tile, scratch: "_Scratch") -> None:
        """Put a tile's pixels into its batch, those that are not there already."""
        out = whole = tile.batch.pixels[tile.row]
        if self.cells.factor is None:
            whole = scratch.of(self.cells.tile)
        h, w = whole.shape[:2]
        for cell in tile.cells:
            if cell.pixels is None:
                tile.batch.readable[tile.row] = False
                return
            if cell.place is None:
                dx, dy = self._offset(tile, cell.corner)
                part = cell.pixels[max(0, -dy) : h - dy, max(0, -dx) : w - dx]
                whole[max(0, dy) : max(0, dy) + part.shape[0], max(0, dx) : max(0, dx) + part.shape[1]] = part
        if whole is not out:
            area_resize(whole, (self._tile_px, self._tile_px), out)

    def _offset(self, tile: _Tile, corner: tuple[int, int]) -> tuple[int, int]:
        """Of a cell in a tile, in pixels as cells are kept."""
        x, y = self.cells.corners[tile.index]
        return (corner[0] - int(x)) // self._factor[0], (corner[1] - int(y)) // self._factor[1]


class _Pool:
    """What the threads and the consumer share. ``_lock`` guards cells' and batches' states, ``_turn`` the plan."""

    def __init__(
        self, jobs: Iterable[TileJob], batch_size: int, ahead: int, allocate: Callable[[tuple[int, ...]], Pixels]
    ) -> None:
        self._batch_size = batch_size
        self._ahead = ahead
        self._allocate = allocate
        self._plan = self._planned(iter(jobs))
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._batches: deque[_Batch] = deque()  # planned and not taken yet
        self._free: list[Pixels] = []  # memory of batches that were released: new pages cost as much as stitching
        self._is_over = False  # nothing more will be planned
        self._is_stopped = False
        self._error: BaseException | None = None

    # --- the consumer's side ---

    def take(self) -> TileBatch | None:
        """The next batch, once it is whole; None at the end."""
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._batches and self._batches[0].is_whole:
                    self._changed.notify_all()  # there is room for another
                    return self._batches.popleft().freeze(self._take_back)
                if self._is_over and not self._batches:
                    return None
                self._changed.wait()

    def _take_back(self, batch: _Batch) -> None:
        """A batch's memory, for another; given back twice it is taken once."""
        pixels, batch.pixels = batch.pixels, _NO_TILES
        if len(pixels):
            self._free.append(pixels)

    def stop(self) -> None:
        """Have the threads end, as soon as what they wait for has come."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the iteration over the jobs; the threads must have ended."""
        self._plan.close()

    # --- the threads' side ---

    def work(self) -> None:
        scratch = _Scratch()
        try:
            while True:
                with self._turn:
                    task = next(self._plan, None)
                if task is None:
                    return
                ready = self._decoded(task.cells, scratch)
                for tile in (*ready, task.tile) if task.is_ready else ready:
                    tile.source.assemble(tile, scratch)
                    self._made(tile)
        except BaseException as error:  # noqa: BLE001 - raised by `take`
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _decoded(self, cells: list[_Cell], scratch: "_Scratch") -> list[_Tile]:
        """Decode cells; the tiles that lacked nothing else."""
        decoded = [cell.source.decode(cell, scratch) for cell in cells]
        ready = []
        with self._lock:
            for cell, pixels in zip(cells, decoded, strict=True):
                waiting, cell.waiting, cell.pixels = cell.waiting or [], None, pixels
                cell.source.job.cells_decoded += 1
                for tile in waiting:
                    tile.missing -= 1
                    if not tile.missing:
                        ready.append(tile)
        return ready

    def _made(self, tile: _Tile) -> None:
        tile.cells = []
        with self._changed:
            tile.batch.made += 1
            if tile.batch.is_whole:
                self._changed.notify_all()

    # --- the plan, gone through by the threads in turn ---

    def _planned(self, jobs: Iterator[TileJob]) -> Generator[_Task, None, None]:
        """Tiles in order, with the cells that are to be decoded for them; waits for room, and for jobs."""
        tile_px: int | None = None
        try:
            for job in jobs:
                try:
                    tile_px = tile_px or job.grid.tile_px
                    if job.grid.tile_px != tile_px:
                        raise ValueError(
                            f"tiles of {job.grid.tile_px} px cannot share batches with tiles of {tile_px} px"
                        )
                    source = _Source(job)
                    left = source.cells.uses(job.first) if source.cells.shared else None
                except Exception as error:  # noqa: BLE001 - kept, and raised by whoever asked for the job
                    job.error = error
                else:
                    job.cells_needed = len(job.grid) - job.first if left is None else int(np.count_nonzero(left))
                    yield from self._planned_tiles(source, left)
                self._end(job)
                if self._is_stopped:
                    return
        finally:
            close = getattr(jobs, "close", None)
            if close is not None:
                close()
            with self._changed:
                self._is_over = True
                if self._batches:
                    self._batches[-1].is_planned = True
                self._changed.notify_all()

    def _planned_tiles(self, source: _Source, left: NDArray[np.int32] | None) -> Iterator[_Task]:
        """``left`` says how many tiles have yet to touch each cell, and is counted down."""
        job, size = source.job, source.cells.size
        kept: dict[tuple[int, int], _Cell] = {}
        most = max(_KEPT_CELLS, _KEPT_BYTES // source.cell_bytes)
        for index in range(job.first, len(job.grid)):
            batch = self._room(source)
            if batch is None or job.is_cancelled:
                return
            tile = _Tile(batch, batch.planned, source, index)
            new: list[_Cell] = []
            corners = list(source.cells.under(index))
            for corner in corners:
                cell = kept.get(corner)
                if cell is None:
                    cell = _Cell(source, corner)
                    new.append(cell)
                    if left is not None:
                        kept[corner] = cell
                is_last = left is None
                if left is not None:
                    at = (corner[1] // size[1], corner[0] // size[0])
                    left[at] -= 1
                    is_last = left[at] == 0
                if is_last:
                    kept.pop(corner, None)
                    if new and cell is new[-1]:  # for this tile alone
                        cell.place = source.place(tile, corner)
                tile.cells.append(cell)
            while len(kept) > most:
                _drop_one(kept, corners)
            yield _Task(tile, new, self._enter(tile))

    def _room(self, source: _Source) -> _Batch | None:
        """A batch with a free row, once one is allowed; None when the consumer has gone."""
        with self._changed:
            batch = self._batches[-1] if self._batches else None
            if self._is_stopped or (batch is not None and not batch.is_planned):
                return None if self._is_stopped else batch
            while len(self._batches) >= self._ahead and not self._is_stopped:
                self._changed.wait()
            if self._is_stopped:
                return None
        px = source.job.grid.tile_px
        pixels = self._free.pop() if self._free else self._allocate((self._batch_size, px, px, 3))
        batch = _Batch(pixels, np.ones(self._batch_size, np.bool_))
        with self._changed:
            self._batches.append(batch)
        return batch

    def _enter(self, tile: _Tile) -> bool:
        """Have a tile wait for its cells, and put it into its batch; whether it has them all already."""
        batch, job = tile.batch, tile.source.job
        with self._lock:
            for cell in tile.cells:
                if cell.waiting is not None:
                    cell.waiting.append(tile)
                    tile.missing += 1
            last = batch.spans[-1] if batch.spans else None
            if last is not None and last.job is job:
                batch.spans[-1] = TileSpan(job, last.first, last.start, tile.row + 1)
            else:
                batch.spans.append(TileSpan(job, tile.index, tile.row, tile.row + 1))
            batch.planned += 1
            batch.is_planned = batch.planned == self._batch_size
            return not tile.missing

    def _end(self, job: TileJob) -> None:
        """Note that a job has no more tiles."""
        with self._changed:
            if self._batches:
                self._batches[-1].ended.append(job)
            else:  # its tiles have all been taken, or there are none
                self._batches.append(_Batch(_NO_TILES, np.empty(0, np.bool_), ended=[job], is_planned=True))
                self._changed.notify_all()


def _drop_one(kept: dict[tuple[int, int], _Cell], but: list[tuple[int, int]]) -> None:
    """Let go of the cell that is needed last: of tiles in rows that is the newest one, those in use left out."""
    corner = next((corner for corner in reversed(kept) if corner not in but), None)
    kept.pop(corner if corner is not None else next(iter(kept)))
