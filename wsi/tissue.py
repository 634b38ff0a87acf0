"""Tissue: a slide's thumbnail in, the outlines of its tissue out.

Glass passes the light of the lamp as it is; stain takes colour out of it. So tissue is what differs *in colour* from
the glass of its own slide, while shadows, dust, scanner seams, coverslip edges and dark frames only take light away.
Six steps: the colour of the glass; colour against it; ink; what is coloured or finely patterned, joined where it is
close and kept where it is plainly coloured; tissue under ink; holes and crumbs. All of it is classical, deterministic
and in microns. Nothing here opens a file.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from wsi.errors import UsageError

__all__ = ["MAX_PIXELS", "TissueOptions", "find_tissue", "is_brightfield", "mask_polygons", "tissue_mask"]

MAX_PIXELS = 1 << 24  # of the picture that tissue is looked for in, so that memory does not grow with the slide

_Mask = NDArray[np.bool_]  # (H, W)
_Pixels = NDArray[np.uint8]  # (H, W, 3)
_Plane = NDArray[np.float32]  # (H, W)
_Light = tuple[_Plane, _Plane, _Plane]  # red, green, blue: the share of the glass's light that is left

_SMOOTH_UM = 8.0  # blur (sigma) that averages noise out and leaves a membrane
_AROUND_UM = 40.0  # blur (sigma) that tells a pixel's surroundings
_REACH = 4  # sigmas, beyond which OpenCV's blurs see nothing

_STRIP_PIXELS = 1 << 20  # pixels that numbers other than masks are worked out for at a time

# Glass; levels are of 255
_GLASS_LEVEL = 120  # the darkest that glass is
_WHITE_LEVEL = 252  # padding, or glass brighter than the camera measures
_CAST_LEVELS, _CREAM_LEVELS = 14, 45  # the most between its channels, and where red > green > blue
_FLAT_LEVELS = 2  # the most between it and its surroundings
_PATCH_UM = 24.0  # radius of the smallest patch to learn from
_LEAST_GLASS = 0.02  # share of a picture without its padding that must be glass for its colour to be believed
_HOLD = 0.02  # weight of a place without glass beside one that is all glass

# Tissue; shares are of the light that glass passes
_NOISE = 3.5  # medians: one in five thousand is beyond if chroma is noise (a Rayleigh distribution)
_SEED = 2.0  # times the least chroma, which a piece must reach somewhere
_FINE = 0.012  # share that a membrane or a nucleus passes less than its surroundings
_BLEED_UM = 24.0  # how far colour spreads by blur and by JPEG's coarse chroma,
_BLEED = 0.3  # and how much of it

# Ink
_INK_UM = 16.0  # radius of the smallest spot
_RIM_UM = 48.0  # how far it reaches beyond what is plainly ink


@dataclass(frozen=True)
class TissueOptions:
    """How tissue is looked for; saved with what was found.

    ``mpp``            microns per pixel at which tissue is looked for; a finer picture is reduced to it first. Slides
                       of more than ``MAX_PIXELS`` such pixels, 1,074 mm2 by default, are looked at coarser: ``within``
    ``min_chroma``     least difference in colour from glass, as a share of the light that glass passes
    ``gap_um``         gaps in tissue narrower than this are part of it
    ``min_area_um2``   smaller pieces are dropped; the default is half a tile of 256 px at 0.5 mpp
    ``min_hole_um2``   smaller holes are filled; the default is such a tile, or two large fat cells
    ``min_width_um``   pieces that are narrower on average are dropped: fibres, seams, rims of bubbles
    ``pen_width_um``   broadest stroke of a pen: what has an ink's colour but is broader is a stain; 0 = nothing is ink
    ``tolerance_um``   how far an outline may stray from the edges of the mask's pixels; at most ``mpp``

    Raises UsageError for a number that makes no sense.
    """

    mpp: float = 8.0
    min_chroma: float = 0.02
    gap_um: float = 80.0
    min_area_um2: float = 8_000.0
    min_hole_um2: float = 16_000.0
    min_width_um: float = 40.0
    pen_width_um: float = 2_000.0
    tolerance_um: float = 6.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{field.name} is {value}; it must be a finite number, zero or more")
        if self.mpp == 0 or not 0 < self.min_chroma < 0.5:
            raise UsageError(f"mpp is {self.mpp}, min_chroma {self.min_chroma}; both must be above 0, chroma below 0.5")
        if self.tolerance_um > self.mpp:
            raise UsageError(f"tolerance_um is {self.tolerance_um}; it must be at most one pixel, {self.mpp} um")

    def within(self, size_um: tuple[float, float]) -> "TissueOptions":
        """These options for a slide of ``size_um`` (x, y): ``mpp`` so coarse that it has at most ``MAX_PIXELS``.

        The outlines' tolerance, which is a share of a pixel, grows with it.
        """
        mpp = max(self.mpp, math.sqrt(size_um[0] * size_um[1] / MAX_PIXELS))
        return self if mpp == self.mpp else replace(self, mpp=mpp, tolerance_um=mpp * (self.tolerance_um / self.mpp))


_DEFAULT = TissueOptions()


def find_tissue(
    image: _Pixels, mpp: tuple[float, float], scale: tuple[float, float], options: TissueOptions = _DEFAULT
) -> tuple[shapely.Polygon, ...]:
    """Outline the tissue in ``image``, uint8 RGB (H, W, 3), in level-0 pixels.

    ``mpp`` is the picture's microns per pixel (x, y), ``scale`` its level-0 pixels per pixel (x, y). The polygons are
    those of ``mask_polygons``, simplified within ``tolerance_um``, and valid.
    """
    small, um = _reduced(image, mpp, options)
    height, width = image.shape[:2]
    step = (scale[0] * width / small.shape[1], scale[1] * height / small.shape[0])
    tolerance_px = options.tolerance_um * min(scale[0] / mpp[0], scale[1] / mpp[1])
    return tuple(polygon.simplify(tolerance_px) for polygon in mask_polygons(_tissue(small, um, options), step))


def tissue_mask(image: _Pixels, mpp: tuple[float, float], options: TissueOptions = _DEFAULT) -> _Mask:
    """Tell for each pixel of ``image``, uint8 RGB (H, W, 3), whether it is tissue: bool (H, W).

    ``mpp`` is the picture's microns per pixel (x, y). The picture must be a brightfield one: see ``is_brightfield``.
    """
    small, um = _reduced(image, mpp, options)
    mask = _tissue(small, um, options).astype(np.uint8)
    found: _Mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    return found


def is_brightfield(image: _Pixels) -> bool:
    """Tell a stained slide, uint8 RGB (H, W, 3), from a picture with a dark background such as fluorescence.

    Light that went through stained tissue is left in all three channels; fluorescence leaves one of them dark, or most
    of the picture. A slide in broad black borders is told by its share of glass.
    """
    counts = np.zeros(256, np.int64)
    for rows, _, _ in _strips(image.shape[:2]):
        red, green, blue = cv2.split(image[rows])
        least = cv2.min(cv2.min(red, green), blue)
        counts += cv2.calcHist([least], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    upto = np.cumsum(counts)
    half = int(upto[-1]) / 2
    median = (np.argmax(upto >= half) + np.argmax(upto > half)) / 2
    return bool(median >= 20 or counts[150:].sum() / upto[-1] >= 0.1)


def _reduced(image: _Pixels, mpp: tuple[float, float], options: TissueOptions) -> tuple[_Pixels, float]:
    """Reduce ``image`` to square pixels of about ``options.mpp`` or its coarser side; return their side in microns."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise UsageError(f"the picture is {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")
    if not (min(mpp) > 0 and math.isfinite(max(mpp))):
        raise UsageError(f"the picture's mpp is {mpp}; both must be above 0")
    goal = max(options.mpp, *mpp)
    if goal / min(mpp) < 1.2:  # close enough: resampling would only blur
        return image, math.sqrt(mpp[0] * mpp[1])
    size = tuple(max(1, round(n * um / goal)) for n, um in zip(image.shape[1::-1], mpp, strict=True))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), goal


