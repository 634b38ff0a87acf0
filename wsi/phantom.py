"""Phantom: a made-up slide whose truth is known.

A phantom is a pure function from position to pixels, with the polygons that were painted. It serves wherever a real
slide could, and no real slide should be needed: the demo, the tests, the benchmarks::

    phantom = Phantom(PhantomSpec(8192, 6144, seed=3, tumour=0.3, pen=("blue",)))
    phantom.render(1024, 2048, 256, 256)  # uint8 (256, 256, 3)
    phantom.tumour.area / phantom.tissue.area
    write_svs(Path("demo.svs"), phantom)

Colours follow Beer and Lambert: haematoxylin and eosin concentrations add up, and each takes its share of the light.
The haematoxylin vector is that of Macenko et al. (A method for normalizing histology slides, ISBI 2009), the eosin
vector was chosen by eye beside scanned slides, those of haematoxylin with DAB are of Ruifrok and Johnston
(Quantification of histochemical staining by color deconvolution, 2001).
"""

import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import MultiPolygon, Polygon, STRtree, affinity

from wsi._files import replace_atomically
from wsi._phantom_texture import (
    ATLAS_PX,
    NUCLEUS_ANGLES,
    TISSUE_KINDS,
    Sprite,
    Stamp,
    TissueKind,
    blob,
    noise_at,
    noise_plane,
    orient_points,
    orient_raster,
    stamp_nucleus,
    textures,
    uniform_at,
)
from wsi.errors import UsageError
from wsi.grid import Box

__all__ = ["Codec", "PenColour", "Phantom", "PhantomSpec", "Stain", "demo_specs", "write_svs"]

PenColour = Literal["red", "green", "blue", "black"]
Stain = Literal["he", "ihc", "pale"]
Codec = Literal["jpeg", "jpeg-rgb", "jpeg2000", "jpeg2000-rgb"]

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Plane = NDArray[np.float32]

_BLOCK_PX = 512  # pixels are made in whole blocks of the level-0 lattice, so the box asked for leaves no trace in them
_GRAIN_PX = 256  # period of the sensor noise; divides a block
_NUCLEUS_CELL_UM = 9.0
_WARP_UM, _WARP_LENGTH_UM = 95.0, 330.0
_DEFOCUS_UM = 5.0
_ADENOMA_STAIN = 1.0, 2.2  # times that of the kind
_SPECIES = ("spindle", "lymphocyte", "malignant")  # nuclei that lie outside of glands

# Light that passes, per channel, where a stroke is thick.
_PEN_RGB = {
    "red": (0.82, 0.12, 0.16),
    "green": (0.10, 0.50, 0.28),
    "blue": (0.13, 0.20, 0.66),
    "black": (0.13, 0.13, 0.15),
}


@dataclass(frozen=True)
class PhantomSpec:
    """All that decides a phantom: the same spec gives the same pixels, and one thing changed leaves the rest in place.

    On another processor a pixel may differ by a grey level, as sums may be rounded in another order.

    Attributes:
        width, height: level-0 pixels.
        mpp: microns per pixel, in x and y.
        seed: of everything that is left to chance.
        n_pieces: pieces of tissue; 0 makes a slide of glass.
        tissue_fraction: share of the slide under tissue, holes included; above 0.5 several pieces may lack the room.
        tumour: share of every piece that is tumour, holes included.
        adenoma: likewise a benign mass: near by it has the glands of mucosa, from afar the colours of tumour, on one slide
            darker and on another paler. Tumour lies over it.
        n_holes: tears in the tissue.
        pen: one stroke of a marker for each colour.
        blur: whether a part of the tissue is out of focus.
        background: RGB of glass.
        stain: ``"he"``; ``"pale"``, the same faded; ``"ihc"``, epithelium in brown over pale blue nuclei.

    Raises :class:`UsageError` for numbers that make no slide.
    """

    width: int
    height: int
    mpp: float = 0.25
    seed: int = 0
    n_pieces: int = 1
    tissue_fraction: float = 0.4
    tumour: float = 0.0
    adenoma: float = 0.0
    n_holes: int = 0
    pen: tuple[PenColour, ...] = ()
    blur: bool = False
    background: tuple[int, int, int] = (243, 243, 243)
    stain: Stain = "he"

    def __post_init__(self) -> None:
        _require(
            (min(self.width, self.height) >= 64, f"{self.width} x {self.height} px: a phantom has at least 64 x 64"),
            (0.2 <= self.mpp <= 2.0, f"mpp {self.mpp}: phantoms are drawn for 0.2 to 2.0 microns per pixel"),
            (self.seed >= 0, f"seed {self.seed} is negative"),
            (0 <= self.n_pieces <= 64, f"n_pieces {self.n_pieces} is not within 0 to 64"),
            (0 < self.tissue_fraction <= 0.6, f"tissue_fraction {self.tissue_fraction} is not within 0 to 0.6"),
            (0 <= self.tumour <= 1, f"tumour {self.tumour} is not within 0 to 1"),
            (0 <= self.adenoma <= 1, f"adenoma {self.adenoma} is not within 0 to 1"),
            (0 <= self.n_holes <= 64, f"n_holes {self.n_holes} is not within 0 to 64"),
            (set(self.pen) <= set(_PEN_RGB), f"pen {self.pen}: the colours are {', '.join(_PEN_RGB)}"),
            (
                len(self.background) == 3 and all(128 <= c <= 255 for c in self.background),
                f"background {self.background} is not three numbers within 128 to 255",
            ),
            (self.stain in _STAINS, f"stain {self.stain!r}: the stains are {', '.join(_STAINS)}"),
        )


def _require(*checks: tuple[bool, str]) -> None:
    for holds, message in checks:
        if not holds:
            raise UsageError(message)


# --- colour -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StainColours:
    """Optical density in R, G and B of a unit of haematoxylin and of its partner, and how strong either is."""

    haematoxylin: tuple[float, float, float]
    partner: tuple[float, float, float]
    strength: tuple[float, float]


_STAINS = {
    "he": _StainColours((0.5626, 0.7201, 0.4062), (0.12, 0.86, 0.46), (1.0, 1.0)),
    "pale": _StainColours((0.5626, 0.7201, 0.4062), (0.12, 0.86, 0.46), (0.42, 0.36)),
    "ihc": _StainColours((0.65, 0.704, 0.286), (0.268, 0.570, 0.776), (0.62, 1.7)),
}


