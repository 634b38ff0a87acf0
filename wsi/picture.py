"""Pictures for people: a slide's overview with tissue outlines and tile grid drawn on it."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import shapely

from wsi._files import write_atomically
from wsi.annotation import Annotation, class_color
from wsi.grid import TileGrid
from wsi.readers.base import Pixels
from wsi.slide import Overview

__all__ = ["PICTURE_SUFFIXES", "canvas", "draw_areas", "draw_overview", "jpeg_bytes", "write_picture"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")

_OUTLINE = (20, 130, 60)
_TILE = (30, 80, 200)
_VEIL = 0.3  # of a class's colour over its areas
_CANVAS_PX = 2048
_SHIFT = 4  # cv2 draws at sixteenths of a pixel


def draw_overview(
    view: Overview, tissue: Sequence[Annotation], grid: TileGrid | None = None, *, few: bool = False
) -> Pixels:
    """(H, W, 3) uint8: the overview with green outlines of tissue and, lightly, the blue frame of every tile.

    Args:
        few: the tiles are a choice of few, whose frames would hardly be seen: they are drawn plainly.
    """
    thickness = max(1, round(max(view.image.shape[:2]) / 700))
    image = view.image.copy()
    scale = np.array(view.scale)
    if grid is not None and len(grid):
        veil = image.copy()
        low = _fixed(grid.xy / scale)
        high = _fixed((grid.xy + np.array(grid.side)) / scale)
        for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist(), strict=True):
            cv2.rectangle(veil, (x0, y0), (x1, y1), _TILE, thickness if few else 1, cv2.LINE_AA, _SHIFT)
        image = veil if few else cv2.addWeighted(veil, 0.6, image, 0.4, 0, dst=veil)
    _outline(image, tissue, scale, thickness, _OUTLINE)
    return np.asarray(image, np.uint8)


def draw_areas(view: Overview, annotations: Sequence[Annotation]) -> Pixels:
    """(H, W, 3) uint8: the overview with areas veiled and outlined in the colours of their classes."""
    thickness = max(1, round(max(view.image.shape[:2]) / 700))
    scale = np.array(view.scale)
    veil, image = view.image.copy(), view.image.copy()
    by_colour: dict[tuple[int, int, int], list[Annotation]] = {}
    for annotation in annotations:
        by_colour.setdefault(annotation.color or class_color(annotation.class_name or ""), []).append(annotation)
    for colour, drawn in by_colour.items():
        for rings in _rings(drawn, scale):
            cv2.fillPoly(veil, rings, colour, cv2.LINE_AA, _SHIFT)
    cv2.addWeighted(veil, _VEIL, image, 1 - _VEIL, 0, dst=image)
    for colour, drawn in by_colour.items():
        _outline(image, drawn, scale, thickness, colour)
    return image


def _outline(
    image: Pixels, annotations: Sequence[Annotation], scale: np.ndarray, thickness: int, colour: tuple[int, int, int]
) -> None:
    for rings in _rings(annotations, scale):
        cv2.polylines(
            image, rings, isClosed=True, color=colour, thickness=thickness, lineType=cv2.LINE_AA, shift=_SHIFT
        )


def _rings(annotations: Sequence[Annotation], scale: np.ndarray) -> Iterator[list[np.ndarray]]:
    """The outline and holes of each polygon, as cv2 draws them."""
    for annotation in annotations:
        for part in shapely.get_parts(annotation.geometry):
            if part.geom_type == "Polygon":
                yield [_fixed(np.asarray(ring.coords)[:, :2] / scale) for ring in (part.exterior, *part.interiors)]


def jpeg_bytes(image: Pixels, *, quality: int = 88) -> bytes:
    """The picture as a JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_picture(path: Path, image: Pixels) -> None:
    """Write the picture, whole or not at all, as what the suffix says, one of ``PICTURE_SUFFIXES``."""
    write_atomically(path, _png_bytes(image) if path.suffix.lower() == ".png" else jpeg_bytes(image))


def canvas(view: Overview | None, size: tuple[int, int]) -> Pixels:
    """(H, W, 3) uint8 to draw on: a copy of the overview, or without one white in the shape of a slide of this size."""
    if view is not None:
        return view.image.copy()
    factor = max(1.0, max(size) / _CANVAS_PX)
    width, height = (max(1, round(length / factor)) for length in size)
    return np.full((height, width, 3), 255, np.uint8)


def _png_bytes(image: Pixels) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * (1 << _SHIFT)).astype(np.int32)