def _tissue(image: _Pixels, um: float, options: TissueOptions) -> _Mask:
    """Find tissue in a picture with square pixels of ``um`` microns."""
    smooth = cv2.GaussianBlur(image, (0, 0), _SMOOTH_UM / um)
    glass, seen = _glass(smooth, um)
    chroma = np.empty(seen.shape, np.float32)
    fine, inked, black = (np.empty(seen.shape, bool) for _ in range(3))
    for rows, around, inner in _strips(seen.shape, _REACH * _AROUND_UM / um):
        light = _light(smooth[around], glass.rows(around))
        fine[rows] = _darker(light, um)[inner] >= _FINE
        light = (light[0][inner], light[1][inner], light[2][inner])
        chroma[rows] = _chroma(light)
        inked[rows], black[rows] = _ink_colours(light, chroma[rows])
    del smooth, light  # a large slide's planes are let go as soon as they are not needed

    ink = _ink(inked, black, um, options)
    del inked, black
    rim = _grown(ink, _RIM_UM / um)
    least = max(options.min_chroma, _NOISE * _median(chroma[seen]))
    like, seeds = fine, seen  # in their place
    side = 2 * round(_BLEED_UM / um) + 1
    for rows, around, inner in _strips(seen.shape, side // 2):
        bleed = _BLEED * cv2.dilate(chroma[around], np.ones((side, side), np.uint8))[inner]
        # the picture itself has to agree with the smooth one, which alone would widen every piece
        own = _chroma(_light(image[rows], glass.rows(rows)))
        coloured = np.minimum(chroma[rows], own) >= np.maximum(least, bleed)
        like[rows] = (coloured | fine[rows]) & ~rim[rows]
        seeds[rows] = like[rows] & (chroma[rows] >= _SEED * least)
    del chroma
    tissue = _touched(_closed(like, options.gap_um / 2 / um), seeds)
    del fine, seen, like, seeds
    tissue &= ~rim

    if ink.any():
        reach = min(1.5 * float(_depth(rim).max()), options.pen_width_um / um)
        beyond = math.ceil(reach) + 1  # tissue on one side and the picture's edge on the other is no crossing
        crossed = _closed(np.pad(tissue, beyond), reach)[beyond:-beyond, beyond:-beyond]
        tissue |= rim & crossed
    del ink, rim
    tissue = _filled(tissue, options.min_hole_um2 / um**2)
    return _sizeable(tissue, options.min_area_um2 / um**2, options.min_width_um / um)


# --- glass and the light it passes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Glass:
    """The colour of the glass over a picture of ``shape``: (h, w, 3) float32 of few points, and linear between them."""

    points: NDArray[np.float32]
    shape: tuple[int, int]

    def rows(self, rows: slice) -> NDArray[np.float32]:
        """The colour at every pixel of some rows, (h, W, 3)."""
        last, height = len(self.points) - 1, self.shape[0]
        y = np.clip((np.arange(rows.start, rows.stop) + 0.5) * (last + 1) / height - 0.5, 0, last).astype(np.float32)
        above = y.astype(np.intp)
        share = (y - above)[:, None, None]
        wide = cv2.resize(self.points, (self.shape[1], last + 1))
        steps = np.diff(wide, axis=0, append=wide[-1:])
        colour: NDArray[np.float32] = wide[above] + steps[above] * share
        return colour


def _glass(smooth: _Pixels, um: float) -> tuple[_Glass, _Mask]:
    """Return the colour of the glass at every pixel, white if none is seen, and the pixels it was learnt from.

    Glass is bright, nearly without colour, and flat. White beside it is padding, unless there is little else: then it
    is glass brighter than the camera measures. Of several colours the brightest common one is glass: frames are darker.
    """
    shape = smooth.shape[:2]
    white, like = np.empty(shape, bool), np.empty(shape, bool)
    for rows, around, inner in _strips(shape, _REACH * _AROUND_UM / um):
        grey = cv2.cvtColor(smooth[around], cv2.COLOR_RGB2GRAY)
        flat = cv2.absdiff(grey, cv2.GaussianBlur(grey, (0, 0), _AROUND_UM / um))[inner] <= _FLAT_LEVELS
        red, green, blue = cv2.split(smooth[rows])
        low, high = cv2.min(cv2.min(red, green), blue), cv2.max(cv2.max(red, green), blue)
        cast = np.where((red >= green) & (green >= blue), np.uint8(_CREAM_LEVELS), np.uint8(_CAST_LEVELS))
        white[rows] = low >= _WHITE_LEVEL
        like[rows] = flat & (low >= _GLASS_LEVEL) & (high - low <= cast) & ~white[rows]
    seen = _shrunk(like, _PATCH_UM / um)
    n_seen, n_white, n_other = np.count_nonzero(seen), np.count_nonzero(white), white.size - np.count_nonzero(white)
    if n_seen <= max(_LEAST_GLASS * n_other, min(0.2 * n_other, n_white)):
        return _Glass(np.full((1, 1, 3), 255, np.float32), shape), white
    counts = cv2.calcHist([smooth], [0, 1, 2], seen.view(np.uint8), [64] * 3, [0, 256] * 3)
    common = np.argwhere(counts >= 0.1 * counts.max())
    colour = 4.0 * common[np.argmax(common.sum(axis=1))] + 1.5
    return _trend(smooth, seen, colour), seen


def _trend(smooth: _Pixels, seen: _Mask, colour: NDArray[np.float64]) -> _Glass:
    """Fit a parabola in x and y to the ``seen`` pixels that are about of this ``colour``.

    Lamps are not even. Where no glass is seen the fit is held, gently, at the colour of the rest.
    """
    height, width = seen.shape
    size = (min(width, 32), min(height, 32))
    plane = seen.astype(np.float32)
    share = cv2.resize(plane, size, interpolation=cv2.INTER_AREA)
    total = np.empty((*share.shape, 3), np.float32)
    for channel in range(3):
        np.multiply(smooth[..., channel], seen, out=plane, dtype=np.float32)
        total[..., channel] = cv2.resize(plane, size, interpolation=cv2.INTER_AREA)
    mean = (total / np.maximum(share, 1e-6)[..., None]).reshape(-1, 3)
    x, y = (axis.ravel() for axis in np.meshgrid(*(np.linspace(-1, 1, n) for n in size)))
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    fit = np.broadcast_to(colour, mean.shape)
    for _ in range(3):  # each round takes in what the last one explains
        ratio = mean / fit
        alike = (np.abs(ratio - 1).max(axis=1) < 0.2) & (np.ptp(ratio, axis=1) < 0.06)
        weight = (share.ravel() * alike)[:, None]
        goal = (mean * weight + _HOLD * colour) / (weight + _HOLD)
        root = np.sqrt(weight + _HOLD)
        fit = basis @ np.linalg.lstsq(basis * root, goal * root, rcond=None)[0]
        fit = np.clip(fit, 0.8 * colour, np.minimum(1.2 * colour, 255))
    return _Glass(fit.astype(np.float32).reshape(total.shape), (height, width))


def _light(image: _Pixels, glass: NDArray[np.float32]) -> _Light:
    """The share of the glass's light that each pixel passes, at most 1: what is brighter than glass is glass."""
    channels = zip(cv2.split(image), cv2.split(glass), strict=True)
    red, green, blue = (np.minimum(pixels / level, 1, dtype=np.float32) for pixels, level in channels)
    return red, green, blue


def _chroma(light: _Light) -> _Plane:
    """Colour that is left where glass is made white: the largest channel less the smallest."""
    red, green, blue = light
    return np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)