def _colour_table(spec: PhantomSpec) -> NDArray[np.uint32]:
    """Return RGB in the low bytes for every pair of concentrations, at index ``256 * haematoxylin + partner``."""
    stain = _STAINS[spec.stain]
    first, second = np.divmod(np.arange(65536), 256)
    density = np.outer(first * stain.strength[0] / 100, stain.haematoxylin)
    density += np.outer(second * stain.strength[1] / 100, stain.partner)
    rgba = np.zeros((65536, 4), np.uint8)
    rgba[:, :3] = np.round(np.array(spec.background) * np.exp(-density))
    return rgba.view("<u4").ravel()


# --- layout: where things lie, as polygons at level 0 -----------------------------------------------------------------


@dataclass(frozen=True)
class _Glands:
    """Glands in place: top-left ``corner (N, 2)`` of each sprite, how it is turned, and its outline."""

    corner: NDArray[np.int64]
    sprite: tuple[Sprite, ...]
    orientation: NDArray[np.int64]
    outline: NDArray[Any]


@dataclass(frozen=True)
class _Layout:
    """Polygons of everything. ``regions`` go by kind of tissue, in the order of painting; ``strokes`` by pen colour."""

    regions: dict[str, MultiPolygon]
    glands: _Glands
    strokes: tuple[shapely.Geometry, ...]
    blur: MultiPolygon


def _lay_out(spec: PhantomSpec) -> _Layout:
    def rng(what: str) -> np.random.Generator:
        return np.random.default_rng([spec.seed, zlib.crc32(what.encode())])

    outlines = _outlines(spec, rng("outlines"))
    holes = shapely.union_all(_holes(spec, rng("holes"), outlines))
    tissue = _multi(shapely.union_all(outlines).difference(holes))
    layers, masses, benign = rng("layers"), rng("tumour"), rng("adenoma")
    found = [
        _layers(layers, outline, spec.mpp)
        | {"tumour": _mass(masses, outline, spec.tumour, spec), "adenoma": _mass(benign, outline, spec.adenoma, spec)}
        for outline in outlines
    ]
    regions = {"submucosa": tissue}
    for kind in list(TISSUE_KINDS)[1:]:
        regions[kind] = _multi(shapely.union_all([layer[kind] for layer in found if kind in layer]).difference(holes))

    glandular = shapely.union_all([regions["mucosa"].difference(regions["lymphoid"]), regions["adenoma"]])
    crypts = _multi(glandular.difference(regions["tumour"]))
    sprites = textures(spec.mpp).glands
    packed = [
        _packed(rng("benign"), crypts, sprites["benign"], 52 / spec.mpp),
        _packed(rng("malignant"), regions["tumour"], sprites["malignant"], 60 / spec.mpp),
    ]
    glands = _Glands(
        np.concatenate([group.corner for group in packed]),
        packed[0].sprite + packed[1].sprite,
        np.concatenate([group.orientation for group in packed]),
        np.concatenate([group.outline for group in packed]),
    )
    return _Layout(regions, glands, _strokes(spec, rng("pen"), outlines), _blurred(spec, rng("blur"), outlines))


