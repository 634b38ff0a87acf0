"""Slide: one open slide. Its resolution, pixels at any place and scale, overview, tissue and tile grid."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import shapely

from wsi.annotation import Annotation, tissue_annotations
from wsi.area import area_resize
from wsi.errors import ReadError, SlideNotFoundError, TooCoarseError, UnsupportedPixelError, UsageError
from wsi.geojson import Frame
from wsi.grid import Box, TileGrid, Tiling, cover
from wsi.pyramid import Pyramid
from wsi.readers import ArrayReader, Pixels, Reader, check_file, is_remote, open_reader
from wsi.resolution import Mpp, resolve_mpp
from wsi.tissue import TissueOptions, find_tissue, is_brightfield

__all__ = ["Overview", "Slide", "fingerprint", "region_of"]

_BLOCK_PX = 4096  # overviews of slides without small levels are read in blocks of this many level pixels
_SMALLEST_BLOCK_PX = 256
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Overview:
    """A picture of the whole slide.

    Attributes:
        image: (H, W, 3) uint8.
        scale: level-0 pixels per picture pixel in x and y.
        unreadable: level-0 boxes whose pixels could not be read; they have background colour in the picture.
    """

    image: Pixels
    scale: tuple[float, float]
    unreadable: tuple[Box, ...] = ()

    def reduced(self, max_px: int) -> "Overview":
        """The same picture with its longer side at most ``max_px``."""
        height, width = self.image.shape[:2]
        factor = max(1.0, max(width, height) / max_px)
        size = (max(1, round(width / factor)), max(1, round(height / factor)))
        scale = (self.scale[0] * width / size[0], self.scale[1] * height / size[1])
        return replace(self, image=area_resize(self.image, size), scale=scale)


class Slide:
    """An open slide. All places are level-0 pixels ``(x, y)`` in the full frame.

    >>> with Slide.open("case.svs") as slide:
    ...     grid = slide.grid(Tiling(mpp=0.5, tile_px=256))
    ...     pixels = slide.read_tile(grid, 0)
    """

    def __init__(self, reader: Reader, *, name: str, path: Path | str | None, mpp: Mpp) -> None:
        self.reader = reader
        self.name = name
        self.path = path
        self.mpp = mpp  # of level 0, and where the number comes from

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        mpp: float | tuple[float, float] | None = None,
        csv_mpp: tuple[float, float] | None = None,
        reader: str = "auto",
    ) -> "Slide":
        """Open a local file or an fsspec address.

        Args:
            mpp: microns per pixel of level 0, where the file is silent or wrong; a pair is (x, y).
            csv_mpp: the same from a table, which yields to ``mpp``.
            reader: one of ``wsi.readers.READER_NAMES``.

        Raises:
            SlideError: see ``wsi.readers.open_reader`` and ``wsi.resolution.resolve_mpp``.
        """
        opened = open_reader(location, reader)
        name = str(location).rsplit("/", 1)[-1] if is_remote(location) else Path(location).name
        flag = None if mpp is None else _checked_mpp(mpp)
        resolved = resolve_mpp(opened.properties, slide=str(location), flag=flag, csv=csv_mpp)
        return cls(opened, name=name, path=location if is_remote(location) else Path(location), mpp=resolved)

    @classmethod
    def from_array(
        cls, levels: Pixels | Sequence[Pixels], *, mpp: float | tuple[float, float], name: str = "array"
    ) -> "Slide":
        """A slide from (H, W, 3) uint8 pixels in memory, or several levels of it, sharpest first."""
        arrays = [levels] if isinstance(levels, np.ndarray) else list(levels)
        xy = _checked_mpp(mpp)
        return cls(ArrayReader(arrays), name=name, path=None, mpp=Mpp(*xy, "flag"))

    @cached_property
    def pyramid(self) -> Pyramid:
        return Pyramid(self.reader.sizes, self.mpp.xy, self.reader.native)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0."""
        return self.reader.sizes[0]

    @property
    def properties(self) -> Mapping[str, str]:
        """What the file says of itself."""
        return self.reader.properties

    @property
    def vendor(self) -> str:
        """The maker's name as OpenSlide or TiffSlide spells it, or the reader's name."""
        return self.properties.get("openslide.vendor") or self.properties.get("tiffslide.vendor") or self.reader.name

    @property
    def frame(self) -> Frame:
        """The frame annotations leave in: where QuPath puts this slide's origin, its size and resolution."""
        bounds = self.reader.bounds
        return Frame(
            slide=self.name, origin=(bounds.x, bounds.y) if bounds else (0, 0), mpp=self.mpp.xy, size=self.size
        )

    def read(self, box: Box, size: tuple[int, int], *, level: int = 0) -> Pixels:
        """(h, w, 3) uint8: a level-0 box as ``size`` (w, h) pixels, each the area mean of what it covers.

        ``level`` must be native and the box whole pixels of it.

        Raises:
            ReadError: the pixels cannot be read.
        """
        dx, dy = self.pyramid.downsample(level)
        x, y, w, h = box.x / dx, box.y / dy, box.w / dx, box.h / dy
        if any(value != int(value) for value in (x, y, w, h)):
            raise ValueError(f"{box} is not whole pixels of level {level} (every {dx:g}, {dy:g})")
        return area_resize(self.reader.read(level, int(x), int(y), int(w), int(h)), size)

    def read_tile(self, grid: TileGrid, index: int) -> Pixels:
        """(tile_px, tile_px, 3) uint8 pixels of one tile."""
        x, y = (int(value) for value in grid.xy[index])
        return self.read(Box(x, y, *grid.side), (grid.tile_px, grid.tile_px), level=grid.level)

    def overview(self, *, mpp: float | None = None, max_px: int | None = None) -> Overview:
        """The whole slide at ``mpp``, or with its longer side ``max_px``; never larger than the slide itself.

        Comes from the cheapest level; memory is bounded by blocks where that level is large. Blocks that cannot be read
        are left in background colour and named.

        Raises:
            ReadError: more than half of the slide cannot be read.
        """
        if (mpp is None) == (max_px is None) or not (mpp or max_px or 0) > 0:
            raise ValueError(f"give either mpp or max_px, and a positive number; got {mpp} and {max_px}")
        width, height = self.size
        if max_px is not None:
            factor = (max(1.0, max(width, height) / max_px),) * 2
        else:
            assert mpp is not None
            factor = (max(1.0, mpp / self.mpp.x), max(1.0, mpp / self.mpp.y))
        out = (max(1, round(width / factor[0])), max(1, round(height / factor[1])))
        return _overview(self.reader, self.pyramid, factor, out)

    def thumbnail(self, max_px: int = 1024) -> Pixels:
        """(H, W, 3) uint8 picture of the whole slide, longer side at most ``max_px``."""
        return self.overview(max_px=max_px).image

    def tissue_view(self, options: TissueOptions | None = None) -> Overview:
        """The picture that ``tissue`` looks at; coarser than ``options.mpp`` where the slide is very large.

        Raises:
            ReadError: more than half of the slide cannot be read.
        """
        return self.overview(mpp=self._tissue_options(options).mpp)

    def tissue(self, options: TissueOptions | None = None, *, view: Overview | None = None) -> tuple[Annotation, ...]:
        """Outlines of tissue, one annotation per piece, holes kept, in level-0 pixels.

        Where the overview could not be read, tissue is assumed: its tiles are then tried, and marked when they fail.

        Args:
            view: what ``tissue_view`` gave for these options, where it is at hand.

        Raises:
            UnsupportedPixelError: the background is dark, as in fluorescence, which this search does not know.
        """
        options = self._tissue_options(options)
        view = self.overview(mpp=options.mpp) if view is None else view
        if not is_brightfield(view.image):
            raise UnsupportedPixelError(
                f"{self.path or self.name}: dark background, as in fluorescence; tissue is looked for on brightfield slides "
                f"only: leave the slide out, or give its outlines with --tissue"
            )
        scale_mpp = (self.mpp.x * view.scale[0], self.mpp.y * view.scale[1])
        polygons = find_tissue(view.image, scale_mpp, view.scale, options)
        if view.unreadable:
            unreadable = [shapely.box(b.x, b.y, b.x + b.w, b.y + b.h) for b in view.unreadable]
            union = shapely.union_all([*polygons, *unreadable])
            polygons = tuple(part for part in shapely.get_parts(union) if part.geom_type == "Polygon")
        return tissue_annotations(polygons, self.mpp.xy)

    def _tissue_options(self, options: TissueOptions | None) -> TissueOptions:
        return (options or TissueOptions()).within((self.size[0] * self.mpp.x, self.size[1] * self.mpp.y))

    def lattice(self, tiling: Tiling) -> TileGrid:
        """Every tile that ``tiling`` puts on this slide, tissue or not.

        Raises:
            TooCoarseError: the scan is too coarse for the wanted mpp.
        """
        try:
            return cover(self.pyramid, tiling)
        except TooCoarseError as error:
            raise TooCoarseError(f"{self.path or self.name}: {error.fact}", error.remedy) from None

    def grid(
        self,
        tiling: Tiling | None = None,
        *,
        tissue: Sequence[Annotation] | None = None,
        roi: Sequence[Annotation] | None = None,
    ) -> TileGrid:
        """The tiles of this slide that hold tissue.

        Args:
            tissue: outlines to use instead of looking for them.
            roi: only what lies inside these regions counts.
        """
        tiling = tiling or Tiling()
        lattice = self.lattice(tiling)
        outlines = self.tissue() if tissue is None else tissue
        return lattice.keep(region_of(outlines, roi, holes=tiling.holes), tiling.min_tissue)

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        width, height = self.size
        mark = " estimated" if self.mpp.estimated else ""
        return (
            f"<Slide {self.name}: {width} x {height} px, {self.mpp.x:.4g} mpp ({self.mpp.source}{mark}), "
            f"{len(self.reader.sizes)} levels, {self.vendor}>"
        )

    def _repr_html_(self) -> str:
        import html

        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.thumbnail(512)).save(buffer, "PNG")
        picture = base64.b64encode(buffer.getvalue()).decode()
        width, height = self.size
        rows = {
            "size": f"{width:,} × {height:,} px = {width * self.mpp.x / 1000:.2f} × {height * self.mpp.y / 1000:.2f} mm",
            "resolution": f"{self.mpp.x:.4g} × {self.mpp.y:.4g} µm per pixel, from {self.mpp.source}"
            + (" (estimated)" if self.mpp.estimated else ""),
            "levels": ", ".join(f"{self.pyramid.downsample(i)[0]:g}" for i in range(len(self.reader.sizes))),
            "format": f"{self.vendor}, read by {self.reader.name}",
        }
        table = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items()
        )
        return (
            f"<figure style='margin:0'><figcaption><b>{html.escape(self.name)}</b></figcaption>"
            f"<img alt='thumbnail' src='data:image/png;base64,{picture}'><table>{table}</table></figure>"
        )


