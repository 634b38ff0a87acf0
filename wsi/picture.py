"""Pictures for people: a slide's overview with tissue outlines and tile grid drawn on it."""

import io
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import shapely

from wsi.annotation import Annotation, class_color
from wsi.grid import TileGrid
from wsi.readers.base import Pixels
from wsi.slide import Overview

__all__ = ["draw_areas", "draw_overview", "jpeg_bytes", "png_bytes"]

_OUTLINE = (20, 130, 60)
_TILE = (30, 80, 200)
_VEIL = 0.3  # of a class's colour over its areas
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


def png_bytes(image: Pixels) -> bytes:
    """The picture as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * (1 << _SHIFT)).astype(np.int32)
