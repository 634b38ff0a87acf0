"""Masks: annotations from pictures of labels, PNG or TIFF."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import shapely
from numpy.typing import NDArray

from wsi.annotation import Annotation, canonical_class_name
from wsi.errors import AnnotationError, UsageError
from wsi.geojson import Frame
from wsi.tissue import mask_polygons

__all__ = ["MaskOptions", "load_mask", "read_mask"]

_ASPECT: Final = 0.01  # that the shapes of mask and slide may differ by where the mask is said to cover the slide


@dataclass(frozen=True)
class MaskOptions:
    """What a picture of labels does not say itself.

    Attributes:
        mpp: microns per mask pixel; or
        downsample: level-0 pixels per mask pixel. With neither, the mask covers the whole slide.
        origin: level-0 pixel (x, y) of the mask's upper left corner.
        classes: the class name of each label; 0 is background. Without them, a label's number is its name.
    """

    mpp: float | None = None
    downsample: float | None = None
    origin: tuple[float, float] = (0.0, 0.0)
    classes: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mpp is not None and self.downsample is not None:
            raise UsageError("a mask's scale is said by its mpp or by its downsample, not by both")
        for name in ("mpp", "downsample"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise UsageError(f"a mask's {name} must be positive, got {value}")


def read_mask(
    path: str | os.PathLike[str], options: MaskOptions | None = None, *, frame: Frame | None = None
) -> list[Annotation]:
    """Outline the pieces of each label along pixel edges, in level-0 pixels; by label, then top to bottom.

    Args:
        frame: the slide's, needed unless ``options.downsample`` is given.

    Raises:
        AnnotationError: the file holds no labels, or does not fit the slide.
        UsageError: nothing says how large a pixel is.
    """
    options = options or MaskOptions()
    path = Path(path)
    labels, colors = load_mask(path)
    scale = _scale(path, labels.shape, options, frame)
    values = [int(value) for value in np.unique(labels) if value]
    unknown = [value for value in values if options.classes and value not in options.classes]
    if unknown:
        raise AnnotationError(f"{path}: holds the labels {unknown[:5]}, for which no class is given; give them a class")
    found = []
    for value in values:
        name = canonical_class_name(options.classes.get(value, str(value)))
        rows, columns = _window(labels == value)
        for shape in mask_polygons(labels[rows, columns] == value, scale):
            shift = (columns.start * scale[0] + options.origin[0], rows.start * scale[1] + options.origin[1])
            found.append(Annotation(_moved(shape, shift), name, color=colors.get(value)))
    return found


def load_mask(path: Path) -> tuple[NDArray[Any], dict[int, tuple[int, int, int]]]:
    """(H, W) whole numbers of a PNG or TIFF file, and the colours of its palette, if it has one.

    Raises:
        AnnotationError: it is neither, or a picture in colour.
    """
    colors: dict[int, tuple[int, int, int]] = {}
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            labels = _load_tiff(path)
        elif head == b"\x89PNG\r\n\x1a\n":
            labels, colors = _load_png(path)
        else:
            raise AnnotationError(f"{path}: is neither PNG nor TIFF; save masks as these, without loss")
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: there is no such file; check the path") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error}); save the mask again") from error
    if labels.ndim == 3 and (labels[..., :1] == labels[..., :3]).all():
        labels = labels[..., 0]
    if labels.ndim != 2:
        raise AnnotationError(f"{path}: is a picture in colour {labels.shape}; a mask has one whole number a pixel")
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    if labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise AnnotationError(f"{path}: holds {labels.dtype}; a mask has one whole number from 0 a pixel")
    return labels, colors


def _load_tiff(path: Path) -> NDArray[Any]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return np.asarray(file.series[0].levels[0].asarray())
    except (tifffile.TiffFileError, IndexError, KeyError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error}); save the mask again") from error


def _load_png(path: Path) -> tuple[NDArray[Any], dict[int, tuple[int, int, int]]]:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                pixels = np.asarray(image)
                flat = (image.getpalette() or []) if image.mode == "P" else []
    except Image.DecompressionBombError as error:
        raise AnnotationError(f"{path}: is larger than a PNG should be ({error}); save it as a tiled TIFF") from error
    return pixels, {i: (flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]) for i in range(len(flat) // 3)}


def _scale(path: Path, shape: tuple[int, ...], options: MaskOptions, frame: Frame | None) -> tuple[float, float]:
    if options.downsample is not None:
        return options.downsample, options.downsample
    if frame is None:
        raise UsageError(f"{path}: how large are a mask's pixels? give its downsample, or the slide it belongs to")
    if options.mpp is not None:
        return options.mpp / frame.mpp[0], options.mpp / frame.mpp[1]
    height, width = shape
    scale = frame.size[0] / width, frame.size[1] / height
    rounding = 1 / min(shape)
    if abs(scale[0] / scale[1] - 1) > _ASPECT + rounding:
        raise AnnotationError(
            f"{path}: {width} x {height} px do not have the shape of the slide, {frame.size[0]} x {frame.size[1]}; "
            f"if the mask covers a part of it, say which: its mpp or downsample, and its origin"
        )
    return scale


def _window(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _moved(shape: shapely.Geometry, shift: tuple[float, float]) -> shapely.Geometry:
    return shapely.transform(shape, lambda xy: xy + shift) if any(shift) else shape
