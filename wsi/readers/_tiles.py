"""Tiles of a TIFF: where a level's tiles lie in the file, how they are coded, and their pixels. No slide formats."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from wsi.errors import NotASlideError
from wsi.grid import Box
from wsi.readers.base import Pixels, tile_memory

if TYPE_CHECKING:
    import tifffile

__all__ = ["JPEG", "JPEG2000_RGB", "JPEG2000_YCBCR", "Coding", "TileLevel", "find_levels", "may_lack_data"]

UNCOMPRESSED, LZW, JPEG, ADOBE_DEFLATE, DEFLATE, ZSTD = 1, 5, 7, 8, 32946, 50000
JPEG2000_YCBCR, JPEG2000_RGB = 33003, 33005  # Aperio's
_RGB, _YCBCR = 2, 6
_HORIZONTAL = 2  # predictor: a pixel is stored as its difference from the one to the left
_PHOTOMETRIC = {  # what may stand in the tag
    JPEG: (_RGB, _YCBCR),
    JPEG2000_YCBCR: (_RGB, _YCBCR),  # Aperio writes RGB for both: the compression alone tells the colour space
    JPEG2000_RGB: (_RGB, _YCBCR),
    **dict.fromkeys((UNCOMPRESSED, LZW, ADOBE_DEFLATE, DEFLATE, ZSTD), (_RGB,)),
}
_ROWS = 32
_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_RESTARTS = b"\xff\xdd"  # the marker that defines their interval; within the data of pixels it cannot stand
_REDUCED = 1  # bit of NewSubfileType

# ITU-T T.871, section 7: from (Y, Cb, Cr, 1) to R, G and B, in the 16-bit fractions that libjpeg and OpenSlide reckon with.
_R_CR, _G_CB, _G_CR, _B_CB = (round(factor * 65536) / 65536 for factor in (1.402, -0.34414, -0.71414, 1.772))
_YCBCR_TO_RGB = np.array(
    [[1, 0, _R_CR, -128 * _R_CR], [1, _G_CB, _G_CR, -128 * (_G_CB + _G_CR)], [1, _B_CB, 0, -128 * _B_CB]], np.float32
)


@dataclass(frozen=True)
class Coding:
    """How tiles become pixels, in the numbers of the TIFF tags."""

    compression: int
    photometric: int
    predictor: int

    def decode(self, data: bytes, width: int, height: int, tables: bytes | None, out: Pixels | None = None) -> Pixels:
        """(height, width, 3) pixels of a tile, in ``out`` where that saves time.

        ``tables`` are those that JPEG tiles of a level share.

        Raises RuntimeError or ValueError for bytes that make no such tile.
        """
        import imagecodecs

        if self.compression == JPEG:
            if _JPEG_END not in data[-16:]:  # writers may pad
                raise ValueError("its JPEG data have no end")
            if out is None:
                out = tile_memory(width, height)
            space = "RGB" if self.photometric == _RGB else "YCBCR"
            if tables is not None:  # put in front, as libjpeg takes longer to read them apart
                data = b"".join((tables.removesuffix(_JPEG_END), memoryview(data)[len(_JPEG_START) :]))
            tile: Pixels = imagecodecs.jpeg8_decode(data, colorspace=space, outcolorspace="RGB", out=out)
        elif self.compression in (JPEG2000_YCBCR, JPEG2000_RGB):
            tile = imagecodecs.jpeg2k_decode(data, numthreads=1, out=out)
        else:
            size = width * height * 3
            tile = np.frombuffer(_inflate(self.compression, data, size), np.uint8, size).reshape(height, width, 3)
        if tile.shape != (height, width, 3) or tile.dtype != np.uint8:
            raise ValueError(f"it holds {tile.shape} pixels of {tile.dtype}, not {(height, width, 3)} of uint8")
        if self.compression == JPEG2000_YCBCR and not _has_subsampled_chroma(data):
            return _rgb(tile)
        if self.predictor == _HORIZONTAL:
            return imagecodecs.delta_decode(tile, axis=1)
        return tile


def _rgb(ycbcr: Pixels) -> Pixels:
    rgb = np.empty_like(ycbcr)
    for rows in range(0, len(ycbcr), _ROWS):  # what stays in the cache is several times faster
        part = ycbcr[rows : rows + _ROWS].astype(np.float32)  # of bytes it would be rounded to 10 bits on the way
        cv2.add(cv2.transform(part, _YCBCR_TO_RGB), 0, dst=rgb[rows : rows + _ROWS], dtype=cv2.CV_8U)
    return rgb


def _has_subsampled_chroma(codestream: bytes) -> bool:
    """Whether the second component of a JPEG 2000 codestream is coarser in x (ISO/IEC 15444-1, A.5.1: XRsiz).

    imagecodecs takes such streams for YCbCr and makes RGB of them itself.
    """
    return len(codestream) > 46 and codestream[46] != 1


def _inflate(compression: int, data: bytes, size: int) -> bytes | bytearray:
    import imagecodecs

    if compression == UNCOMPRESSED:
        return data
    decode = {LZW: imagecodecs.lzw_decode, ZSTD: imagecodecs.zstd_decode}.get(compression, imagecodecs.zlib_decode)
    return decode(data, out=size)


def may_lack_data(jpeg_tile: Pixels, data: bytes, tables: bytes | None) -> bool:
    """Whether a JPEG tile has a block of plain grey, sample value 128, where data that are not there leave one.

    That is what libjpeg fills in up to the end, or up to the next restart marker where there are any. It warns of it,
    which imagecodecs does not pass on.
    """
    if _RESTARTS not in data and (tables is None or _RESTARTS not in tables):
        return bool(jpeg_tile[-4, -4, 0] == 128) and bool((jpeg_tile[-7:-1, -7:-1] == 128).all())
    inner = jpeg_tile[4::8, 4::8]  # a pixel of each block
    grey = (inner == 128).all(axis=2)
    return any((jpeg_tile[8 * y + 1 : 8 * y + 7, 8 * x + 1 : 8 * x + 7] == 128).all() for y, x in np.argwhere(grey))


@dataclass(frozen=True)
class TileLevel:
    """One level: (width, height) of the picture and of a tile, and where each tile's bytes lie, row by row.

    A tile of no bytes is not there.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    columns: int
    coding: Coding
    tables: bytes | None = field(repr=False)
    offsets: Sequence[int] = field(repr=False)
    counts: Sequence[int] = field(repr=False)

    @property
    def is_sparse(self) -> bool:
        """Whether tiles are missing."""
        return 0 in self.counts

    def box(self, index: int) -> Box:
        """A tile as far as it lies in the picture, in this level's pixels."""
        row, column = divmod(index, self.columns)
        x, y = column * self.tile[0], row * self.tile[1]
        return Box(x, y, min(self.tile[0], self.size[0] - x), min(self.tile[1], self.size[1] - y))

    def fullest(self, parts: int, of_each: int) -> Iterator[list[int]]:
        """Tiles that have content: for each part of the level the ones of most bytes, at most ``of_each``."""
        counts = np.array(self.counts)
        for part in np.array_split(np.arange(len(counts)), parts):
            order = part[np.argsort(-counts[part], kind="stable")][:of_each]
            yield [int(index) for index in order if counts[index]]


