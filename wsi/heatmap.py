"""Heatmap: one number per tile, its raster, picture, contours and QuPath objects."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from wsi._files import write_table
from wsi.annotation import Annotation
from wsi.errors import UsageError
from wsi.geojson import Frame, is_geojson, write_geojson
from wsi.grid import TileGrid
from wsi.picture import PICTURE_SUFFIXES, canvas, write_picture
from wsi.readers.base import Pixels
from wsi.slide import Overview

__all__ = ["Heatmap"]

_MAX_RASTER_PX = 1 << 26
_OPACITY = 0.55
_TOP_SHARE = 0.1  # of the tiles: what a saved GeoJSON outlines as a region


@dataclass(frozen=True, eq=False)
class Heatmap:
    """One number per tile of a slide.

    Attributes:
        grid: the tiles.
        values: (N,) float32, NaN = not scored.
        frame: the slide's size, resolution and the origin its annotations leave in (``Slide.frame``).
        name: what the numbers are, as measurements and classes are called: ``"attention"``, ``"Tumor"``.
    """

    grid: TileGrid
    values: NDArray[np.float32]
    frame: Frame
    name: str = "score"

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float32)  # a copy: nobody changes it from outside
        if values.shape != (len(self.grid),):
            raise ValueError(f"{len(self.grid)} tiles need as many values, got {values.shape}")
        if np.isinf(values).any():
            raise ValueError(f"{np.isinf(values).sum()} values are infinite; NaN is what was not scored")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """(N,) which tiles have a number."""
        return ~np.isnan(self.values)

    def quantile(self, q: float) -> float:
        """The value that a share ``q`` of the scored tiles does not exceed; NaN where no tile is scored."""
        values = self.values[self.scored]
        return float(np.quantile(values, q, method="inverted_cdf")) if len(values) else float("nan")

    def raster(self, downsample: float) -> NDArray[np.float32]:
        """(H, W) float32 picture of the values, NaN where no tile was scored. Overlapping tiles are averaged.

        A raster pixel belongs to the tiles that hold its centre; a tile smaller than a pixel still counts for the pixel
        that holds the tile's own.

        Args:
            downsample: level-0 pixels per raster pixel.

        Raises:
            UsageError: the raster would be larger than 2^26 pixels.
        """
        if not downsample > 0:
            raise ValueError(f"downsample must be positive, got {downsample}")
        size = np.array([max(1, round(length / downsample)) for length in self.frame.size])
        if size.prod() > _MAX_RASTER_PX:
            least = (self.frame.size[0] * self.frame.size[1] / _MAX_RASTER_PX) ** 0.5
            raise UsageError(f"a raster of {size[0]} x {size[1]} px is too large; take a downsample from {least:.1f}")
        return self._raster(size)

    def _raster(self, size: NDArray[np.int64]) -> NDArray[np.float32]:
        """(H, W) values on a picture of the whole slide with ``size`` (w, h) pixels."""
        scale = np.array(self.frame.size) / size
        low = self.grid.xy / scale
        high = (self.grid.xy + np.array(self.grid.side)) / scale
        # The pixels whose centres lie inside: i + 0.5 from low up to, not including, high.
        first, stop = np.ceil(low - 0.5).astype(np.int64), np.ceil(high - 0.5).astype(np.int64)
        thin = stop <= first
        first[thin] = np.floor((low + high) / 2).astype(np.int64)[thin]
        stop[thin] = first[thin] + 1
        first, stop = np.clip(first, 0, size), np.clip(stop, 0, size)
        total = np.zeros((size[1], size[0]), np.float64)
        count = np.zeros((size[1], size[0]), np.int32)
        for i in np.flatnonzero(self.scored):
            (x0, y0), (x1, y1) = first[i], stop[i]
            total[y0:y1, x0:x1] += self.values[i]
            count[y0:y1, x0:x1] += 1
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where(count > 0, total / count, np.nan), np.float32)

    def picture(self, view: Overview | None = None, *, limits: tuple[float, float] | None = None) -> Pixels:
        """(H, W, 3) uint8: the values in colour, from dark (low) to yellow (high), over the slide's overview.

        Args:
            view: the slide's overview (``Slide.overview``); white without it.
            limits: the values that are darkest and brightest; by default those that one tile in a hundred lies below and
                above, so that a single extreme tile does not make all others look alike.
        """
        image = canvas(view, self.frame.size)
        values = self._raster(np.array(image.shape[1::-1]))
        drawn = ~np.isnan(values)
        if not drawn.any():
            return image
        low, high = limits or (self.quantile(0.01), self.quantile(0.99))
        level = np.clip((np.nan_to_num(values) - low) / (high - low if high > low else 1.0), 0, 1)
        colour = cv2.applyColorMap(np.round(level * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
        mixed = _OPACITY * colour + (1 - _OPACITY) * image
        image[drawn] = np.round(mixed[drawn]).astype(np.uint8)
        return _with_scale(image, low, high)

    def contours(self, quantiles: tuple[float, ...] = (0.5, 0.75, 0.9)) -> tuple[Annotation, ...]:
        """Outlines of the tiles above each quantile, as annotations of the classes ``name: top 50%`` and so on.

        Equal values lie together on one side: where all tiles are alike, nothing stands out and nothing is outlined.
        """
        found = []
        for q in quantiles:
            if not 0 <= q < 1:
                raise ValueError(f"a quantile is from 0 to below 1, got {q}")
            region = self.region_above(self.quantile(q))
            if region is None:
                continue
            found.append(
                Annotation(
                    region,
                    f"{self._class_part()}: top {100 * (1 - q):g}%",
                    measurements={"quantile": q, "threshold": self.quantile(q), "area mm^2": self._area_mm2(region)},
                )
            )
        return tuple(found)

    def region_above(self, threshold: float) -> shapely.Geometry | None:
        """The tiles with values above the threshold as one shape in level-0 pixels; None where there are none."""
        xy = self.grid.xy[self.values > threshold]  # NaN is above nothing
        if not len(xy):
            return None
        width, height = self.grid.side
        order = np.lexsort((xy[:, 0], xy[:, 1]))
        xy = xy[order]
        # Runs of neighbours in a row become one box each: far fewer shapes to join.
        new_run = (np.diff(xy[:, 1], prepend=xy[0, 1] - 1) != 0) | (np.diff(xy[:, 0], prepend=xy[0, 0]) > width)
        starts = np.flatnonzero(new_run)
        ends = np.append(starts[1:], len(xy)) - 1
        boxes = shapely.box(xy[starts, 0], xy[starts, 1], xy[ends, 0] + width, xy[ends, 1] + height)
        return shapely.union_all(boxes)

    def tiles(self) -> Iterator[Annotation]:
        """Every scored tile as a QuPath ``tile`` with its value as measurement; *Measure > Show measurement maps*."""
        width, height = self.grid.side
        for i in np.flatnonzero(self.scored):
            x, y = (int(value) for value in self.grid.xy[i])
            yield Annotation(
                shapely.box(x, y, x + width, y + height),
                object_type="tile",
                measurements={self.name: float(self.values[i])},
            )

    def annotations(self, *, top: float = _TOP_SHARE) -> Iterator[Annotation]:
        """What ``save`` writes for QuPath: each piece of the region of the top tiles, then every scored tile.

        Args:
            top: the share of tiles that is outlined; 0 outlines none.
        """
        for contour in self.contours((1 - top,)) if top else ():
            for part in shapely.get_parts(contour.geometry):
                measured = {**contour.measurements, "area mm^2": self._area_mm2(part)}
                yield Annotation(part, contour.class_name, measurements=measured)
        yield from self.tiles()

    def save(self, path: str | os.PathLike[str], *, view: Overview | None = None) -> Path:
        """Write what the suffix says: ``.geojson`` (or ``.json``, either with ``.gz``), ``.png``, ``.jpg``, ``.csv``.

        The file is whole or not there. GeoJSON is for QuPath: tiles with measurements and the regions of the top tenth.
        CSV has a row a tile: x, y, value.

        Args:
            view: the slide's overview to draw a picture on.

        Raises:
            UsageError: another suffix.
        """
        path = Path(path)
        if is_geojson(path):
            write_geojson(path, self.annotations(), self.frame)
        elif path.suffix.lower() == ".csv":
            cells = (None if np.isnan(value) else str(value) for value in self.values)
            rows = ((x, y, cell) for (x, y), cell in zip(self.grid.xy.tolist(), cells, strict=True))
            write_table(path, ("x", "y", self.name), rows)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            write_picture(path, self.picture(view))
        else:
            raise UsageError(f"{path}: a heatmap is saved as .geojson, .geojson.gz, .png, .jpg or .csv")
        return path

    def _class_part(self) -> str:
        """The name as one part of a QuPath class."""
        return " ".join(self.name.replace(":", " ").split()) or "score"

    def _area_mm2(self, region: shapely.Geometry) -> float:
        return float(region.area * self.frame.mpp[0] * self.frame.mpp[1] / 1e6)

    def __repr__(self) -> str:
        values = self.values[self.scored]
        span = f"{values.min():.4g} to {values.max():.4g}" if len(values) else "none scored"
        return f"<Heatmap {self.name} of {self.frame.slide}: {len(values)} of {len(self)} tiles, {span}>"


def _with_scale(image: Pixels, low: float, high: float) -> Pixels:
    """The picture with a bar of its colours and their values in the lower left corner, where it is large enough."""
    height, width = image.shape[:2]
    bar_w, bar_h = width // 4, max(4, height // 60)
    text_px = max(10, height // 50)
    if bar_w < 100 or height < 6 * text_px:
        return image
    left, top = text_px, height - 2 * text_px - bar_h
    ramp = np.tile(np.linspace(0, 255, bar_w).astype(np.uint8), (bar_h, 1))
    image[top : top + bar_h, left : left + bar_w] = cv2.applyColorMap(ramp, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    scale = text_px / 22  # the font is 22 pixels high at scale 1
    for text, right in ((f"{low:.3g}", False), (f"{high:.3g}", True)):
        (text_w, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        at = (left + bar_w - text_w if right else left, height - text_px // 2 - 2)
        cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return image