def _darker(light: _Light, um: float) -> _Plane:
    """How much less light a pixel passes than its surroundings: membranes and nuclei too thin to show their colour."""
    red, green, blue = light
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    darker: _Plane = cv2.GaussianBlur(grey, (0, 0), _AROUND_UM / um) - grey
    return darker


def _median(values: NDArray[np.float32]) -> float:
    """The median of values that are needed no more: they are put in another order."""
    return float(np.median(values, overwrite_input=True)) if values.size else 0.0


# --- ink --------------------------------------------------------------------------------------------------------------


def _ink_colours(light: _Light, chroma: _Plane) -> tuple[_Mask, _Mask]:
    """Find what has the colour of red, green or blue ink, and what is black.

    Told by ratios of optical densities, which do not change with thickness (Beer and Lambert). No mixture of
    haematoxylin, eosin and DAB absorbs green less than both neighbours; none that absorbs red absorbs as little blue as
    blue ink; none that absorbs as much blue as green passes as much red as red ink. Vectors: Ruifrok and Johnston 2001.
    """
    red, green, blue = (_density(channel) for channel in light)
    is_red = (np.minimum(green, blue) > 0.5) & (red < 0.25 * np.minimum(green, blue)) & (blue > 0.7 * green)
    is_green = (np.minimum(red, blue) > 0.25) & (green < 0.8 * np.minimum(red, blue))
    is_blue = (red > 0.7) & (green < 1.05 * red) & (blue < 0.35 * red)
    is_black = (np.minimum(np.minimum(red, green), blue) > 1.2) & (chroma < 0.15)
    return is_red | is_green | is_blue, is_black


