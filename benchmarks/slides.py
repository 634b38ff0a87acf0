"""Slides to measure on: phantoms as dense as scanned tissue, and mosaics of them as large as a scan can be."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import tifffile

from wsi.phantom import Codec, PhantomSpec, write_svs

# Scanners write tissue at about two bits per pixel. A phantom's takes 2.0 at this quality (1.9 at 75, 2.5 at 85).
QUALITY = 78
LEVELS = (1, 4, 16)
TILE_PX = 256
BLOCK_PX = TILE_PX * LEVELS[-1]  # slides of whole blocks are whole tiles at every level


def write_slides(folder: Path, count: int, size: tuple[int, int], *, tissue_fraction: float = 0.5) -> list[Path]:
    """Write ``count`` different JPEG phantoms of ``size`` (width, height) pixels at 0.25 mpp."""
    folder.mkdir(parents=True)
    paths = [folder / f"slide-{index:02}.svs" for index in range(count)]
    for index, path in enumerate(paths):
        spec = PhantomSpec(*size, mpp=0.25, seed=50 + index, tissue_fraction=tissue_fraction, tumour=0.3)
        write_svs(path, spec, quality=QUALITY, levels=LEVELS)
    return paths


def write_large_slides(folder: Path, count: int, times: int, size: tuple[int, int] = (20480, 16384)) -> list[Path]:
    """Write ``count`` slides, each of a phantom of ``size`` laid out ``times`` x ``times``: as many tiles as scans have."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
        painted = write_slides(Path(parts) / "parts", count, size)
        for path in painted:
            write_mosaic(folder / path.name, [path], times, times)
    return sorted(folder.iterdir())


def write_dense(path: Path, side_px: int, codec: Codec, quality: int) -> None:
    """Write a square phantom with little glass, at 0.25 mpp."""
    spec = PhantomSpec(side_px, side_px, mpp=0.25, seed=5, tissue_fraction=0.6, tumour=0.3)
    write_svs(path, spec, codec=codec, quality=quality)


def bits_per_pixel(path: Path) -> float:
    """Return what tissue takes at level 0: the mean over the tiles with at least half of what the fullest tenth has."""
    with tifffile.TiffFile(path) as tiff:
        page = _page(tiff, 0)
        bits = 8 * np.array(page.databytecounts) / (page.tilewidth * page.tilelength)
    return float(bits[bits >= np.percentile(bits, 90) / 2].mean())


def write_mosaic(path: Path, sources: Sequence[Path], columns: int, rows: int) -> None:
    """Lay slides of ``write_svs`` side by side as one slide, in seconds where painting it would take many minutes.

    No tile is decoded, yet every tile of the result has bytes of its own in the file, which a reader has to fetch and
    decode like any others. The sources are taken in turn, row by row; they have the same size, in whole ``BLOCK_PX``, and
    the same JPEG tables.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(tifffile.TiffFile(source)) for source in sources]
        kinds = {(_page(file, 0).shape, _page(file, 0).jpegtables) for file in files}
        (height, width, _), tables = kinds.pop()
        if kinds or height % BLOCK_PX or width % BLOCK_PX:
            raise ValueError(
                f"{sources[0]} and the others: not all of one size in whole {BLOCK_PX} px with the same tables"
            )
        size = f"{width * columns}x{height * rows}"
        head = f"Aperio Image Library v12.0.0 \r\n{size} [0,0 {size}] ({TILE_PX}x{TILE_PX})"
        out = stack.enter_context(tifffile.TiffWriter(path, bigtiff=True))
        for number, downsample in enumerate(LEVELS):
            shape = (height * rows // downsample, width * columns // downsample, 3)
            smaller = f" -> {shape[1]}x{shape[0]}" if number else ""
            facts = "" if number else "|AppMag = 40|MPP = 0.25|ScanScope ID = MOSAIC"
            out.write(
                _tiles([(file, _page(file, number)) for file in files], columns, rows),
                shape=shape,
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression=7,
                compressionargs={"outcolorspace": "ycbcr"},
                subsampling=(2, 2),
                jpegtables=tables,
                description=f"{head}{smaller} JPEG/YCC Q={QUALITY}{facts}",
                metadata=None,
            )
            if number == 0:  # Aperio's second page is a thumbnail
                small = np.full((64, 64, 3), 243, np.uint8)
                out.write(small, photometric="rgb", rowsperstrip=64, description=f"{head} -> 64x64 - ", metadata=None)


def _page(tiff: tifffile.TiffFile, level: int) -> tifffile.TiffPage:
    page = tiff.pages[level + 1 if level else 0]  # the thumbnail lies between
    assert isinstance(page, tifffile.TiffPage)
    return page


def _tiles(pages: list[tuple[tifffile.TiffFile, tifffile.TiffPage]], columns: int, rows: int) -> Iterator[bytes]:
    """Yield the encoded tiles of one level in the order of the whole mosaic."""
    first = pages[0][1]
    across, down = first.imagewidth // TILE_PX, first.imagelength // TILE_PX
    for row in range(rows):
        for line in range(down):
            for column in range(columns):
                file, page = pages[(row * columns + column) % len(pages)]
                for index in range(line * across, (line + 1) * across):
                    file.filehandle.seek(page.dataoffsets[index])
                    yield file.filehandle.read(page.databytecounts[index])
