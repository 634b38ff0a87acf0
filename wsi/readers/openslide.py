"""OpenSlideReader: every format OpenSlide knows, a DICOM series as one slide included."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi.errors import NotASlideError, ReadError, SlideNotFoundError
from wsi.grid import Box
from wsi.readers.base import RGB, WHITE, PerProcess, Pixels, flatten

if TYPE_CHECKING:
    import openslide

__all__ = ["OpenSlideReader"]

_BOUNDS = tuple(f"openslide.bounds-{key}" for key in ("x", "y", "width", "height"))


class OpenSlideReader:
    """Reads through OpenSlide.

    OpenSlide interpolates when a level-0 position does not fall on a whole pixel of a reduced level, so only levels
    whose downsample is a whole number count as native. An error is terminal for an OpenSlide handle: it is dropped and
    the next read opens a new one.
    """

    name = "openslide"
    reason: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: PerProcess[openslide.OpenSlide] = PerProcess()
        slide = self._handle()
        self.sizes = tuple((int(w), int(h)) for w, h in slide.level_dimensions)
        self.native = tuple(value == int(value) for value in slide.level_downsamples)
        self._steps = tuple(slide.level_downsamples)
        self.properties: Mapping[str, str] = dict(slide.properties)
        self.background = _background(self.properties.get("openslide.background-color"))
        self.bounds = _bounds(self.properties)

    def __reduce__(self) -> tuple[type["OpenSlideReader"], tuple[Path]]:
        return OpenSlideReader, (self.path,)

    def read(self, level: int, x: int, y: int, w: int, h: int) -> Pixels:
        if not self.native[level] and (x, y) != (0, 0):
            raise ValueError(f"level {level} of {self.path} is not native: read it from (0, 0) or use level 0")
        step = int(self._steps[level])
        return flatten(self._region(level, (x, y), (x * step, y * step), (w, h)), self.background)

    def probe(self, level: int, x: int, y: int) -> None:
        """Raise ReadError where the pixel (x, y) of ``level``, which need not be native, cannot be read."""
        step = self._steps[level]
        self._region(level, (x, y), (int((x + 0.5) * step), int((y + 0.5) * step)), (1, 1))

    def close(self) -> None:
        slide = self._handles.take()
        if slide is not None:
            slide.close()

    def _region(self, level: int, xy: tuple[int, int], location: tuple[int, int], size: tuple[int, int]) -> Pixels:
        import openslide

        slide = self._handle()
        try:
            region = slide.read_region(location, level, size)
        except openslide.OpenSlideError:
            self._handles.drop(slide)
            # The error may be another thread's: it is terminal for all who share the handle. One of our own tells.
            try:
                with openslide.OpenSlide(os.fspath(self.path)) as own:
                    region = own.read_region(location, level, size)
            except openslide.OpenSlideError as error:
                raise ReadError(
                    f"{self.path}: level {level}, {size[0]} x {size[1]} pixels at {xy} cannot be read: {error}"
                ) from error
        return np.asarray(region)

    def _handle(self) -> "openslide.OpenSlide":
        import openslide

        try:
            return self._handles.get(lambda: openslide.OpenSlide(os.fspath(self.path)))
        except openslide.OpenSlideError as error:
            if not self.path.exists():
                raise SlideNotFoundError(f"{self.path}: the file went away") from error
            raise NotASlideError(f"{self.path}: OpenSlide says: {error}") from error


def _background(text: str | None) -> RGB:
    if text is None or len(text) != 6:
        return WHITE
    return int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16)


def _bounds(properties: Mapping[str, str]) -> Box | None:
    try:
        x, y, w, h = (int(properties[key]) for key in _BOUNDS)
    except (KeyError, ValueError):
        return None
    return Box(x, y, w, h) if w > 0 and h > 0 else None  # a file that holds no tile at all states 0 x 0