def _ink(coloured: _Mask, black: _Mask, um: float, options: TissueOptions) -> _Mask:
    """Take for ink what has its colour in spots of its size and no broader than a pen, and what is black likewise."""
    if options.pen_width_um == 0:
        return np.zeros(coloured.shape, bool)
    whole = _closed(coloured, options.gap_um / 2 / um)
    stain = _touched(whole, _shrunk(whole, options.pen_width_um / 2 / um))  # toluidine blue, say
    spots = _shrunk((coloured & ~stain) | black, _INK_UM / um)
    return _grown(spots, _INK_UM / um)


def _density(light: _Plane) -> _Plane:
    """Optical density, natural logarithm, up to that of one grey level."""
    return -np.log(np.maximum(light, np.float32(1 / 255)))


# --- masks ------------------------------------------------------------------------------------------------------------


def _strips(shape: tuple[int, int], reach_px: float = 0) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of a picture, a strip at a time.

    Yields the strip; the strip with what is within ``reach_px`` of it, above and below; and the former's place in the
    latter. What is worked out for a strip from pixels within reach is what it would be from the whole picture.
    """
    height, width = shape
    step, more = max(1, _STRIP_PIXELS // width), math.ceil(reach_px) + 2
    for top in range(0, height, step):
        bottom, first = min(height, top + step), max(0, top - more)
        yield slice(top, bottom), slice(first, min(height, bottom + more)), slice(top - first, bottom - first)


def _depth(mask: _Mask) -> _Plane:
    """How far in pixels each pixel of ``mask`` is from its outside; what lies beyond the picture counts as mask."""
    depth: _Plane = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    return depth


def _grown(mask: _Mask, radius_px: float) -> _Mask:
    grown = np.zeros_like(mask)
    for rows, around, inner in _strips((mask.shape[0], mask.shape[1]), radius_px):
        part = mask[around]
        if part.any():
            grown[rows] = part.all() or _depth(~part)[inner] <= radius_px
    return grown


def _shrunk(mask: _Mask, radius_px: float) -> _Mask:
    shrunk = _grown(~mask, radius_px)
    return np.logical_not(shrunk, out=shrunk)


def _closed(mask: _Mask, radius_px: float) -> _Mask:
    return _shrunk(_grown(mask, radius_px), radius_px)


def _touched(mask: _Mask, seeds: _Mask) -> _Mask:
    """Keep the pieces of ``mask`` that hold a seed."""
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    keep = np.zeros(count, bool)
    for rows, _, _ in _strips(labels.shape):
        keep[labels[rows][seeds[rows] & mask[rows]]] = True
    return _chosen(labels, keep)


def _filled(mask: _Mask, min_px: float) -> _Mask:
    """Fill holes of fewer than ``min_px`` pixels; what is open to the picture's edge is no hole."""
    height, width = mask.shape
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).view(np.uint8), connectivity=8)
    left, top, wide, high, area = stats.T
    fill = (left > 0) & (top > 0) & (left + wide < width) & (top + high < height) & (area < min_px)
    fill[0] = False  # the mask itself
    filled: _Mask = mask | _chosen(labels, fill)
    return filled


