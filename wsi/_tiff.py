"""Whether a TIFF file holds all the bytes it promises, of 8-bit pixels: a walk over its directories, reading no tile."""

import struct
from pathlib import Path
from typing import BinaryIO

from wsi.errors import TruncatedSlideError, UnsupportedPixelError

__all__ = ["check_whole"]

_OFFSETS_TO_COUNTS = {273: 279, 324: 325}  # StripOffsets: StripByteCounts, TileOffsets: TileByteCounts
_BITS_PER_SAMPLE = 258
_NDPI = 65420  # Hamamatsu hides the upper half of 64-bit offsets in private tags: 32-bit arithmetic would be wrong
_WANTED = {_BITS_PER_SAMPLE, *_OFFSETS_TO_COUNTS, *_OFFSETS_TO_COUNTS.values()}
_FORMATS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}


def check_whole(path: Path) -> None:
    """Raise when tiles or directories of a TIFF lie beyond the end of the file.

    A partial download has its first bytes right and opens in some readers; this finds it before any work is done.
    Files that are not TIFF pass.

    Raises:
        TruncatedSlideError: the file is too short.
        UnsupportedPixelError: its pixels have more than 8 bits a channel, which readers would silently cut down.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(header[:2])
        if order is None or len(header) < 8:
            return
        version = struct.unpack(order + "H", header[2:4])[0]
        if version == 43 and len(header) == 16:
            big, start = True, struct.unpack(order + "Q", header[8:16])[0]
        elif version == 42:
            big, start = False, struct.unpack(order + "I", header[4:8])[0]
        else:
            return
        seen: set[int] = set()
        while start and start not in seen:
            seen.add(start)
            _require(start + 2, size, path)
            entries, start = _directory(file, start, order, big=big, path=path, size=size)
            if _NDPI in entries:
                return
            if len(seen) == 1 and any(bits > 8 for bits in entries.get(_BITS_PER_SAMPLE, ())):
                raise UnsupportedPixelError(
                    f"{path}: {max(entries[_BITS_PER_SAMPLE])} bits a channel; only 8-bit RGB can be read: convert the slide"
                )
            for offsets_tag, counts_tag in _OFFSETS_TO_COUNTS.items():
                if offsets_tag in entries and counts_tag in entries:
                    offsets, counts = entries[offsets_tag], entries[counts_tag]
                    ends = (o + c for o, c in zip(offsets, counts, strict=False) if c)
                    _require(max(ends, default=0), size, path)


def _directory(
    file: BinaryIO, start: int, order: str, *, big: bool, path: Path, size: int
) -> tuple[dict[int, tuple[int, ...]], int]:
    """The integer arrays of one directory that matter here, and where the next directory starts."""
    count_format, entry_size, offset_format = ("Q", 20, "Q") if big else ("H", 12, "I")
    head = struct.calcsize(count_format)
    file.seek(start)
    number = struct.unpack(order + count_format, _read(file, head, path, size))[0]
    block = _read(file, number * entry_size + struct.calcsize(offset_format), path, size)
    entries: dict[int, tuple[int, ...]] = {}
    for index in range(number):
        entry = block[index * entry_size : (index + 1) * entry_size]
        tag, kind = struct.unpack(order + "HH", entry[:4])
        if tag == _NDPI:
            entries[tag] = ()
        if kind not in _FORMATS or tag not in _WANTED:
            continue
        count = struct.unpack(order + offset_format, entry[4 : 4 + struct.calcsize(offset_format)])[0]
        values = f"{order}{count}{_FORMATS[kind]}"
        inline = entry[-struct.calcsize(offset_format) :]
        if struct.calcsize(values) <= len(inline):
            raw = inline
        else:
            file.seek(struct.unpack(order + offset_format, inline)[0])
            raw = _read(file, struct.calcsize(values), path, size)
        entries[tag] = struct.unpack(values, raw[: struct.calcsize(values)])
    return entries, struct.unpack(order + offset_format, block[number * entry_size :])[0]


def _read(file: BinaryIO, length: int, path: Path, size: int) -> bytes:
    _require(file.tell() + length, size, path)
    return file.read(length)


def _require(end: int, size: int, path: Path) -> None:
    if end > size:
        raise TruncatedSlideError(
            f"{path}: the file ends at byte {size:,} but promises data up to byte {end:,}; it is a partial copy: "
            f"fetch it again"
        )
