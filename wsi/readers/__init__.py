"""Readers: one small protocol, one file per way of getting pixels; here the choice between them.

To add a reader write its file, a line in ``_READERS`` and run the contract in ``tests/wsi/test_readers.py`` on it.
"""

import os
from collections.abc import Callable
from pathlib import Path

from wsi._tiff import check_whole
from wsi.errors import (
    EmptyFileError,
    IncompleteSlideError,
    NotASlideError,
    PixelsDifferError,
    SlideError,
    SlideNotFoundError,
    UsageError,
)
from wsi.readers.array import ArrayReader, PictureReader
from wsi.readers.base import Pixels, Reader
from wsi.readers.openslide import OpenSlideReader
from wsi.readers.tiff import TiffReader
from wsi.readers.tiffslide import TiffSlideReader

__all__ = ["READER_NAMES", "ArrayReader", "Pixels", "Reader", "check_file", "is_remote", "open_reader"]


def _exact_tiff(path: Path) -> Reader:
    """The direct reader where its pixels are OpenSlide's to the last bit; by its name it is also had one level off."""
    reader = TiffReader(path)
    if reader.max_difference:
        raise PixelsDifferError(
            f"{path}: decoded directly it differs from OpenSlide's by {reader.max_difference} grey level; --reader tiff takes it"
        )
    return reader


_READERS: dict[str, Callable[[Path], Reader]] = {  # in the order they are asked
    "tiff": TiffReader,
    "openslide": OpenSlideReader,
    "tiffslide": lambda path: TiffSlideReader(str(path)),
    "picture": PictureReader,
}
_TIFF_ONLY = ("tiff", "tiffslide")
READER_NAMES = ("auto", *_READERS)


def is_remote(location: str | Path) -> bool:
    """Whether this is an address for fsspec (``s3://…``, ``https://…``, ``memory://…``) and not a local path."""
    return isinstance(location, str) and "://" in location


def open_reader(location: str | Path, reader: str = "auto") -> Reader:
    """The reader for a slide: the named one, or the first that accepts the content.

    Raises:
        SlideNotFoundError, EmptyFileError, TruncatedSlideError, IncompleteSlideError: before any reader is asked.
        NotASlideError: no reader accepts it; the message holds what each one said.
        UnsupportedPixelError, NeedsConversionError: a reader knows the format and says why it cannot serve it.
    """
    if reader not in READER_NAMES:
        raise UsageError(f"no reader is called {reader!r}; choose one of {', '.join(READER_NAMES)}")
    if is_remote(location):
        return TiffSlideReader(str(location))
    path = Path(location)
    check_file(path)
    if reader != "auto":
        return _READERS[reader](path)
    names = [name for name in _READERS if name not in _TIFF_ONLY or _starts_like_tiff(path)]
    refusals: list[SlideError] = []
    for name in names:
        try:
            opened = (_exact_tiff if name == "tiff" else _READERS[name])(path)
        except SlideError as error:
            refusals.append(error)
            continue
        opened.reason = next((str(error) for error in refusals if isinstance(error, PixelsDifferError)), None)
        return opened
    for refusal in refusals:
        if not isinstance(refusal, NotASlideError):
            raise refusal
    said = "; ".join(str(refusal).removeprefix(f"{path}: ") for refusal in refusals)
    raise NotASlideError(f"{path}: no reader accepts it ({said})")


def check_file(path: Path) -> None:
    """Refuse what is no file that a reader could take."""
    if path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs")):
        raise NotASlideError(f"{path}: a Zarr image, which no reader here takes; convert it to OME-TIFF")
    if path.is_dir() and not os.access(path, os.R_OK):
        raise SlideNotFoundError(f"{path}: this folder may not be read; check its permissions")
    if path.is_dir():
        raise NotASlideError(f"{path}: this is a folder; name one of its files, or give the folder to wsi-extract")
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise SlideNotFoundError(f"{path}: there is no such file") from error
    except OSError as error:
        raise SlideNotFoundError(f"{path}: cannot be looked at: {error.strerror}") from error
    if size == 0:
        raise EmptyFileError(f"{path}: the file has no bytes; fetch it again")
    if path.suffix.lower() == ".mrxs" and not (path.with_suffix("") / "Slidedat.ini").is_file():
        raise IncompleteSlideError(
            f"{path}: its folder {path.stem}/ with Slidedat.ini is missing; copy it beside the file"
        )
    try:
        check_whole(path)
    except PermissionError as error:
        raise SlideNotFoundError(f"{path}: may not be read; check its permissions") from error


def _starts_like_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