def _checked_mpp(mpp: float | tuple[float, float]) -> tuple[float, float]:
    try:
        x, y = mpp if isinstance(mpp, tuple | list) else (mpp, mpp)
        checked = float(x), float(y)
    except (TypeError, ValueError) as error:
        raise UsageError(f"mpp is a number, or a pair (x, y); got {mpp!r}") from error
    if not all(0 < value < float("inf") for value in checked):
        raise UsageError(f"mpp must be positive and finite, got {mpp!r}")
    return checked


def region_of(
    outlines: Sequence[Annotation], roi: Sequence[Annotation] | None = None, *, holes: str = "drop"
) -> shapely.Geometry:
    """One geometry of all polygonal outlines, within the regions of interest if there are any."""
    region = _union(outlines, fill=holes == "keep")
    return region if roi is None else shapely.intersection(region, _union(roi, fill=False))


def _union(annotations: Sequence[Annotation], *, fill: bool) -> shapely.Geometry:
    parts = [part for a in annotations for part in shapely.get_parts(a.geometry) if part.geom_type == "Polygon"]
    if fill:
        parts = [shapely.Polygon(part.exterior) for part in parts]
    return shapely.disjoint_subset_union_all([part if part.is_valid else shapely.make_valid(part) for part in parts])


def fingerprint(location: str | Path) -> dict[str, object]:
    """Facts by which a slide file is recognised: size in bytes and a digest of its beginning, middle and end.

    Companions (a .mrxs folder, the other files of a DICOM series' folder) are not looked at: their main file names them.
    """
    import fsspec

    try:
        with fsspec.open(str(location), "rb").open() if is_remote(location) else Path(location).open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for start in sorted({0, max(0, size // 2 - _SAMPLE_BYTES // 2), max(0, size - _SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    except FileNotFoundError as error:
        raise SlideNotFoundError(f"{location}: there is no such file") from error
    except IsADirectoryError:
        check_file(Path(location))
        raise
    return {"bytes": size, "sample_sha256": digest.hexdigest()}


def _overview(reader: Reader, pyramid: Pyramid, factor: tuple[float, float], out: tuple[int, int]) -> Overview:
    level = pyramid.level_for(factor)
    width, height = reader.sizes[level]
    if not reader.native[level] and width * height > _BLOCK_PX**2 * 4:
        level = 0  # too large to read in one piece from (0, 0)
        width, height = reader.sizes[level]
    scale = (pyramid.size[0] / out[0], pyramid.size[1] / out[1])
    dx, dy = pyramid.size[0] / width, pyramid.size[1] / height
    if not reader.native[level]:
        return Overview(area_resize(reader.read(level, 0, 0, width, height), out), scale)
    image = np.empty((out[1], out[0], 3), np.uint8)
    bad: list[tuple[Box, ReadError]] = []
    rows = max(1, int(_BLOCK_PX / (height / out[1])))
    columns = max(1, int(_BLOCK_PX / (width / out[0])))
    for top in range(0, out[1], rows):
        for left in range(0, out[0], columns):
            bottom, right = min(top + rows, out[1]), min(left + columns, out[0])
            x0, x1 = left * width // out[0], -(-right * width // out[0])
            y0, y1 = top * height // out[1], -(-bottom * height // out[1])
            block, holes = _read_block(reader, level, Box(x0, y0, x1 - x0, y1 - y0))
            image[top:bottom, left:right] = area_resize(block, (right - left, bottom - top))
            bad.extend(holes)
    lost = sum(box.w * box.h for box, _ in bad)
    if lost * 2 > width * height:
        raise ReadError(f"{lost / (width * height):.0%} of the slide cannot be read; first: {bad[0][1]}") from bad[0][1]
    at_level0 = tuple(Box(int(b.x * dx), int(b.y * dy), int(-(-b.w * dx // 1)), int(-(-b.h * dy // 1))) for b, _ in bad)
    return Overview(image, scale, at_level0)


def _read_block(reader: Reader, level: int, box: Box) -> tuple[Pixels, list[tuple[Box, ReadError]]]:
    """A block's pixels; where it cannot be read, it is read in quarters down to small boxes, which are named."""
    try:
        return reader.read(level, box.x, box.y, box.w, box.h), []
    except ReadError as error:
        pixels = np.empty((box.h, box.w, 3), np.uint8)
        pixels[...] = reader.background
        if max(box.w, box.h) <= _SMALLEST_BLOCK_PX:
            return pixels, [(box, error)]
    bad: list[tuple[Box, ReadError]] = []
    half_w, half_h = max(_SMALLEST_BLOCK_PX, -(-box.w // 2)), max(_SMALLEST_BLOCK_PX, -(-box.h // 2))
    for y in range(0, box.h, half_h):
        for x in range(0, box.w, half_w):
            quarter = Box(box.x + x, box.y + y, min(half_w, box.w - x), min(half_h, box.h - y))
            part, holes = _read_block(reader, level, quarter)
            pixels[y : y + quarter.h, x : x + quarter.w] = part
            bad.extend(holes)
    return pixels, bad
