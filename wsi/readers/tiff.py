"""TiffReader: tiles of a local TIFF decoded directly, where that gives what OpenSlide shows.

Most of OpenSlide's time on such files goes into compositing, not decoding (openslide#440, #552). Here each tile is read
at its place and decoded once, without the interpreter's lock. What the slide is, its levels, properties and bounds, is
still OpenSlide's word, and some tiles are compared with OpenSlide's before the reader is used.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import cv2
import numpy as np

from wsi.errors import NotASlideError, PixelsDifferError, ReadError
from wsi.grid import Box
from wsi.readers._tiles import JPEG, JPEG2000_RGB, JPEG2000_YCBCR, Coding, find_levels, may_lack_data
from wsi.readers.base import PerProcess, Pixels
from wsi.readers.openslide import OpenSlideReader

__all__ = ["TiffReader"]

_VENDORS = ("aperio", "generic-tiff", "philips")  # their tiles are shown as they lie, without overlap or stitching
_CACHE_BYTES = 64 << 20
_CHECKED_TILES = 3  # of each way of coding
_TRIES = 3  # a tile that OpenSlide cannot read either proves nothing: so many are tried for each one to check
_TOLERANCE = {JPEG2000_YCBCR: 1, JPEG2000_RGB: 1}  # grey levels: builds of OpenJPEG round differently


class TiffReader:
    """Reads the tiles of Aperio, Philips, OME and plain TIFF files as OpenSlide would show them.

    Tiles are 8-bit colour, in JPEG, Aperio's JPEG 2000, LZW, deflate or zstd, or not compressed. Every level is read
    at any offset. The reduced levels of an OME-TIFF, which OpenSlide does not list, are levels too.

    A JPEG tile without its end, or with less data than pixels, is an error. Damage that leaves the stream well formed
    shows as wrong pixels, here as in OpenSlide; so does most damage of JPEG 2000.

    Raises:
        NotASlideError: the file is nothing for this reader, and why.
        PixelsDifferError: a tile is not what OpenSlide shows.
    """

    name = "tiff"
    reason: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.max_difference = 0  # from OpenSlide's pixels, in grey levels, on the tiles compared
        self._files: PerProcess[_File] = PerProcess()
        self._openslide = _openslide_reader(path)
        try:
            self._levels = find_levels(path, self._openslide.sizes)
            self.sizes = tuple(level.size for level in self._levels)
            self.native = (True,) * len(self.sizes)
            self.properties: Mapping[str, str] = self._openslide.properties
            self.background = self._openslide.background
            self.bounds: Box | None = self._openslide.bounds
            if self.properties["openslide.vendor"] == "aperio" and any(v.is_sparse for v in self._levels[1:]):
                raise NotASlideError(f"{path}: OpenSlide makes up for its missing tiles from sharper levels")
            self._compare_with_openslide()
        finally:
            self.close()

    def __reduce__(self) -> tuple[type["TiffReader"], tuple[Path]]:
        return TiffReader, (self.path,)

    def read(self, level: int, x: int, y: int, w: int, h: int) -> Pixels:
        about = self._levels[level]
        tile_w, tile_h = about.tile
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, about.size[0]), min(y + h, about.size[1])
        pixels = np.empty((h, w, 3), np.uint8)
        if (x1 - x0, y1 - y0) != (w, h):
            pixels[...] = self.background
        if x0 >= x1 or y0 >= y1:
            return pixels
        file = self._file()
        for row in range(y0 // tile_h, -(-y1 // tile_h)):
            for column in range(x0 // tile_w, -(-x1 // tile_w)):
                try:
                    tile = self._tile(file, level, row * about.columns + column)
                except ReadError as error:
                    raise ReadError(
                        f"{self.path}: level {level}, {w} x {h} pixels at ({x}, {y}) cannot be read: {error}"
                    ) from error
                dx, dy = column * tile_w, row * tile_h
                left, top, right, bottom = max(x0, dx), max(y0, dy), min(x1, dx + tile_w), min(y1, dy + tile_h)
                part = self.background if tile is None else tile[top - dy : bottom - dy, left - dx : right - dx]
                pixels[top - y : bottom - y, left - x : right - x] = part
        return pixels

    def tile_size(self, level: int) -> tuple[int, int]:
        return self._levels[level].tile

    def read_stored(self, level: int, x: int, y: int, out: Pixels | None = None) -> Pixels:
        about = self._levels[level]
        column, row = x // about.tile[0], y // about.tile[1]
        if not (0 <= column < about.columns and 0 <= row < len(about.counts) // about.columns):
            return self._blank(about.tile)
        try:
            tile = self._decode(self._file(), level, row * about.columns + column, out)
        except ReadError as error:
            raise ReadError(f"{self.path}: level {level}: {error}") from error
        if tile is None:
            return self._blank(about.tile)
        w, h = about.size[0] - column * about.tile[0], about.size[1] - row * about.tile[1]  # of it in the picture
        if w < about.tile[0] or h < about.tile[1]:
            tile = np.require(tile, requirements="W")  # what was not compressed is the file's bytes, read-only
            tile[h:], tile[:, w:] = self.background, self.background
        return tile

    def close(self) -> None:
        self._files.take()  # its file is closed when the last thread that reads from it lets go
        self._openslide.close()

    def _file(self) -> "_File":
        try:
            return self._files.get(lambda: _File(self.path))
        except OSError as error:
            raise ReadError(f"{self.path}: cannot be opened again: {error.strerror}") from error

    def _tile(self, file: "_File", level: int, index: int) -> Pixels | None:
        """As ``_decode``, from the tiles decoded last where it is among them."""
        if not self._levels[level].counts[index]:
            return None
        return file.tile((level, index), lambda: self._decode(file, level, index))

    def _decode(self, file: "_File", level: int, index: int, out: Pixels | None = None) -> Pixels | None:
        """A whole tile, or None where there is none."""
        about = self._levels[level]
        if not about.counts[index]:
            return None
        try:
            data = file.bytes_at(about.offsets[index], about.counts[index])
            pixels = about.coding.decode(data, *about.tile, about.tables, out)
            if about.coding.compression == JPEG and may_lack_data(pixels, data, about.tables):
                self._ask_openslide(level, index)
        except (OSError, RuntimeError, ValueError, ReadError) as error:
            row, column = divmod(index, about.columns)
            raise ReadError(f"tile ({column}, {row}): {error}") from error
        return pixels

    def _blank(self, size: tuple[int, int]) -> Pixels:
        blank = np.empty((size[1], size[0], 3), np.uint8)
        blank[...] = self.background
        return blank

    def _ask_openslide(self, level: int, index: int) -> None:
        """Raise ReadError unless OpenSlide, to which a decoder's warning is an error, has no fault to find in a tile."""
        if level >= len(self._openslide.sizes):
            raise ReadError("its JPEG data may end early")
        box = self._levels[level].box(index)
        self._openslide.probe(level, box.x + box.w // 2, box.y + box.h // 2)

    def _compare_with_openslide(self) -> None:
        """Raise unless OpenSlide shows the same on tiles of every way of coding, and one at least of every level."""
        checked: set[Coding] = set()
        for level, about in enumerate(self._levels[: len(self._openslide.sizes)]):
            parts = 1 if about.coding in checked else _CHECKED_TILES
            # A level that is not native to OpenSlide it would interpolate anywhere but in the corner.
            candidates = about.fullest(parts, _TRIES) if self._openslide.native[level] else [[0]]
            for indices in candidates:
                if any(self._agrees(level, index) for index in indices):
                    checked.add(about.coding)
            if about.coding not in checked and any(about.counts):
                raise NotASlideError(f"{self.path}: no tile of level {level} can be compared with OpenSlide's")

    def _agrees(self, level: int, index: int) -> bool:
        """Whether a tile is what OpenSlide shows; False where OpenSlide cannot read it."""
        box = self._levels[level].box(index)
        try:
            theirs = self._openslide.read(level, box.x, box.y, box.w, box.h)
        except ReadError:
            return False
        try:
            ours = self.read(level, box.x, box.y, box.w, box.h)
        except ReadError as error:
            raise PixelsDifferError(f"{error}; OpenSlide reads them") from error
        difference = int(cv2.absdiff(ours, theirs).max())
        if difference > _TOLERANCE.get(self._levels[level].coding.compression, 0):
            raise PixelsDifferError(
                f"{self.path}: level {level}, tile at ({box.x}, {box.y}): decoded directly it differs from OpenSlide's "
                f"by {difference} grey levels"
            )
        self.max_difference = max(self.max_difference, difference)
        return True


def _openslide_reader(path: Path) -> OpenSlideReader:
    import openslide

    vendor = openslide.OpenSlide.detect_format(path)
    if vendor not in _VENDORS:
        raise NotASlideError(
            f"{path}: of {vendor or 'no format OpenSlide knows'}; read directly: {', '.join(_VENDORS)}"
        )
    return OpenSlideReader(path)


class _File:
    """An open file and the tiles that were decoded from it last. Belongs to one process, serves all its threads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, int], Future[Pixels | None]] = OrderedDict()
        self._bytes = 0

    def __del__(self) -> None:
        # Not before: a descriptor that is closed under a reading thread may already be that of another file.
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def bytes_at(self, offset: int, count: int) -> bytes:
        """Raises OSError, or ValueError where the file has become shorter."""
        if hasattr(os, "pread"):
            data = os.pread(self._descriptor, count, offset)
        else:  # Windows
            with self._lock:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                data = os.read(self._descriptor, count)
        if len(data) != count:
            raise ValueError(f"only {len(data)} of its {count} bytes are there")
        return data

    def tile(self, key: tuple[int, int], decode: Callable[[], Pixels | None]) -> Pixels | None:
        """The tile kept under ``key``, or decoded now; who wants it meanwhile waits for the first."""
        with self._lock:
            kept = self._tiles.get(key)
            if kept is not None:
                self._tiles.move_to_end(key)
            else:
                mine = self._tiles[key] = Future()
        if kept is not None:
            pixels = kept.result()
            return decode() if pixels is None else pixels
        try:
            pixels = decode()
        except BaseException:
            with self._lock:
                del self._tiles[key]
            mine.set_result(None)  # not the error: each thread has its own
            raise
        mine.set_result(pixels)
        with self._lock:
            self._bytes += 0 if pixels is None else pixels.nbytes
            while self._bytes > _CACHE_BYTES:
                self._forget_oldest()
        return pixels

    def _forget_oldest(self) -> None:
        key, pixels = next((key, future.result()) for key, future in self._tiles.items() if future.done())
        del self._tiles[key]
        self._bytes -= 0 if pixels is None else pixels.nbytes
