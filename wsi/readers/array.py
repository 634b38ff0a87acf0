"""ArrayReader: pixels in memory, and plain pictures (PNG, JPEG, WebP, BMP, small TIFF) loaded into it."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wsi.errors import NeedsConversionError, NotASlideError, ReadError, UnsupportedPixelError
from wsi.grid import Box
from wsi.readers.base import RGB, WHITE, Pixels, flatten, paste

__all__ = ["MAX_PICTURE_PX", "ArrayReader", "PictureReader"]

MAX_PICTURE_PX = 350_000_000  # about 1 GB of RGB: what a file without tiles may cost


class ArrayReader:
    """Levels given as (H, W, 3) uint8 arrays, sharpest first."""

    name = "array"
    bounds: Box | None = None
    reason: str | None = None

    def __init__(
        self, levels: Sequence[Pixels], *, properties: Mapping[str, str] | None = None, background: RGB = WHITE
    ) -> None:
        for level in levels:
            if level.ndim != 3 or level.shape[2] != 3 or level.dtype != np.uint8:
                raise UnsupportedPixelError(f"levels are (H, W, 3) uint8, got {level.shape} {level.dtype}")
        self._levels = tuple(levels)
        self.sizes = tuple((level.shape[1], level.shape[0]) for level in levels)
        self.native = (True,) * len(self.sizes)
        self.properties: Mapping[str, str] = dict(properties or {})
        self.background = background

    def read(self, level: int, x: int, y: int, w: int, h: int) -> Pixels:
        pixels = self._levels[level]
        x0, y0 = max(x, 0), max(y, 0)
        part = pixels[y0 : max(y0, y + h), x0 : max(x0, x + w)]
        if part.size == 0:
            return paste(np.empty((0, 0, 3), np.uint8), 0, 0, w, h, self.background)
        return paste(np.ascontiguousarray(part), x0 - x, y0 - y, w, h, self.background)

    def close(self) -> None:
        """Nothing to give back."""


class PictureReader(ArrayReader):
    """A plain picture as a slide of one level; transparent pixels come out white. Pickles by path."""

    name = "picture"

    def __init__(self, path: Path) -> None:
        self.path = path
        pixels, properties = _load(path)
        super().__init__([pixels], properties=properties)

    def __reduce__(self) -> tuple[type["PictureReader"], tuple[Path]]:
        return PictureReader, (self.path,)


def _load(path: Path) -> tuple[Pixels, dict[str, str]]:
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours, and is checked
        try:
            picture = Image.open(path)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise NotASlideError(f"{path}: not a picture that Pillow can read") from error
        except Image.DecompressionBombError as error:
            raise _too_large(path) from error
    with picture:
        width, height = picture.size
        if width * height > MAX_PICTURE_PX:
            raise _too_large(path)
        if picture.mode not in ("RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "YCbCr"):
            raise UnsupportedPixelError(f"{path}: pixels of kind {picture.mode}; only 8-bit pictures can be read")
        if picture.mode in ("L", "LA", "1"):
            raise UnsupportedPixelError(
                f"{path}: a grey picture; only colour can be tiled: convert it to RGB if it is H&E"
            )
        properties = {"picture.format": picture.format or "", "picture.mode": picture.mode} | _tiff_resolution(picture)
        try:
            rgba = np.asarray(picture.convert("RGBA"))
        except (OSError, SyntaxError) as error:
            raise ReadError(f"{path}: the picture is damaged: {error}") from error
    return flatten(rgba, WHITE), properties


def _tiff_resolution(picture: object) -> dict[str, str]:
    """Resolution tags of a TIFF; the dpi of other pictures says how large to print them, not what was scanned."""
    tags = getattr(picture, "tag_v2", None)
    if tags is None or 282 not in tags or 283 not in tags:
        return {}
    unit = {2: "inch", 3: "centimeter"}.get(tags.get(296, 2), "none")
    return {
        "tiff.XResolution": str(float(tags[282])),
        "tiff.YResolution": str(float(tags[283])),
        "tiff.ResolutionUnit": unit,
    }


def _too_large(path: Path) -> NeedsConversionError:
    return NeedsConversionError(
        f"{path}: a picture this large without tiles would have to be held in memory whole; convert it first: "
        f"vips tiffsave {path.name} {path.stem}.tif --tile --pyramid --compression jpeg --Q 90"
    )
