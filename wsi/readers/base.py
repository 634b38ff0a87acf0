"""Reader: the protocol that every way of getting pixels follows, and what all of them share."""

import os
import threading
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi.grid import Box

__all__ = ["RGB", "WHITE", "PerProcess", "Pixels", "Reader", "TiledReader", "flatten", "paste", "tile_memory"]

Pixels = NDArray[np.uint8]
RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)

Handle = TypeVar("Handle")


@runtime_checkable
class Reader(Protocol):
    """Pixels of one slide file.

    Attributes:
        name: the reader's name as ``--reader`` takes it.
        sizes: (width, height) of each level, sharpest first.
        native: for each level, whether ``read`` returns its own pixels unchanged at any offset.
        properties: what the file says of itself, as text.
        background: colour of what was never scanned.
        bounds: the scanned part of level 0, where the file states one.
        reason: why this reader was taken and not a faster one whose pixels were wrong; None where that did not happen.

    A reader is safe to share between threads, and pickles as its path.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    native: tuple[bool, ...]
    properties: Mapping[str, str]
    background: RGB
    bounds: Box | None
    reason: str | None

    def read(self, level: int, x: int, y: int, w: int, h: int) -> Pixels:
        """(h, w, 3) uint8 pixels of ``level``, in that level's own pixel frame; outside is background colour.

        On a level that is not native only boxes that start at (0, 0) are served.

        Raises:
            ReadError: these pixels cannot be read. The next call works again.
        """
        ...

    def close(self) -> None:
        """Give the file back. Reading afterwards opens it again."""
        ...


@runtime_checkable
class TiledReader(Reader, Protocol):
    """A reader that can give the file's own tiles, so that each is decoded once for all who need it."""

    def tile_size(self, level: int) -> tuple[int, int]:
        """(width, height) of a stored tile."""
        ...

    def read_stored(self, level: int, x: int, y: int, out: Pixels | None = None) -> Pixels:
        """The whole stored tile whose corner is at (x, y), in the level's own pixels; outside is background colour.

        Nothing is kept: the caller plans who needs it. The pixels may lie in ``out``, an array of the tile's shape.

        Raises:
            ReadError: it cannot be decoded.
        """
        ...


class PerProcess(Generic[Handle]):
    """A lazily opened handle that a forked child never inherits: it opens its own.

    Decoder libraries keep file offsets and error states in their handles, and sharing one across a fork returns wrong
    pixels without an error.
    """

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}
        self._held: tuple[int, Handle] | None = None  # process and handle, one value: they are read without the lock

    def get(self, opener: Callable[[], Handle]) -> Handle:
        """The handle of this process, made by ``opener()`` if there is none."""
        held = self._held
        if held is not None and held[0] == os.getpid():
            return held[1]
        with self._lock():
            held = self._held
            if held is None or held[0] != os.getpid():
                held = self._held = os.getpid(), opener()
            return held[1]

    def drop(self, handle: Handle) -> None:
        """Forget a handle that failed; it is closed when the last thread that reads from it lets go."""
        with self._lock():
            if self._held is not None and self._held[1] is handle:
                self._held = None

    def take(self) -> Handle | None:
        """Remove and return this process's handle, if it has one."""
        with self._lock():
            held, self._held = self._held, None
            return held[1] if held is not None and held[0] == os.getpid() else None

    def _lock(self) -> threading.Lock:
        # By process: a lock that another thread held at the moment of a fork would stay locked in the child.
        return self._locks.setdefault(os.getpid(), threading.Lock())


def tile_memory(width: int, height: int) -> Pixels:
    """(height, width, 3) uninitialised, at an odd address.

    Rows that begin at multiples of 32 bytes libjpeg-turbo writes past the cache, which makes decoding a tile and whatever
    is done with it next a third slower.
    """
    memory = np.empty(height * width * 3 + 2, np.uint8)
    start = 1 - memory.ctypes.data % 2
    return memory[start : start + height * width * 3].reshape(height, width, 3)


def flatten(rgba: Pixels, background: RGB) -> Pixels:
    """(h, w, 4) straight alpha over ``background``: what was never scanned has the background's colour, not black."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    a = alpha.astype(np.uint16)
    mixed = (rgba[..., :3] * a + np.array(background, np.uint16) * (255 - a) + 127) // 255
    return mixed.astype(np.uint8)


def paste(part: Pixels, x: int, y: int, w: int, h: int, background: RGB) -> Pixels:
    """(h, w, 3) of background colour with ``part`` laid at (x, y)."""
    if (x, y) == (0, 0) and part.shape[:2] == (h, w):
        return part
    whole = np.empty((h, w, 3), np.uint8)
    whole[...] = background
    whole[y : y + part.shape[0], x : x + part.shape[1]] = part
    return whole
