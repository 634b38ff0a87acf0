"""TiffSlideReader: TIFF slides anywhere fsspec reaches (http, s3, memory), and local ones OpenSlide declines."""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi.errors import NotASlideError, ReadError, SlideNotFoundError, UnsupportedPixelError
from wsi.grid import Box
from wsi.readers.base import RGB, WHITE, PerProcess, Pixels, paste

if TYPE_CHECKING:
    import tiffslide

__all__ = ["TiffSlideReader"]


class TiffSlideReader:
    """Reads through TiffSlide, one region at a time: its handles keep a file offset and are not safe to share."""

    name = "tiffslide"
    background: RGB = WHITE
    bounds: Box | None = None
    reason: str | None = None

    def __init__(self, url: str) -> None:
        self.url = url
        self._handles: PerProcess[tiffslide.TiffSlide] = PerProcess()
        self._lock = threading.Lock()
        slide = self._handle()
        axes = slide.properties["tiffslide.series-axes"]
        if axes not in ("YXS", "CYX"):
            raise UnsupportedPixelError(f"{url}: the picture has axes {axes}, not colour; only 8-bit RGB can be read")
        self.sizes = tuple((int(w), int(h)) for w, h in slide.level_dimensions)
        self.native = (True,) * len(self.sizes)
        self.properties: Mapping[str, str] = {
            key: str(value) for key, value in slide.properties.items() if value is not None
        }

    def __reduce__(self) -> tuple[type["TiffSlideReader"], tuple[str]]:
        return TiffSlideReader, (self.url,)

    def read(self, level: int, x: int, y: int, w: int, h: int) -> Pixels:
        width, height = self.sizes[level]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if x0 >= x1 or y0 >= y1:
            return paste(np.empty((0, 0, 3), np.uint8), 0, 0, w, h, self.background)
        # TiffSlide truncates level-0 positions: the first level-0 pixel of a native pixel maps back to it.
        location = (-(-x0 * self.sizes[0][0] // width), -(-y0 * self.sizes[0][1] // height))
        with self._lock:
            slide = self._handle()
            try:
                part = slide.read_region(location, level, (x1 - x0, y1 - y0), as_array=True)
            except Exception as error:  # tifffile, zarr, the codecs and the file system have no error in common
                self.close()
                raise ReadError(
                    f"{self.url}: level {level}, {w} x {h} pixels at ({x}, {y}) cannot be read: {error}"
                ) from error
        return paste(_rgb(part, self.url), x0 - x, y0 - y, w, h, self.background)

    def close(self) -> None:
        slide = self._handles.take()
        if slide is not None:
            slide.close()

    def __del__(self) -> None:
        self.close()  # tifffile leaves the file open, with a warning, when its object goes

    def _handle(self) -> "tiffslide.TiffSlide":
        import tiffslide
        from tifffile import TiffFileError

        try:
            return self._handles.get(lambda: tiffslide.TiffSlide(self.url))
        except FileNotFoundError as error:
            raise SlideNotFoundError(f"{self.url}: there is nothing at this address") from error
        except (TiffFileError, tiffslide.TiffFileError, ValueError, IndexError, KeyError, OSError) as error:
            raise NotASlideError(f"{self.url}: TiffSlide says: {error}") from error


def _rgb(part: Any, url: str) -> Pixels:
    if part.dtype != np.uint8 or part.shape[2] not in (3, 4):
        raise UnsupportedPixelError(
            f"{url}: {part.shape[2]} channels of {part.dtype}; only 8-bit RGB can be read: convert the slide"
        )
    return np.ascontiguousarray(part[..., :3])
