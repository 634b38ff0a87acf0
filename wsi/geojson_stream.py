"""GeoJsonStream: the annotations of a GeoJSON file of any length, one after another, in little memory."""

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

from wsi.annotation import Annotation
from wsi.errors import AnnotationError
from wsi.geojson import Frame, Rejection, Repair, parse_features, stated_frame

__all__ = ["GeoJsonStream"]

_BLOCK: Final = 1 << 20  # characters read at a time
_CHUNK: Final = 2048  # features parsed together: the shapely calls then cost little each
_SPACE: Final = " \t\n\r"


class GeoJsonStream:
    """What ``read_geojson`` reads, feature by feature, without holding the file.

    For FeatureCollections and arrays of features, plain or gzipped; a single feature or a zip is for ``read_geojson``.

    >>> stream = GeoJsonStream("cells.geojson.gz")
    >>> total = sum(annotation.geometry.area for annotation in stream)
    >>> stream.rejected
    []

    Attributes:
        frame: the slide the file says it belongs to, None if it does not.
        origin: what is added to its coordinates: the frame's, else the one given.
        rejected, repaired: what was left out or changed so far; numbers count the file's features from 0.
    """

    def __init__(self, path: str | os.PathLike[str], origin: tuple[float, float] | None = None) -> None:
        """Look for the frame, which may mean to read through the file.

        Raises:
            AnnotationError: the file as a whole cannot be understood.
        """
        self.path = Path(path)
        self.rejected: list[Rejection] = []
        self.repaired: list[Repair] = []
        self.frame: Frame | None = None
        for key, value in self._members():
            if key == "wsi":
                self.frame = stated_frame(str(self.path), {"wsi": value})
                break
        self.origin = self.frame.origin if self.frame else origin or (0.0, 0.0)

    def __iter__(self) -> Iterator[Annotation]:
        """Yield every annotation, from the beginning each time.

        Raises:
            AnnotationError: the file ends early or is no JSON from some point on.
        """
        self.rejected.clear()
        self.repaired.clear()
        index = 0
        chunk: list[Any] = []
        for key, value in self._members():
            if key is None:
                chunk.append(value)
            if len(chunk) == _CHUNK:
                index = yield from self._parsed(chunk, index)
                chunk = []
        yield from self._parsed(chunk, index)

    def _parsed(self, chunk: list[Any], index: int) -> Generator[Annotation, None, int]:
        annotations, rejected, repaired = parse_features(chunk, self.origin)
        self.rejected += [Rejection(item.index + index, item.reason) for item in rejected]
        self.repaired += [Repair(item.index + index, item.reason) for item in repaired]
        yield from annotations
        return index + len(annotations) + len(rejected)

    def _members(self) -> Iterator[tuple[str | None, Any]]:
        """Yield the file's top-level members by name, and its features with None for a name."""
        try:
            with self.path.open("rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                text = _Text(str(self.path), cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if packed else file)
                if text.next() == "[":
                    yield from ((None, item) for item in text.items())
                    return
                text.expect("{")
                while text.next() != "}":
                    key = text.value()
                    text.expect(":")
                    if key == "features" and text.next() == "[":
                        yield from ((None, item) for item in text.items())
                    else:
                        yield str(key), text.value()
                    if text.next() != "}":
                        text.expect(",")
        except FileNotFoundError as error:
            raise AnnotationError(f"{self.path}: there is no such file; check the path") from error
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise AnnotationError(f"{self.path}: cannot be read ({error}); copy or export it again") from error


class _Text:
    """JSON that is decoded a value at a time."""

    def __init__(self, where: str, file: IO[bytes]) -> None:
        self._where = where
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._ended = False

    def _more(self) -> None:
        """Read as much again as there is, so that a long value is not tried too often."""
        block = self._file.read(max(_BLOCK, len(self._buffer) - self._at))
        self._ended = not block
        self._buffer = self._buffer[self._at :] + self._decode(block, final=self._ended)
        self._at = 0

    def next(self) -> str:
        """The next character that is no space; it is not taken."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                raise AnnotationError(f"{self._where}: ends early; copy or export it again")
            self._more()

    def expect(self, character: str) -> None:
        if (found := self.next()) != character:
            raise AnnotationError(
                f"{self._where}: is no collection or array of features ({found!r} where {character!r} should be); "
                f"export the annotations as GeoJSON"
            )
        self._at += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    raise AnnotationError(f"{self._where}: is not JSON ({error}); export it again") from error
            else:
                if end < len(self._buffer) or self._ended:  # at the end a number may go on
                    self._at = end
                    return value
            self._more()

    def items(self) -> Iterator[Any]:
        """The items of the array that comes next."""
        self.expect("[")
        while self.next() != "]":
            yield self.value()
            if self.next() != "]":
                self.expect(",")
        self._at += 1
