"""PrototypeMap: which prototype each tile of a slide belongs to, as a picture and as annotations for QuPath."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mil.prototypes.palette import prototype_color, prototype_name
from mil.prototypes.prototypes import Prototypes
from mil.prototypes.survey import assigned_tiles
from mil.sources import BagSource
from wsi.annotation import Annotation
from wsi.errors import UsageError
from wsi.geojson import Frame, is_geojson, write_geojson
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap
from wsi.picture import PICTURE_SUFFIXES, canvas, write_picture
from wsi.readers.base import Pixels
from wsi.slide import Overview

__all__ = ["PrototypeMap", "map_slide"]

_OPACITY = 0.6
_SMALLEST_PX = 512  # a legend is not readable beside less


@dataclass(frozen=True, eq=False)
class PrototypeMap:
    """A prototype for each tile.

    Attributes:
        grid: the slide's tiles.
        prototype: (N,) index of the nearest prototype; −1 where a tile has no features.
        k: how many prototypes there are.
        frame: the slide's size, resolution and the origin its annotations leave in.
    """

    grid: TileGrid
    prototype: NDArray[np.int64]
    k: int
    frame: Frame

    def __post_init__(self) -> None:
        prototype = np.array(self.prototype, np.int64)
        if prototype.shape != (len(self.grid),) or (
            len(prototype) and not -1 <= prototype.min() <= prototype.max() < self.k
        ):
            raise ValueError(f"{len(self.grid)} tiles need as many indices from -1 to below {self.k}, not {prototype}")
        prototype.setflags(write=False)
        object.__setattr__(self, "prototype", prototype)

    @property
    def shares(self) -> NDArray[np.float64]:
        """(K,) share of the tiles with features that belong to each prototype."""
        counts = np.bincount(self.prototype[self.prototype >= 0], minlength=self.k)
        return np.asarray(counts / max(1, counts.sum()))

    def annotations(self) -> tuple[Annotation, ...]:
        """For each prototype that occurs, its tiles as one shape: class, colour, share of the tiles, area in mm².

        Where tiles overlap, so do the shapes.
        """
        found = []
        for index in np.flatnonzero(self.shares):
            own = self.prototype == index
            region = Heatmap(self.grid, own.astype(np.float32), self.frame).region_above(0.5)
            assert region is not None
            area = float(region.area * self.frame.mpp[0] * self.frame.mpp[1] / 1e6)
            measured = {"Tiles": float(own.sum()), "Share": float(self.shares[index]), "Area mm^2": area}
            name, color = prototype_name(int(index)), prototype_color(int(index))
            found.append(Annotation(region, name, color=color, measurements=measured))
        return tuple(found)

    def picture(self, view: Overview | None = None) -> Pixels:
        """(H, W, 3) uint8: each tile in its prototype's colour over the slide's overview, a legend to the right.

        Args:
            view: the slide's overview (``Slide.overview``); white without it.
        """
        image = canvas(view, self.frame.size)
        height, width = image.shape[:2]
        scale = np.array(self.frame.size) / (width, height)
        low = np.round(self.grid.xy / scale).astype(int)
        high = np.maximum(low + 1, np.round((self.grid.xy + np.array(self.grid.side)) / scale).astype(int))
        veil = image.copy()
        for index, (x0, y0), (x1, y1) in zip(self.prototype.tolist(), low.tolist(), high.tolist(), strict=True):
            if index >= 0:
                veil[y0:y1, x0:x1] = prototype_color(index)
        mixed: Pixels = cv2.addWeighted(veil, _OPACITY, image, 1 - _OPACITY, 0)
        return with_legend(mixed, self.shares)

    def save(self, path: str | os.PathLike[str], *, view: Overview | None = None) -> Path:
        """Write what the suffix says: ``.geojson`` (or ``.json``, either with ``.gz``) for QuPath, ``.png``, ``.jpg``.

        Args:
            view: the slide's overview to draw a picture on.

        Raises:
            UsageError: another suffix.
        """
        path = Path(path)
        if is_geojson(path):
            write_geojson(path, self.annotations(), self.frame)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            write_picture(path, self.picture(view))
        else:
            raise UsageError(f"{path}: a map of prototypes is saved as .geojson, .geojson.gz, .png or .jpg")
        return path

    def __repr__(self) -> str:
        return (
            f"<PrototypeMap of {self.frame.slide}: {len(self.grid)} tiles, {np.count_nonzero(self.shares)} of {self.k}>"
        )


def map_slide(source: BagSource, slide: str, prototypes: Prototypes) -> PrototypeMap:
    """The nearest prototype of each tile of a slide.

    Raises:
        RunMismatchError: the features are not those that the prototypes were fitted on.
        UsageError: the source knows no places of tiles.
    """
    prototypes.check(source.facts, where=slide)
    place = source.place(slide)
    prototype = np.full(len(place.grid), -1, np.int64)
    prototype[place.rows] = assigned_tiles(source, slide, prototypes)[0]
    return PrototypeMap(place.grid, prototype, prototypes.k, place.frame)


def with_legend(image: Pixels, shares: NDArray[np.float64] | Sequence[float]) -> Pixels:
    """The picture with a column to its right: colour, number and share of each prototype that occurs, largest first."""
    from PIL import Image, ImageDraw, ImageFont

    shares = np.asarray(shares)
    there = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
    height = max(image.shape[0], _SMALLEST_PX)
    line = int(min(height / (len(there) + 1), height / 18))
    font = ImageFont.load_default(max(9.0, 0.55 * line))
    words = [f"{prototype_name(index)}   {shares[index]:.1%}" for index in there]
    left, text_at = line // 2, 2 * line
    column = text_at + int(max((font.getlength(word) for word in words), default=0)) + line // 2
    canvas = Image.new("RGB", (image.shape[1] + column, height), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for place, (index, word) in enumerate(zip(there, words, strict=True)):
        x, y = image.shape[1] + left, line // 2 + place * line
        draw.rounded_rectangle((x, y + line // 8, x + line, y + 7 * line // 8), line // 6, prototype_color(index))
        draw.text((image.shape[1] + text_at, y + line // 2), word, (30, 30, 30), font, anchor="lm")
    return np.asarray(canvas)