def _multi(geometry: shapely.Geometry) -> MultiPolygon:
    """Return the polygons of a geometry, slivers left out."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return MultiPolygon(list(parts[(shapely.get_type_id(parts) == 3) & (shapely.area(parts) > 1)]))


def _polygon(unit: Floats, centre: Floats, scale: float | Floats) -> Polygon:
    return Polygon(unit * scale + centre)


def _random_point(rng: np.random.Generator, region: shapely.Geometry) -> Floats:
    """Return a point of ``region``, each as likely as any other."""
    x0, y0, x1, y1 = region.bounds
    while True:
        point = rng.uniform((x0, y0), (x1, y1))
        if shapely.contains_xy(region, *point):
            return point


def _outlines(spec: PhantomSpec, rng: np.random.Generator) -> list[Polygon]:
    """Lay the pieces out, one in each cell of a grid over the slide."""
    if spec.n_pieces == 0:
        return []

    def waste(columns: int) -> float:
        rows = math.ceil(spec.n_pieces / columns)
        return columns * rows * math.exp(abs(math.log(spec.width * rows / (spec.height * columns))))

    columns = min(range(1, spec.n_pieces + 1), key=waste)
    cell = np.array([spec.width / columns, spec.height / math.ceil(spec.n_pieces / columns)])
    wanted = spec.tissue_fraction * spec.width * spec.height / spec.n_pieces
    points = int(np.clip(4 * math.sqrt(wanted) * spec.mpp / 20, 64, 4096))  # a vertex every 20 microns
    outlines = []
    for index in range(spec.n_pieces):
        for wobble in np.geomspace(0.75, 0.05, 12):  # the more is asked of a shape, the better it fills its frame
            unit = blob(rng, points, wobble, 1.75)
            unit = (unit - unit.min(axis=0)) / np.ptp(unit, axis=0)
            if Polygon(unit).area * 0.9 * cell.prod() >= wanted:
                break
        area, stretch, room = Polygon(unit).area, math.exp(rng.normal(0, 0.25)), 0.96 * cell
        size = np.minimum(cell * [stretch, 1 / stretch] * math.sqrt(wanted / (area * cell.prod())), room)
        size = np.minimum(size * wanted / (area * size.prod()), room)  # what one side lacks, the other makes up for
        corner = cell * [index % columns, index // columns] + (cell - size) * rng.uniform(0.15, 0.85, 2)
        outlines.append(_polygon(unit, corner, size))
    return outlines


def _holes(spec: PhantomSpec, rng: np.random.Generator, outlines: list[Polygon]) -> list[Polygon]:
    """Punch tears into the pieces in turn; each lies inside its piece and clear of the others."""
    holes: list[Polygon] = []
    for index in range(spec.n_holes if outlines else 0):
        piece = outlines[index % len(outlines)]
        size = math.sqrt(piece.area) * rng.uniform(0.035, 0.07)
        while True:
            hole = _polygon(blob(rng, 48, 0.6), _random_point(rng, piece), size)
            clear = hole.buffer(size / 4)
            if piece.contains(clear) and not any(clear.intersects(other) for other in holes):
                break
            size *= 0.95  # what does not fit at one size fits at a smaller one
        holes.append(hole)
    return holes


def _mass(rng: np.random.Generator, outline: Polygon, share: float, spec: PhantomSpec) -> shapely.Geometry:
    """Return a mass that takes up its share of a piece; its size is found by bisection."""
    if share == 0:
        return Polygon()
    unit, centre = blob(rng, 360, 0.7, 1.7), _random_point(rng, outline)
    low, high = 0.0, 8.0 * math.hypot(spec.width, spec.height)
    for _ in range(32):
        middle = (low + high) / 2
        small = outline.intersection(_polygon(unit, centre, middle)).area < share * outline.area
        low, high = (middle, high) if small else (low, middle)
    return outline.intersection(_polygon(unit, centre, high))


def _layers(rng: np.random.Generator, outline: Polygon, mpp: float) -> dict[str, shapely.Geometry]:
    """Cut a piece into layers as the wall of a gut has them; a small piece is all mucosa, as a biopsy is."""
    angle = rng.uniform(0, 2 * math.pi)
    normal = np.array([math.cos(angle), math.sin(angle)])
    depth_um = float(np.ptp(shapely.get_coordinates(outline) @ normal)) * mpp
    if depth_um < 1200:
        return {"mucosa": outline}

    def below(um: float) -> shapely.Geometry:
        return outline.intersection(affinity.translate(outline, *(-normal * um / mpp)))

    mucosa = outline.difference(below(min(0.3 * depth_um, 1100)))
    follicles = [
        _polygon(blob(rng, 40, 0.4), _random_point(rng, mucosa), rng.uniform(70, 130) / mpp)
        for _ in range(min(60, round(mucosa.area * mpp**2 / 0.5e6)))
    ]
    return {
        "muscle": below(0.52 * depth_um),
        "fat": below(0.74 * depth_um),
        "mucosa": mucosa,
        "lymphoid": shapely.union_all(follicles).intersection(outline),
    }


def _packed(rng: np.random.Generator, region: MultiPolygon, sprites: list[Sprite], pitch: float) -> _Glands:
    """Fill ``region`` with glands that do not touch: propose on a jittered lattice, keep the first of any that meet."""
    if region.is_empty:
        nowhere = np.zeros((0, 2), np.int64)
        return _Glands(nowhere, (), nowhere[:, 0], np.array([], object))
    x0, y0, x1, y1 = region.bounds
    ix, iy = np.meshgrid(np.arange(x0, x1, pitch), np.arange(y0, y1, pitch * 0.87))
    ix[1::2] += pitch / 2
    centre = np.stack([ix.ravel(), iy.ravel()], axis=1)
    centre += rng.uniform(-0.22, 0.22, centre.shape) * pitch
    shapely.prepare(region)
    centre = centre[shapely.contains_xy(region, centre)]
    which, orientation = rng.integers(len(sprites), size=len(centre)), rng.integers(8, size=len(centre))
    side = np.array([len(sprite.h) for sprite in sprites])
    corner = np.floor(centre - side[which, None] / 2).astype(np.int64)
    turned = np.array([[orient_points(s.outline, len(s.h), o) for o in range(8)] for s in sprites])
    outline = shapely.polygons(turned[which, orientation] + corner[:, None])
    inside = np.flatnonzero(shapely.contains_properly(region, outline))
    middle = side[:, None, None, None] / 2
    grown = ((turned - middle) * 1.06 + middle)[:, :, ::2][which[inside], orientation[inside]] + corner[inside, None]
    roomy = shapely.polygons(grown)
    dropped = np.zeros(len(centre), bool)
    for first, second in inside[STRtree(roomy).query(roomy, "intersects")].T.tolist():
        if first < second and not dropped[first]:
            dropped[second] = True
    keep = inside[~dropped[inside]]
    return _Glands(corner[keep], tuple(sprites[i] for i in which[keep]), orientation[keep], outline[keep])


def _strokes(spec: PhantomSpec, rng: np.random.Generator, outlines: list[Polygon]) -> tuple[shapely.Geometry, ...]:
    """Draw a stroke for each colour: a part of a loop about a piece, as somebody would ring it."""
    slide, short = shapely.box(0, 0, spec.width, spec.height), min(spec.width, spec.height)
    width_px = min(600 / spec.mpp, 0.03 * short)
    strokes = []
    for index in range(len(spec.pen)):
        around = outlines[index % len(outlines)] if outlines else slide.buffer(-0.2 * short)
        x0, y0, x1, y1 = around.bounds
        loop = np.roll(blob(rng, 240, 0.5, 2.2), int(rng.integers(240)), axis=0)[: int(rng.integers(90, 170))]
        reach = np.array([x1 - x0, y1 - y0]) * rng.uniform(0.42, 0.5)
        line = shapely.LineString(loop * reach + [(x0 + x1) / 2, (y0 + y1) / 2])
        strokes.append(line.buffer(width_px / 2).intersection(slide))
    return tuple(strokes)


def _blurred(spec: PhantomSpec, rng: np.random.Generator, outlines: list[Polygon]) -> MultiPolygon:
    """Choose a part of the largest piece, and the glass beside it, that is out of focus."""
    if not (spec.blur and outlines):
        return MultiPolygon()
    piece = max(outlines, key=lambda outline: outline.area)
    patch = _polygon(blob(rng, 120, 0.5), _random_point(rng, piece), 0.22 * math.sqrt(piece.area))
    return _multi(patch.intersection(shapely.box(0, 0, spec.width, spec.height)))


# --- the slide --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LooseNuclei:
    """Nuclei outside of glands: pixel of the centre ``xy (N, 2)``, index into ``_SPECIES``, a number in [0, 1)."""

    xy: NDArray[np.int64]
    species: NDArray[np.int64]
    pick: Floats


class Phantom:
    """A made-up slide: pixels at any place, and what they show.

    ``tissue``, ``tumour``, ``glands``, ``pen`` and ``blur`` are valid MultiPolygons in level-0 pixels, empty where
    there is none of it. Tissue is what lies within its outline, holes left out; the clear space in glands and in fat
    belongs to it. Its edge is frayed by about three microns. Glands do not touch; those in ``tumour`` are malignant.

    Nothing changes after it is made: it may be used from several threads.
    """

    def __init__(self, spec: PhantomSpec) -> None:
        self.spec = spec
        layout = _lay_out(spec)
        self.tissue = layout.regions["submucosa"]
        self.tumour = layout.regions["tumour"]
        self.glands = MultiPolygon(list(layout.glands.outline))
        self.pen = _multi(shapely.union_all(layout.strokes))
        self.blur = layout.blur

        self._layout = layout
        self._regions = [(TISSUE_KINDS[name], region) for name, region in layout.regions.items() if not region.is_empty]
        darker = np.random.default_rng([spec.seed, zlib.crc32(b"adenoma")]).uniform(*_ADENOMA_STAIN)
        self._tones = [kind.tones(darker if kind is TISSUE_KINDS["adenoma"] else 1.0) for kind, _ in self._regions]
        self._glands = layout.glands
        self._gland_tree = STRtree(layout.glands.outline)
        self._strokes = layout.strokes
        margin = math.ceil(8 / spec.mpp)  # beyond what frays, spreads or is smoothed at an edge
        self._painted = shapely.union_all([g.buffer(margin, quad_segs=1) for g in (self.tissue, self.pen, self.blur)])
        for geometry in (self._painted, self.blur, *(region for _, region in self._regions)):
            _prepare(geometry)

        self._textures = textures(spec.mpp)
        self._fibre_turn = float(np.random.default_rng(spec.seed).uniform(0, math.pi))
        self._table = _colour_table(spec)
        grain = np.round(np.random.default_rng(19).normal(0, 1.2, (_GRAIN_PX, _GRAIN_PX, 3))).astype(np.int16)
        self._grain = np.tile(grain, (_BLOCK_PX // _GRAIN_PX, _BLOCK_PX // _GRAIN_PX, 1))
        self._glass: Pixels = cv2.add(
            np.full(self._grain.shape, spec.background, np.uint8), self._grain, dtype=cv2.CV_8U
        )

    @property
    def kinds(self) -> dict[str, MultiPolygon]:
        """Where each kind of tissue is to be seen, by name, in level-0 pixels: none overlap, and together they are ``tissue``.

        ``"submucosa"``, ``"muscle"``, ``"fat"``, ``"mucosa"``, ``"lymphoid"``, ``"adenoma"`` and ``"tumour"``, those that
        there are.
        """
        seen, above = {}, MultiPolygon()
        for kind, region in reversed(self._layout.regions.items()):
            seen[kind] = _multi(region.difference(above))
            above = shapely.union(above, region)
        return {kind: region for kind, region in reversed(seen.items()) if not region.is_empty}

    def render(self, x: int, y: int, w: int, h: int, downsample: int = 1) -> Pixels:
        """Return RGB ``(h, w, 3)`` of the box whose top-left corner is level-0 pixel ``(x, y)``.

        ``w`` and ``h`` are pixels of the result, each the mean of ``downsample`` x ``downsample`` pixels of level 0. A
        level-0 pixel depends on the spec and its place alone, not on the box. Outside the slide there is glass. Raises
        :class:`UsageError` for a box without pixels.
        """
        _require((min(w, h, downsample) >= 1, f"{w} x {h} px at downsample {downsample}: each is at least 1"))
        if downsample == 1:
            return self._sharp(x, y, w, h)
        out = np.empty((h, w, 3), np.uint8)
        step = max(1, 4 * _BLOCK_PX // downsample)
        for row in range(0, h, step):
            for column in range(0, w, step):
                part = out[row : row + step, column : column + step]
                size = (part.shape[1] * downsample, part.shape[0] * downsample)
                part[:] = _area_mean(self._sharp(x + column * downsample, y + row * downsample, *size), downsample)
        return out

    def nuclei(self, box: Box) -> Floats:
        """Return the centres of all nuclei in ``box`` as ``(N, 2)`` level-0 pixels, in no particular order."""
        low, high = np.array([box.x, box.y]), np.array([box.x + box.w, box.y + box.h])
        found = [self._loose_nuclei(box.x, box.y, box.w, box.h).xy + 0.5]
        for i in self._gland_tree.query(shapely.box(*low, *high)):
            sprite, orientation = self._glands.sprite[i], int(self._glands.orientation[i])
            xy = orient_points(sprite.nuclei, len(sprite.h), orientation) + self._glands.corner[i]
            found.append(xy[((xy >= low) & (xy < high)).all(axis=1)])
        return np.concatenate(found)

    # --- pixels, block by block ---------------------------------------------------------------------------------------

    def _is_glass(self, x: int, y: int, w: int, h: int) -> bool:
        return not self._painted.intersects(shapely.box(x, y, x + w, y + h))

    def _sharp(self, x: int, y: int, w: int, h: int) -> Pixels:
        out = np.empty((h, w, 3), np.uint8)
        for top in range(y - y % _BLOCK_PX, y + h, _BLOCK_PX):
            for left in range(x - x % _BLOCK_PX, x + w, _BLOCK_PX):
                block = self._block(left, top)
                x0, y0, x1, y1 = max(x, left), max(y, top), min(x + w, left + _BLOCK_PX), min(y + h, top + _BLOCK_PX)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _block(self, x: int, y: int) -> Pixels:
        """Paint one block of the lattice."""
        side = _BLOCK_PX
        if self._is_glass(x, y, side, side):
            return self._glass
        rgb = self._in_focus(x, y, side, side)
        if self.blur.intersects(shapely.box(x, y, x + side, y + side)):
            m = 2 * math.ceil(_DEFOCUS_UM / self.spec.mpp)
            inner, wide = np.s_[m:-m, m:-m], (x - m, y - m, side + 2 * m, side + 2 * m)
            soft = _smoothed(self._in_focus(*wide), m // 2)[inner]
            mask = _softened(_raster(self.blur, *wide), m)[inner]
            rgb = cv2.blendLinear(soft, rgb, mask, 1 - mask)
        grainy: Pixels = cv2.add(rgb, self._grain, dtype=cv2.CV_8U)
        return grainy

    def _in_focus(self, x: int, y: int, w: int, h: int) -> Pixels:
        """Paint tissue and pen."""
        rgb = self._tissue_pixels(x, y, w, h)
        for colour, stroke in zip(self.spec.pen, self._strokes, strict=True):
            mask = _raster(stroke, x, y, w, h)
            if mask.any():
                streaks = noise_plane(self._seed("pen"), x, y, w, h, 90 / self.spec.mpp)
                ink = mask * np.clip(0.86 + 0.16 * streaks, 0, 1) / 255
                passing = 1 - ink[..., None] * (1 - np.array(_PEN_RGB[colour], np.float32))
                rgb = np.round(rgb * passing).astype(np.uint8)
        return rgb

    def _tissue_pixels(self, x: int, y: int, w: int, h: int) -> Pixels:
        """Paint tissue: the ground, loose nuclei, glands, and the light that all of it lets through."""
        m = self._textures.margin_px
        ground_h, ground_e = (np.pad(plane, 2 * m) for plane in self._ground(x, y, w, h))
        loose = self._loose_nuclei(x - m, y - m, w + 2 * m, h + 2 * m)
        for (column, row), stamp in zip((loose.xy - [x - 2 * m, y - 2 * m]).tolist(), self._stamps(loose), strict=True):
            stamp_nucleus(ground_h, ground_e, stamp, column, row)
        inner = np.s_[2 * m : -2 * m, 2 * m : -2 * m]
        stain_h, stain_e = ground_h[inner], ground_e[inner]
        self._lay_glands(stain_h, stain_e, x, y)
        if self.spec.stain == "ihc":  # the antibody marks epithelium and leaves a trace everywhere
            stain_e = cv2.multiply(stain_e, np.maximum(self._epithelium(x, y, w, h), 12), scale=1 / 255)
        rows, columns = np.arange(y, y + h) % ATLAS_PX, np.arange(x, x + w) % ATLAS_PX
        share = self._textures.granules[rows[:, None], columns]
        if not self.tissue.contains(shapely.box(x, y, x + w, y + h)):
            share *= self._cover(x, y, w, h)
        stain_h, stain_e = (cv2.multiply(plane, share, dtype=cv2.CV_8U) for plane in (stain_h, stain_e))
        packed = np.take(self._table, (stain_h.astype(np.uint16) << 8) | stain_e)
        return np.ascontiguousarray(packed.view(np.uint8).reshape(h, w, 4)[..., :3])

    def _ground(self, x: int, y: int, w: int, h: int) -> tuple[Pixels, Pixels]:
        """Return haematoxylin and eosin of what lies between the nuclei, ``(h, w)`` each."""
        box = shapely.box(x, y, x + w, y + h)
        present = [i for i, (_, region) in enumerate(self._regions) if region.intersects(box)]
        whole = [i for i in present if self._regions[i][1].contains(box)]
        stain_h, stain_e = np.zeros((h, w), np.uint8), np.zeros((h, w), np.uint8)
        ranks: dict[str, Pixels] = {}
        for i in present:
            if whole and i < whole[-1]:
                continue  # painted over
            kind, region = self._regions[i]
            if kind.texture not in ranks:
                ranks[kind.texture] = self._texture(kind.texture, x, y, w, h)
            new_h, new_e = (cv2.LUT(ranks[kind.texture], tone) for tone in self._tones[i])
            if i in whole:
                stain_h, stain_e = new_h, new_e
            else:
                mask = _softened(_raster(region, x, y, w, h), 6 / self.spec.mpp)
                stain_h = cv2.blendLinear(new_h, stain_h, mask, 1 - mask)
                stain_e = cv2.blendLinear(new_e, stain_e, mask, 1 - mask)
        mood = 1 + 0.28 * noise_plane(self._seed("mood"), x, y, w, h, 420 / self.spec.mpp)
        return stain_h, cv2.multiply(stain_e, mood, dtype=cv2.CV_8U)

    def _cover(self, x: int, y: int, w: int, h: int) -> Plane:
        """Return how far tissue covers each pixel, 0 to 1; its edge follows the fibres."""
        soft = _softened(_raster(self.tissue, x, y, w, h), 7 / self.spec.mpp)
        fibres = self._texture("mesh", x, y, w, h) / np.float32(255) - np.float32(0.5)
        frayed: Plane = np.clip(4 * (soft - 0.5 + 0.45 * fibres) + 0.5, 0, 1)
        return np.minimum(frayed, np.clip(3 * soft, 0, 1))

    def _texture(self, name: str, x: int, y: int, w: int, h: int) -> Pixels:
        """Look a box up in a repeating texture, turned and warped so that fibres swirl and no period shows."""
        reach, length = _WARP_UM / self.spec.mpp, _WARP_LENGTH_UM / self.spec.mpp
        dx, dy = (reach * noise_plane(self._seed(what), x, y, w, h, length) for what in ("warp x", "warp y"))
        c, s = math.cos(self._fibre_turn), math.sin(self._fibre_turn)
        column, row = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
        u = dx + (np.float32((c * x + s * y) % ATLAS_PX) + np.float32(c) * column + np.float32(s) * row)
        v = dy + (np.float32((c * y - s * x) % ATLAS_PX) + np.float32(c) * row - np.float32(s) * column)
        looked_up: Pixels = cv2.remap(self._textures.fields[name], u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        return looked_up

    def _lay_glands(self, stain_h: Pixels, stain_e: Pixels, x: int, y: int) -> None:
        """Lay glands onto the planes of a box, in place."""
        for sprite, turned, there in self._sprites(x, y, *stain_h.shape[::-1]):
            weight = turned(sprite.alpha) / np.float32(255)
            for plane, new in ((stain_h, sprite.h), (stain_e, sprite.e)):
                plane[there] = cv2.blendLinear(turned(new), plane[there], weight, 1 - weight)

    def _epithelium(self, x: int, y: int, w: int, h: int) -> Pixels:
        """Return the share of epithelium in each pixel, 0 to 255."""
        share = np.zeros((h, w), np.uint8)
        for sprite, turned, there in self._sprites(x, y, w, h):
            np.maximum(share[there], turned(sprite.epithelium), out=share[there])
        return share

    def _sprites(
        self, x: int, y: int, w: int, h: int
    ) -> Iterator[tuple[Sprite, Callable[[Pixels], Pixels], tuple[slice, slice]]]:
        """Yield the glands of a box: what turns and cuts their rasters, and where in the box the result belongs."""
        reach = 12 / self.spec.mpp  # beyond the outline, where it is pale
        for i in self._gland_tree.query(shapely.box(x - reach, y - reach, x + w + reach, y + h + reach)):
            sprite = self._glands.sprite[i]
            left, top = (self._glands.corner[i] - [x, y]).tolist()
            side = len(sprite.h)
            if not (-side < left < w and -side < top < h):
                continue
            there = (slice(max(top, 0), min(top + side, h)), slice(max(left, 0), min(left + side, w)))
            here = (slice(max(-top, 0), min(side, h - top)), slice(max(-left, 0), min(side, w - left)))
            yield sprite, _turner(int(self._glands.orientation[i]), here), there

    # --- loose nuclei -------------------------------------------------------------------------------------------------

    def _loose_nuclei(self, x: int, y: int, w: int, h: int) -> _LooseNuclei:
        """Return the nuclei outside of glands whose centres lie in a box: at most one in each cell of a fixed lattice.

        Whether there is one depends on its cell alone, so that boxes which overlap agree.
        """
        mpp = self.spec.mpp
        cell = max(4, round(_NUCLEUS_CELL_UM / mpp))
        grid = np.meshgrid(np.arange(x // cell, (x + w) // cell + 1), np.arange(y // cell, (y + h) // cell + 1))
        corner = np.stack([axis.ravel() for axis in grid], axis=1)
        draw = np.stack([uniform_at(self._seed(f"nucleus {k}"), *corner.T) for k in range(4)])
        xy = corner * cell + (draw[:2].T * cell).astype(np.int64)
        inside = ((xy >= [x, y]) & (xy < [x + w, y + h])).all(axis=1)
        xy, chance, pick = xy[inside], draw[2, inside], draw[3, inside]
        centre = xy.astype(np.float64) + 0.5
        crowd = np.clip(1 + 0.9 * noise_at(self._seed("crowd"), centre, 70 / mpp), 0.2, 1.8)
        species = np.full(len(xy), -1)
        box = shapely.box(x, y, x + w, y + h)
        for kind, region in self._regions:
            if region.intersects(box):
                here = shapely.contains_xy(region, centre)
                species[here] = _species(kind, chance[here] / crowd[here])
        at_gland = self._gland_tree.query(shapely.points(centre), "dwithin", distance=4 / mpp)[0]
        species[at_gland] = -1
        there = species >= 0
        return _LooseNuclei(xy[there], species[there], pick[there])

    def _stamps(self, loose: _LooseNuclei) -> Iterator[Stamp]:
        """Yield a picture for each nucleus; spindles lie along the fibres."""
        reach, length = _WARP_UM / self.spec.mpp, _WARP_LENGTH_UM / self.spec.mpp
        at, step = loose.xy.astype(np.float64) + 0.5, 8.0
        ahead, behind = (
            [noise_at(self._seed("warp y"), at + sign * np.array(axis), length) for axis in ((step, 0.0), (0.0, step))]
            for sign in (1.0, -1.0)
        )
        slope_x, slope_y = ((a - b) * reach / (2 * step) for a, b in zip(ahead, behind, strict=True))
        c, s = math.cos(self._fibre_turn), math.sin(self._fibre_turn)
        along = np.arctan2(s - slope_x, c + slope_y)  # the direction in which _texture() stays in one row
        for species, angle, pick in zip(loose.species.tolist(), along.tolist(), loose.pick.tolist(), strict=True):
            name = _SPECIES[species]
            jitter = (pick * 97 % 1 - 0.5) * (0.9 if name == "spindle" else math.pi)
            turned = self._textures.nuclei[name][round((angle + jitter) / math.pi * NUCLEUS_ANGLES) % NUCLEUS_ANGLES]
            yield turned[int(pick * len(turned))]

    def _seed(self, what: str) -> int:
        """Return a seed of its own for each use of noise."""
        return self.spec.seed << 32 | zlib.crc32(what.encode())


def _prepare(geometry: shapely.Geometry) -> None:
    """Make ``geometry`` quick to ask, and ask it once: GEOS builds its indexes then, before there are several threads."""
    shapely.prepare(geometry)
    if not geometry.is_empty:
        x0, y0, x1, y1 = geometry.bounds
        geometry.intersects(shapely.box(x0 - 1, (y0 + y1) / 2 - 1, x1 + 1, (y0 + y1) / 2 + 1))


def _turner(orientation: int, cut: tuple[slice, slice]) -> Callable[[Pixels], Pixels]:
    return lambda raster: np.ascontiguousarray(orient_raster(raster, orientation)[cut])


def _species(kind: TissueKind, chance: Floats) -> NDArray[np.int64]:
    """Return the index into ``_SPECIES`` that each chance falls on, -1 where there is no nucleus."""
    which = np.searchsorted(np.cumsum([share for _, share in kind.nuclei]), chance, side="right")
    return np.array([*(_SPECIES.index(name) for name, _ in kind.nuclei), -1])[which]


def _area_mean(pixels: Pixels, factor: int) -> Pixels:
    """Return the mean of every ``factor`` x ``factor`` pixels, rounded."""
    if factor == 1:
        return pixels
    size = (pixels.shape[1] // factor, pixels.shape[0] // factor)
    reduced: Pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return reduced


def _smoothed(pixels: Pixels, radius_px: int) -> Pixels:
    """Return the mean over a box, twice."""
    side = (2 * radius_px + 1, 2 * radius_px + 1)
    # cv2.stackBlur() does this in one pass, but what it returns depends on the number of threads (seen in OpenCV 5.0).
    smooth: Pixels = cv2.blur(cv2.blur(pixels, side), side)
    return smooth


def _softened(raster: Pixels, width_px: float) -> Plane:
    """Return a raster as 0 to 1, with an edge that takes about ``width_px`` to rise."""
    return _smoothed(raster, max(1, round(width_px / 3))).astype(np.float32) / np.float32(255)


def _raster(geometry: shapely.Geometry, x: int, y: int, w: int, h: int) -> Pixels:
    """Return how much of each pixel of a box lies in ``geometry``, 0 to 255."""
    raster = np.zeros((h, w), np.uint8)
    for part in shapely.get_parts(geometry):
        x0, y0, x1, y1 = part.bounds
        if x0 < x + w and x1 > x and y0 < y + h and y1 > y:
            rings = [shapely.get_coordinates(ring) for ring in (part.exterior, *part.interiors)]
            # Pixel centres lie at halves for shapely and at whole numbers for OpenCV.
            fixed = [np.round((ring - [x + 0.5, y + 0.5]) * 16).astype(np.int32) for ring in rings]
            cv2.fillPoly(raster, fixed, 255, cv2.LINE_AA, 4)
    return raster


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CodecFacts:
    """What a codec writes into the TIFF: compression and photometric tags, and the name that Aperio gives it."""

    compression: int
    photometric: Literal["ycbcr", "rgb"]
    subsampling: tuple[int, int]
    label: str


_CODECS: dict[str, _CodecFacts] = {
    "jpeg": _CodecFacts(7, "ycbcr", (2, 2), "JPEG/YCC"),
    "jpeg-rgb": _CodecFacts(7, "rgb", (1, 1), "JPEG/RGB"),
    "jpeg2000": _CodecFacts(33003, "rgb", (1, 1), "J2K/YUV16"),
    "jpeg2000-rgb": _CodecFacts(33005, "rgb", (1, 1), "J2K/KDU"),
}
_CLASSIC_TIFF_BYTES = 2**32 - 2**24  # offsets have 32 bits; some room is left for the directories
_THUMBNAIL_PX = 1024


def write_svs(
    path: Path,
    phantom: Phantom | PhantomSpec,
    *,
    codec: Codec = "jpeg",
    tile_px: int = 256,
    quality: int = 75,
    levels: Sequence[int] = (1, 4, 16),
) -> None:
    """Write a phantom as Aperio writes slides: tiled pyramidal TIFF, a thumbnail second, JPEG tables kept apart.

    ``levels`` are downsamples that are powers of two; the size of a level is rounded down, and each of its pixels is
    the mean of the level-0 pixels under it, before compression. ``"jpeg"`` is YCbCr 4:2:0, ``"jpeg-rgb"`` RGB that only
    the TIFF tag tells apart, ``"jpeg2000"`` YCbCr (33003), ``"jpeg2000-rgb"`` RGB (33005). ``quality`` is that of JPEG,
    1 to 100; JPEG 2000 aims at a fifth of it above 30 dB, which leaves flat glass up to two grey levels off. The file
    is a BigTIFF where a classic one might not hold it.

    Level 0 is painted once, in bands of 512 rows: memory grows with the width of the slide, not with its area. The file
    is there, whole, or not at all. Raises :class:`UsageError` for settings that make no file.
    """
    import tifffile  # codecs are imported where they are used: `import wsi` stays quick

    if isinstance(phantom, PhantomSpec):
        phantom = Phantom(phantom)
    width, height = phantom.spec.width, phantom.spec.height
    _require(
        (codec in _CODECS, f"codec {codec!r}: the codecs are {', '.join(_CODECS)}"),
        (tile_px >= 16 and tile_px % 16 == 0, f"tile_px {tile_px} is not a positive multiple of 16"),
        (1 <= quality <= 100, f"quality {quality} is not within 1 to 100"),
        (list(levels) == sorted({1, *levels}), f"levels {tuple(levels)} do not rise from 1"),
        (all(_BLOCK_PX % d == 0 for d in levels), f"levels {tuple(levels)} are not powers of two up to {_BLOCK_PX}"),
        (min(width, height) >= max(levels, default=1), f"levels {tuple(levels)}: the last one has no pixel"),
    )
    encode = _Encoder(codec, quality)
    thumbnail = _Thumbnail(width, height)
    description = _Description(phantom.spec, tile_px, f"{_CODECS[codec].label} Q={quality}")

    with replace_atomically(path) as file, ThreadPoolExecutor(os.cpu_count()) as pool, ExitStack() as stack:
        sharpest, *others = (_Level(phantom, downsample, tile_px, encode, pool) for downsample in levels)
        spools = [_Spool(stack.enter_context(tempfile.TemporaryFile(dir=path.parent))) for _ in others]

        def paint() -> Iterator[bytes]:
            for band in _bands(phantom, pool):
                thumbnail.push(band)
                for level, spool in zip(others, spools, strict=True):
                    spool.extend(level.push(_area_mean(band, level.downsample)))
                yield from sharpest.push(band)
            yield from sharpest.rest()

        big = _most_bytes(phantom, [sharpest, *others]) > _CLASSIC_TIFF_BYTES
        tiff = stack.enter_context(tifffile.TiffWriter(file, bigtiff=big))
        tags: dict[str, Any] = {"photometric": "rgb", "metadata": None}
        tiled = tags | {
            "dtype": np.uint8,
            "tile": (tile_px, tile_px),
            "compression": _CODECS[codec].compression,
            "compressionargs": {"outcolorspace": _CODECS[codec].photometric},
            "subsampling": _CODECS[codec].subsampling,
            "jpegtables": encode.tables,
        }
        tiff.write(paint(), shape=(height, width, 3), description=description.slide(), **tiled)
        small = thumbnail.pixels()
        stripped = tags | {"compression": "jpeg", "compressionargs": {"level": 80}, "rowsperstrip": len(small)}
        tiff.write(small, description=description.thumbnail(small.shape[1], small.shape[0]), **stripped)
        for level, spool in zip(others, spools, strict=True):
            spool.extend(level.rest())
            shape = (level.height, level.width, 3)
            tiff.write(iter(spool), shape=shape, description=description.level(level.width, level.height), **tiled)


@dataclass(frozen=True)
class _Description:
    """The texts by which a reader knows an Aperio slide, its resolution and its pages."""

    spec: PhantomSpec
    tile_px: int
    compression: str

    def _head(self) -> str:
        size = f"{self.spec.width}x{self.spec.height}"
        return f"Aperio Image Library v12.0.0 \r\n{size} [0,0 {size}] ({self.tile_px}x{self.tile_px})"

    def _facts(self) -> str:
        power = min((5, 10, 20, 40), key=lambda power: abs(math.log(power * self.spec.mpp / 10)))
        return f"|AppMag = {power}|MPP = {self.spec.mpp!r}|ScanScope ID = PHANTOM|Seed = {self.spec.seed}"

    def slide(self) -> str:
        return f"{self._head()} {self.compression}{self._facts()}"

    def thumbnail(self, width: int, height: int) -> str:
        return f"{self._head()} -> {width}x{height} - {self._facts()}"

    def level(self, width: int, height: int) -> str:
        return f"{self._head()} -> {width}x{height} {self.compression}"


def _bands(phantom: Phantom, pool: ThreadPoolExecutor) -> Iterator[Pixels]:
    """Yield level 0 in bands of whole blocks, ``(512, width, 3)``, with glass beyond the far edges of the slide."""
    columns = range(0, phantom.spec.width, _BLOCK_PX)
    for y in range(0, phantom.spec.height, _BLOCK_PX):
        band = np.empty((_BLOCK_PX, len(columns) * _BLOCK_PX, 3), np.uint8)
        for _ in pool.map(_painter(phantom, band, y), columns):
            pass
        yield band


def _painter(phantom: Phantom, band: Pixels, y: int) -> Callable[[int], None]:
    def paint(x: int) -> None:
        band[:, x : x + _BLOCK_PX] = phantom.render(x, y, _BLOCK_PX, _BLOCK_PX)

    return paint


def _most_bytes(phantom: Phantom, pyramid: Sequence["_Level"]) -> float:
    """Return a size that the file stays below: raw pixels where there is anything, a little for a tile of glass."""
    total = 0.0
    for level in pyramid:
        busy = phantom._painted.buffer(level.tile_px * level.downsample, quad_segs=1).area
        total += 3 * busy / level.downsample**2 + 4096 * level.tiles
    return total


class _Encoder:
    """Compresses tiles with one codec; may be called from several threads."""

    def __init__(self, codec: Codec, quality: int) -> None:
        self._codec = codec
        self._quality = quality
        self.tables: bytes | None = None
        if codec in ("jpeg", "jpeg-rgb"):
            self.tables = _split_jpeg(self._jpeg(np.zeros((16, 16, 3), np.uint8)))[0]

    def __call__(self, tile: Pixels) -> bytes:
        return self._jpeg2000(tile) if self.tables is None else _split_jpeg(self._jpeg(tile))[1]

    def _jpeg(self, tile: Pixels) -> bytes:
        import imagecodecs

        space, sampling = ("RGB", "444") if self._codec == "jpeg-rgb" else ("YCBCR", "420")
        return bytes(
            imagecodecs.jpeg8_encode(
                tile, self._quality, colorspace="RGB", outcolorspace=space, subsampling=sampling, optimize=False
            )
        )

    def _jpeg2000(self, tile: Pixels) -> bytes:
        import imagecodecs

        converted = self._codec == "jpeg2000"
        if converted:
            tile = np.ascontiguousarray(cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
        decibels = 30 + round(self._quality / 5)
        return bytes(imagecodecs.jpeg2k_encode(tile, decibels, codecformat="j2k", reversible=False, mct=not converted))


def _split_jpeg(stream: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG stream as its tables and the rest, without application markers (ITU-T T.81, B.5).

    Components are numbered from 0 as Aperio's are: the letters R, G and B would tell a decoder what the Adobe marker,
    which goes too, tells it otherwise.
    """
    tables, rest = bytearray(), bytearray()
    at = 2
    while True:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        segment = bytearray(stream[at : at + 2 + length])
        at += 2 + length
        if marker in (0xDB, 0xC4):  # quantisation and Huffman tables
            tables += segment
            continue
        if marker == 0xC0:  # frame header: three bytes for each component
            segment[10:19:3] = bytes(range(3))
        if marker == 0xDA:  # scan header: two bytes for each component, then the picture
            segment[5:11:2] = bytes(range(3))
            return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest + segment + stream[at:]
        if not 0xE0 <= marker <= 0xEF:
            rest += segment