def find_levels(path: Path, sizes: Sequence[tuple[int, int]]) -> tuple[TileLevel, ...]:
    """The tiled pages of a TIFF that have these sizes, in this order, and the reduced pages below a single one.

    Raises:
        NotASlideError: there is no such page, or one whose tiles are coded in a way not known here.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
            chosen = []
            for size in sizes:
                page = next((page for page in pages if _shows(page, size)), None)
                if page is None:
                    raise NotASlideError(f"{path}: no tiled page has {size[0]} x {size[1]} pixels")
                pages.remove(page)
                chosen.append(_level(path, page, size))
            if len(chosen) == 1 and page is not None and page.subifds:
                chosen += _reduced(path, page, chosen[0].coding)
            return tuple(chosen)
    except (tifffile.TiffFileError, ValueError, IndexError, KeyError, OSError) as error:
        raise NotASlideError(f"{path}: tifffile says: {error}") from error


def _shows(page: "tifffile.TiffPage", size: tuple[int, int]) -> bool:
    """Whether a page has this size, or this size in whole tiles, as Philips pads its pages."""
    stored = (page.imagewidth, page.imagelength)
    tile = (page.tilewidth, page.tilelength)
    return stored == size or stored == tuple(-(-s // t) * t for s, t in zip(size, tile, strict=True))


def _level(path: Path, page: "tifffile.TiffPage", size: tuple[int, int]) -> TileLevel:
    coding = Coding(int(page.compression), int(page.photometric), int(page.predictor))
    layout = (page.samplesperpixel, page.planarconfig, page.imagedepth)
    if page.dtype != np.uint8 or page.bitspersample != 8 or layout != (3, 1, 1):
        raise NotASlideError(f"{path}: its pages are not 8-bit colour with the channels of a pixel together")
    if coding.photometric not in _PHOTOMETRIC.get(coding.compression, ()) or coding.predictor not in (1, _HORIZONTAL):
        raise NotASlideError(
            f"{path}: tiles of compression {coding.compression}, photometric {coding.photometric} and predictor "
            f"{coding.predictor} are not decoded here"
        )
    columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    if not columns * rows == len(page.dataoffsets) == len(page.databytecounts):
        raise NotASlideError(f"{path}: {len(page.dataoffsets)} tiles are listed for {columns} x {rows}")
    tile = (page.tilewidth, page.tilelength)
    return TileLevel(size, tile, columns, coding, page.jpegtables, page.dataoffsets, page.databytecounts)


def _reduced(path: Path, page: "tifffile.TiffPage", coding: Coding) -> Iterator[TileLevel]:
    """The pages below a page that show the same, smaller, and are coded alike: the levels of an OME-TIFF."""
    import tifffile

    width, height = last = (page.imagewidth, page.imagelength)
    for sub in page.pages or ():
        if not isinstance(sub, tifffile.TiffPage) or not sub.is_tiled or not sub.subfiletype & _REDUCED:
            return
        size = (sub.imagewidth, sub.imagelength)
        same_shape = abs(width / size[0] * size[1] - height) <= max(width / size[0], height / size[1])
        if not same_shape or size[0] >= last[0] or size[1] >= last[1]:
            return
        level = _level(path, sub, size)
        if level.coding != coding:
            return
        yield level
        last = size