def _sizeable(mask: _Mask, min_px: float, min_width_px: float) -> _Mask:
    """Keep the pieces of at least ``min_px`` pixels that are ``min_width_px`` wide on average."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    area = stats[:, cv2.CC_STAT_AREA]
    depth, total = _depth(mask), np.zeros(count)
    for rows, _, _ in _strips(labels.shape):
        total += np.bincount(labels[rows][mask[rows]], depth[rows][mask[rows]] - 0.5, count)
    keep = (area >= min_px) & (4 * total >= min_width_px * area)  # a strip's mean depth is a quarter of its width
    keep[0] = False
    return _chosen(labels, keep)


def _chosen(labels: NDArray[np.int32], choice: _Mask) -> _Mask:
    """Whether each pixel's label is chosen."""
    chosen = np.empty(labels.shape, bool)
    for rows, _, _ in _strips(labels.shape):
        np.take(choice, labels[rows], out=chosen[rows])
    return chosen


# --- outlines ---------------------------------------------------------------------------------------------------------


def mask_polygons(mask: _Mask, scale: tuple[float, float] = (1.0, 1.0)) -> tuple[shapely.Polygon, ...]:
    """Outline the pieces of ``mask``, bool (H, W), along the edges of its pixels.

    ``scale`` is level-0 pixels per mask pixel (x, y). Pixels that share a side are one piece. Holes are kept at every
    depth and an island in a hole is a polygon of its own. Areas are exact, polygons valid, and they come in the order
    of their first pixel: top to bottom, left to right.
    """
    if mask.ndim != 2 or mask.dtype != bool:
        raise UsageError(f"the mask is {mask.dtype} {mask.shape}; it must be bool (H, W)")
    padded = np.pad(mask, 1).view(np.uint8)
    labels = cv2.connectedComponents(padded, connectivity=4)[1]
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]  # around each grid point
    crossing = (nw == se) & (ne == sw) & (nw != ne)  # pixels that touch at a point: two corners of outlines meet
    y, x = np.nonzero(crossing | (nw ^ ne ^ sw ^ se))
    point = np.repeat(np.arange(len(y)), 1 + crossing[y, x])
    y, x = y[point], x[point]
    # Along a row, corners are by turns the left and the right end of an edge; along a column, the upper and the lower.
    # At a crossing the first corner ends the edge from the left. Whether it turns up or down is chosen so that two
    # pieces part and one piece holds together: then no outline meets itself.
    first = np.append(True, np.diff(point) > 0)[: len(point)]
    turns_up = np.where(nw[y, x], labels[y, x] != labels[y + 1, x + 1], labels[y, x + 1] == labels[y + 1, x])
    column = np.lexsort((first != turns_up, y, x))
    partner = np.empty_like(column)
    partner[column] = column[np.arange(len(column)) ^ 1]
    piece = np.maximum(labels[y, x + 1], labels[y + 1, x + 1])
    xy = np.stack([x * scale[0], y * scale[1]], axis=-1)
    outlines: dict[int, list[NDArray[np.float64]]] = {}
    for ring in _rings(partner.tolist()):  # a piece's first corner is on its shell
        outlines.setdefault(int(piece[ring[0]]), []).append(xy[ring])
    return tuple(shapely.Polygon(shell, holes) for shell, *holes in outlines.values())


def _rings(partner: list[int]) -> list[list[int]]:
    """Follow corners by turns along their row, where 2k and 2k + 1 are partners, and along their column."""
    seen = bytearray(len(partner))
    rings = []
    for start in range(0, len(partner), 2):
        ring: list[int] = []
        corner = start
        while not seen[corner]:
            seen[corner] = seen[corner ^ 1] = 1
            ring += (corner, corner ^ 1)
            corner = partner[corner ^ 1]
        if ring:
            rings.append(ring)
    return rings