class _Level:
    """One level of the pyramid: takes rows of any number, gives compressed tiles in their order."""

    def __init__(
        self, phantom: Phantom, downsample: int, tile_px: int, encode: _Encoder, pool: ThreadPoolExecutor
    ) -> None:
        self.downsample = downsample
        self.tile_px = tile_px
        self.width, self.height = phantom.spec.width // downsample, phantom.spec.height // downsample
        self._columns, self._rows = math.ceil(self.width / tile_px), math.ceil(self.height / tile_px)
        self.tiles = self._columns * self._rows
        self._phantom, self._encode, self._pool = phantom, encode, pool
        self._waiting: Pixels = np.empty((0, self.width, 3), np.uint8)
        self._row = 0
        self._glass: dict[tuple[int, int], bytes] = {}

    def push(self, rows: Pixels) -> Iterator[bytes]:
        """Take the next rows, yield the tiles that they complete."""
        rows = np.concatenate([self._waiting, rows[:, : self.width]]) if len(self._waiting) else rows[:, : self.width]
        whole = min(len(rows) // self.tile_px, self._rows - self._row)
        for start in range(0, whole * self.tile_px, self.tile_px):
            yield from self._compressed(rows[start : start + self.tile_px])
        self._waiting = rows[whole * self.tile_px :].copy()

    def rest(self) -> Iterator[bytes]:
        """Yield the last tiles, where rows are left that fill no whole one."""
        if self._row < self._rows:
            yield from self._compressed(self._waiting)

    def _compressed(self, rows: Pixels) -> list[bytes]:
        """Compress one row of tiles."""
        side, top = self.tile_px, self._row * self.tile_px
        rows = rows[: self.height - top]
        self._row += 1

        def tile(left: int) -> bytes:
            pixels = rows[:, left : left + side]
            short_y, short_x = side - pixels.shape[0], side - pixels.shape[1]
            if short_x or short_y:
                return self._encode(cv2.copyMakeBorder(pixels, 0, short_y, 0, short_x, cv2.BORDER_REPLICATE))
            x, y, span = left * self.downsample, top * self.downsample, side * self.downsample
            if not self._phantom._is_glass(x, y, span, span):
                return self._encode(np.ascontiguousarray(pixels))
            phase = (x % _GRAIN_PX, y % _GRAIN_PX)
            if phase not in self._glass:
                self._glass[phase] = self._encode(np.ascontiguousarray(pixels))
            return self._glass[phase]

        return list(self._pool.map(tile, range(0, self.width, side)))


class _Spool:
    """Compressed tiles set aside on the disk until their turn comes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lengths: list[int] = []

    def extend(self, tiles: Iterable[bytes]) -> None:
        for tile in tiles:
            self._file.write(tile)
            self._lengths.append(len(tile))

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        return (self._file.read(length) for length in self._lengths)


class _Thumbnail:
    """A picture of the whole slide, gathered from the bands as they pass."""

    def __init__(self, width: int, height: int) -> None:
        needed = math.ceil(math.log2(max(1.0, max(width, height) / _THUMBNAIL_PX)))
        self._downsample = min(2**needed, _BLOCK_PX)
        self._size = (width // self._downsample, height // self._downsample)
        self._bands: list[Pixels] = []

    def push(self, band: Pixels) -> None:
        self._bands.append(_area_mean(band, self._downsample))

    def pixels(self) -> Pixels:
        return np.ascontiguousarray(np.concatenate(self._bands)[: self._size[1], : self._size[0]])


# --- demo -------------------------------------------------------------------------------------------------------------


def demo_specs() -> list[tuple[str, PhantomSpec]]:
    """Return a few small slides that differ, by name: what the demo of the command line runs on."""
    return [
        ("resection-tumour", PhantomSpec(12288, 9216, mpp=0.5, seed=11, tumour=0.3, n_holes=2)),
        (
            "sections-tumour-pen",
            PhantomSpec(10240, 7680, mpp=0.5, seed=12, n_pieces=2, tumour=0.2, pen=("blue",), blur=True),
        ),
        ("biopsy-benign", PhantomSpec(8192, 6144, mpp=0.25, seed=13, n_pieces=2, tissue_fraction=0.12)),
        ("resection-benign-pen-holes", PhantomSpec(8192, 8192, mpp=0.5, seed=14, n_holes=5, pen=("green", "black"))),
        ("glass", PhantomSpec(4096, 4096, mpp=0.25, seed=15, n_pieces=0)),
    ]
