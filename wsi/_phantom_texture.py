"""Textures of made-up tissue: noise, fibres, fat, nuclei and glands as stain concentrations.

Concentrations are uint8 in hundredths of an optical-density unit: 100 means that a stain vector of unit length takes
away one unit of optical density. Haematoxylin is ``h``, eosin is ``e``. Lengths are microns; textures are drawn at the
microns per pixel asked for, so nothing is resampled later. All is drawn from fixed seeds: what differs between slides
is which texture lies where, and that is the business of :mod:`wsi.phantom`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ATLAS_PX",
    "NUCLEUS_ANGLES",
    "TISSUE_KINDS",
    "Sprite",
    "Stamp",
    "Textures",
    "TissueKind",
    "blob",
    "noise_at",
    "noise_plane",
    "orient_points",
    "orient_raster",
    "stamp_nucleus",
    "textures",
    "uniform_at",
]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Plane = NDArray[np.float32]

ATLAS_PX = 1024  # side of a texture that repeats without a seam
NUCLEUS_ANGLES = 16  # directions in which every nucleus is drawn, over half a turn

_UINT64 = (1 << 64) - 1


# --- noise that is a pure function of position ------------------------------------------------------------------------


def uniform_at(seed: int, ix: NDArray[np.int64], iy: NDArray[np.int64]) -> Floats:
    """Return one number in [0, 1) for each lattice place: the finaliser of SplitMix64 over seed and place.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    key = np.uint64((seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & _UINT64)
    h = ix.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(32)) ^ key) + iy.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((h ^ (h >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _spline(t: Floats) -> list[Floats]:
    """Return the four cubic B-spline weights at fractions ``t``."""
    u = 1 - t
    return [u * u * u / 6, (4 - 6 * t * t + 3 * t * t * t) / 6, (4 - 6 * u * u + 3 * u * u * u) / 6, t * t * t / 6]


def noise_at(seed: int, xy: Floats, wavelength: float) -> Floats:
    """Return smooth noise of mean 0 and standard deviation near 0.5 at points ``xy (N, 2)``; shape ``(N,)``."""
    scaled = xy / wavelength
    whole = np.floor(scaled)
    node = whole.astype(np.int64)
    wx, wy = _spline((scaled - whole)[:, 0]), _spline((scaled - whole)[:, 1])
    total = np.zeros(len(xy))
    for j in range(4):
        for i in range(4):
            total += wx[i] * wy[j] * (uniform_at(seed, node[:, 0] + i, node[:, 1] + j) - 0.5)
    return 3.6 * total


def noise_plane(seed: int, x: int, y: int, w: int, h: int, wavelength: float) -> Plane:
    """Return :func:`noise_at` of every pixel of a box as ``(h, w)``, by straight lines between every eighth pixel."""
    step = 8

    def axis(start: int, length: int) -> tuple[int, Plane]:
        at = start + step * (np.arange(-1, -(-length // step) + 1) + 0.5)
        whole = np.floor(at / wavelength)
        node = whole.astype(np.int64) - int(whole[0])
        weights = np.zeros((len(at), int(node[-1]) + 4), np.float32)
        for i, weight in enumerate(_spline(at / wavelength - whole)):
            weights[np.arange(len(at)), node + i] = weight
        return int(whole[0]), weights

    x0, across = axis(x, w)
    y0, down = axis(y, h)
    ix, iy = np.meshgrid(np.arange(x0, x0 + across.shape[1]), np.arange(y0, y0 + down.shape[1]))
    nodes = (3.6 * (uniform_at(seed, ix, iy) - 0.5)).astype(np.float32)
    coarse = down @ nodes @ across.T
    plane: Plane = cv2.resize(coarse, (step * across.shape[0], step * down.shape[0]), interpolation=cv2.INTER_LINEAR)
    return plane[step : step + h, step : step + w]


def blob(rng: np.random.Generator, points: int, wobble: float, roughness: float = 1.6) -> Floats:
    """Return a star-shaped outline around the origin as ``(points, 2)``, of a mean radius near 1.

    ``wobble`` is the size of the departures from a circle, ``roughness`` how fast they fall off with frequency.
    """
    k = np.arange(points // 2 + 1)
    spectrum = np.zeros(len(k), np.complex128)
    phase = rng.uniform(0, 2 * np.pi, len(k))
    spectrum[2:] = rng.uniform(0.5, 1.0, len(k) - 2) * np.exp(1j * phase[2:]) * k[2:] ** -roughness
    departure = np.fft.irfft(spectrum * points, points)
    radius = np.exp(wobble * departure)
    angle = 2 * np.pi * np.arange(points) / points
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


# --- textures that repeat without a seam ------------------------------------------------------------------------------


def _filtered(rng: np.random.Generator, length_px: float, width_px: float, angle: float = 0.0) -> Plane:
    """Return periodic noise of unit variance, ``(ATLAS_PX, ATLAS_PX)``, as of a given spectrum with random phases.

    It is correlated over ``length_px`` along ``angle`` (radians from x towards y) and over ``width_px`` across.
    """
    fx, fy = np.meshgrid(*(f(ATLAS_PX).astype(np.float32) for f in (np.fft.rfftfreq, np.fft.fftfreq)))
    along, over = fx * math.cos(angle) + fy * math.sin(angle), fy * math.cos(angle) - fx * math.sin(angle)
    gain: Plane = np.exp(-2 * np.pi**2 * ((along * (length_px / 2.5)) ** 2 + (over * (width_px / 2.5)) ** 2))
    phase = rng.random(gain.shape, np.float32) * np.float32(2 * np.pi)
    gain[0, 0] = 0
    spectrum = np.empty(gain.shape, np.complex64)
    spectrum.real, spectrum.imag = gain * np.cos(phase), gain * np.sin(phase)
    plane = np.fft.irfft2(spectrum, (ATLAS_PX, ATLAS_PX))
    unit: Plane = (plane / plane.std()).astype(np.float32)
    return unit


def _broad(plane: Plane, sigma_px: float) -> Plane:
    """Return what is left of a periodic plane after Gaussian smoothing."""
    margin = ATLAS_PX // 4
    reduced = cv2.resize(np.pad(plane, margin, mode="wrap"), None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA)
    smooth = cv2.GaussianBlur(reduced, (0, 0), sigma_px / 8)
    broad: Plane = cv2.resize(smooth, None, fx=8, fy=8, interpolation=cv2.INTER_LINEAR)
    return broad[margin:-margin, margin:-margin]


def _ranked(plane: Plane, mpp: float) -> Bytes:
    """Return the rank of every pixel, 0 to 255, so that a tone curve can speak in shares of the area.

    What is broader than about 50 microns is taken out first: seen from afar, its repetition would show.
    """
    plane = plane - _broad(plane, 12 / mpp)
    edges = np.quantile(plane[::4, ::4], np.arange(1, 256) / 256)
    return np.searchsorted(edges.astype(np.float32), plane.ravel()).astype(np.uint8).reshape(plane.shape)


def _bundles(mpp: float) -> Bytes:
    """Draw wavy collagen bundles along x with thin clefts (low ranks) between them."""
    rng = np.random.default_rng(11)
    sway = _filtered(rng, 45 / mpp, 30 / mpp) * (4 / mpp)
    bundle = _filtered(rng, 60 / mpp, 6 / mpp)
    fibril = _filtered(rng, 24 / mpp, 1.6 / mpp)
    cleft = np.abs(_filtered(rng, 50 / mpp, 9 / mpp))
    grain = _filtered(rng, 1.0 / mpp, 0.8 / mpp)
    plane = 0.9 * np.minimum(cleft, 0.7) * 2 + 0.5 * bundle + 0.45 * fibril + 0.25 * grain
    y, x = np.mgrid[:ATLAS_PX, :ATLAS_PX].astype(np.float32)
    return _ranked(cv2.remap(plane, x, y + sway, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP), mpp)


def _mesh(mpp: float) -> Bytes:
    """Draw a loose felt: fine wavy fibres in all directions with clear gaps (low ranks)."""
    rng = np.random.default_rng(12)
    y, x = np.mgrid[:ATLAS_PX, :ATLAS_PX].astype(np.float32)
    sway = [_filtered(rng, 14 / mpp, 14 / mpp) * (3.5 / mpp) for _ in range(2)]
    felt = np.sum([_filtered(rng, 9 / mpp, 1.5 / mpp, angle) for angle in (0.3, 1.1, 1.9, 2.7)], axis=0)
    felt = cv2.remap(felt, x + sway[0], y + sway[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    plane = 0.5 * felt + 0.7 * _filtered(rng, 7 / mpp, 7 / mpp) + 0.4 * _filtered(rng, 1.0 / mpp, 1.0 / mpp)
    return _ranked(plane, mpp)


def _fat(mpp: float) -> Bytes:
    """Draw the walls of round, empty fat cells: 0 inside a cell, up to 255 in a wall."""
    rng = np.random.default_rng(13)
    n = max(2, round(ATLAS_PX * mpp / 62))
    pitch = ATLAS_PX / n
    ix, iy = np.meshgrid(np.arange(n), np.arange(n))
    xy = (np.stack([ix + 0.5 * (iy % 2), iy], axis=-1).reshape(-1, 2) + rng.uniform(-0.24, 0.24, (n * n, 2))) * pitch
    seeds = np.full((ATLAS_PX, ATLAS_PX), 255, np.uint8)
    at = np.floor(xy).astype(int) % ATLAS_PX
    seeds[at[:, 1], at[:, 0]] = 0
    pad = int(1.5 * pitch)
    _, label = cv2.distanceTransformWithLabels(
        np.pad(seeds, pad, mode="wrap"), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    label = label.astype(np.float32)
    inner = (cv2.erode(label, np.ones((3, 3))) == cv2.dilate(label, np.ones((3, 3)))).astype(np.uint8)
    depth = cv2.distanceTransform(inner, cv2.DIST_L2, cv2.DIST_MASK_5)[pad:-pad, pad:-pad]
    depth = depth + 0.5 / mpp * _filtered(rng, 6 / mpp, 6 / mpp)
    walls: Bytes = np.clip(255 * (1.6 / mpp - depth) / (1.2 / mpp), 0, 255).astype(np.uint8)
    return walls


# --- tissue -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TissueKind:
    """What one kind of tissue is painted with.

    ``haematoxylin`` and ``eosin`` map the rank of a texture (0 to 255) to a concentration, as points of a broken line.
    ``nuclei`` is the chance of a loose nucleus of each kind in a square of 9 microns.
    """

    texture: str
    haematoxylin: tuple[tuple[int, int], ...]
    eosin: tuple[tuple[int, int], ...]
    nuclei: tuple[tuple[str, float], ...]

    def tones(self, factor: float = 1.0) -> tuple[Bytes, Bytes]:
        """Return the concentrations of haematoxylin and eosin for all 256 ranks, ``factor`` times as much as the kind has."""
        h, e = (
            np.minimum(np.interp(np.arange(256), *np.transpose(points)) * factor, 255).round().astype(np.uint8)
            for points in (self.haematoxylin, self.eosin)
        )
        return h, e


# In the order of painting: a later kind covers an earlier one.
TISSUE_KINDS = {
    "submucosa": TissueKind(
        "bundles",
        ((0, 2), (60, 5), (255, 14)),
        ((0, 4), (26, 10), (60, 48), (160, 78), (255, 120)),
        (("spindle", 0.10), ("lymphocyte", 0.015)),
    ),
    "muscle": TissueKind(
        "bundles", ((0, 8), (255, 18)), ((0, 36), (40, 72), (200, 100), (255, 118)), (("spindle", 0.22),)
    ),
    "fat": TissueKind("fat", ((0, 1), (255, 10)), ((0, 2), (255, 85)), ()),
    "mucosa": TissueKind(
        "mesh",
        ((0, 5), (255, 26)),
        ((0, 10), (40, 26), (130, 48), (255, 92)),
        (("lymphocyte", 0.24), ("spindle", 0.12)),
    ),
    "lymphoid": TissueKind("mesh", ((0, 18), (255, 44)), ((0, 22), (255, 60)), (("lymphocyte", 0.92),)),
    "adenoma": TissueKind(  # darker than tumour between its glands, which are paler
        "mesh",
        ((0, 44), (255, 72)),
        ((0, 40), (60, 78), (255, 130)),
        (("lymphocyte", 0.4), ("spindle", 0.2)),
    ),
    "tumour": TissueKind(
        "mesh",
        ((0, 26), (255, 52)),
        ((0, 26), (60, 52), (255, 98)),
        (("malignant", 0.2), ("spindle", 0.2), ("lymphocyte", 0.12)),
    ),
}


# --- nuclei -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NucleusKind:
    """How nuclei of one kind look: size in microns, depth of stain, and how coarse their chromatin is."""

    length_um: float
    width_um: float
    stain: float
    chromatin: float
    spread: float  # variation of size from one to the next
    nucleolus: bool = False


_NUCLEUS_KINDS = {
    "spindle": _NucleusKind(13.0, 3.2, 150, 0.12, 0.2),
    "lymphocyte": _NucleusKind(6.6, 6.0, 185, 0.22, 0.1),
    "epithelial": _NucleusKind(9.5, 5.2, 125, 0.20, 0.12),
    "malignant": _NucleusKind(12.0, 7.6, 135, 0.26, 0.22, nucleolus=True),
}


@dataclass(frozen=True)
class Stamp:
    """A nucleus: haematoxylin that it brings, and how much eosin it leaves; ``(side, side)`` each, ``side`` odd."""

    h: Bytes
    e_ceiling: Bytes


Nuclei = dict[str, list[list[Stamp]]]  # by kind, angle and variant


def _nucleus(rng: np.random.Generator, kind: _NucleusKind, angle: float, mpp: float) -> Stamp:
    grow = np.exp(kind.spread * np.clip(rng.standard_normal(2), -1.5, 1.5)) / mpp
    a, b = kind.length_um / 2 * grow[0], kind.width_um / 2 * grow[1]
    half = math.ceil(max(a, b) * 1.15) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float64)
    along, over = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    over = over + rng.normal(0, 0.12) * b * (along / a) ** 2  # a slight bend
    theta = np.arctan2(over / b, along / a)
    dent = 1 + 0.07 * np.cos(2 * theta + rng.uniform(0, 6.3)) + 0.05 * np.cos(3 * theta + rng.uniform(0, 6.3))
    radius = np.hypot(along / a, over / b) / dent
    inside = np.clip((1 - radius) * min(a, b) / 1.6 + 0.5, 0, 1)
    sigma = max(0.55 / mpp, 0.5)
    clumps = cv2.GaussianBlur(rng.standard_normal(x.shape), (0, 0), sigma) * sigma * 3.2
    rim = np.clip(1 - np.abs(1 - radius) * min(a, b) * mpp / 0.7, 0, 1)
    stain = (
        kind.stain * np.exp(rng.normal(0, 0.12)) * (1 - 0.12 * kind.nucleolus + kind.chromatin * clumps + 0.25 * rim)
    )
    if kind.nucleolus:
        spot = np.hypot(along - rng.normal(0, a / 4), over - rng.normal(0, b / 4)) * mpp
        stain = stain + 70 * np.clip(1.6 - spot, 0, 1)
    return Stamp(
        (np.clip(stain, 40, 250) * inside).astype(np.uint8),
        (255 - inside * 205).astype(np.uint8),
    )


def stamp_nucleus(h: Bytes, e: Bytes, stamp: Stamp, x: int, y: int) -> None:
    """Press ``stamp`` centred on ``(x, y)`` into the planes; the order of several stamps does not matter."""
    half = stamp.h.shape[0] // 2
    place = np.s_[y - half : y + half + 1, x - half : x + half + 1]
    np.maximum(h[place], stamp.h, out=h[place])
    np.minimum(e[place], stamp.e_ceiling, out=e[place])


# --- glands -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sprite:
    """A gland cut across, ready to be laid onto the planes.

    ``h``, ``e`` and ``alpha`` are ``(side, side)``; ``outline (V, 2)`` and ``nuclei (N, 2)`` are pixels from the
    top-left corner. ``epithelium`` is its share of each pixel, 0 to 255, lumens left out.
    """

    h: Bytes
    e: Bytes
    alpha: Bytes
    epithelium: Bytes
    outline: Floats
    nuclei: Floats


def orient_raster(raster: Bytes, orientation: int) -> Bytes:
    """Return one of the eight turns and mirrorings of a square raster, as a view."""
    turned = np.rot90(raster, orientation % 4)
    return turned[:, ::-1] if orientation >= 4 else turned


def orient_points(xy: Floats, side: int, orientation: int) -> Floats:
    """Return points of a square raster of ``side`` pixels where :func:`orient_raster` carries them."""
    x, y = xy[:, 0], xy[:, 1]
    for _ in range(orientation % 4):
        x, y = y, side - x
    return np.stack([side - x if orientation >= 4 else x, y], axis=1)


@dataclass(frozen=True)
class _GlandKind:
    """How glands of one kind look; lengths in microns."""

    radius_um: tuple[float, float]
    wobble: float  # of the outline, see blob()
    roughness: float
    lumen: tuple[float, float]  # radius of the lumen over that of the gland
    lumens: int  # at most so many; more than one makes the gland cribriform
    nucleus: str
    rows: int  # of nuclei between the rim and the lumen
    row_um: float
    pitch_um: float  # between nuclei of a row
    disorder: float  # of nuclei: 0 stand in line
    goblet_um: float  # radius of mucus droplets, 0 for none
    debris: float  # share of the lumen that dead cells fill
    halo_um: float  # pale rim where gland and stroma shrank apart
    h: int  # stain of the cytoplasm
    e: int


_GLAND_KINDS = {
    "benign": _GlandKind((36, 50), 0.22, 2.2, (0.14, 0.28), 1, "epithelial", 1, 6.0, 5.0, 0.4, 5.4, 0.0, 1.6, 24, 52),
    "malignant": _GlandKind((48, 86), 0.38, 1.9, (0.3, 0.55), 4, "malignant", 3, 8.5, 8.4, 1.0, 0.0, 0.5, 2.4, 46, 62),
}


def _gland(rng: np.random.Generator, kind: _GlandKind, mesh: Bytes, nuclei: Nuclei, mpp: float) -> Sprite:
    """Draw a gland: cytoplasm, mucus droplets, lumen, rows of nuclei, pale rim."""
    radius = rng.uniform(*kind.radius_um) / mpp
    shape = blob(rng, 96, kind.wobble, kind.roughness) * [1.0, rng.uniform(0.72, 1.0)] * radius
    half = math.ceil(np.abs(shape).max() + 14 / mpp) + 4  # room for nuclei that reach over the rim
    side, centre = 2 * half + 1, half + 0.5
    body = _fill(side, [centre + shape])
    hollow = _fill(side, [centre + lumen for lumen in _lumens(rng, kind, shape)])
    depth_um = cv2.distanceTransform((body > 127).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3) * np.float32(mpp)
    apical_um = cv2.distanceTransform((hollow < 128).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3) * np.float32(mpp)

    rows, columns = ((np.arange(side) + start) % ATLAS_PX for start in rng.integers(0, ATLAS_PX, 2))
    fibres = mesh[rows[:, None], columns] / np.float32(255)
    mucus = _fill(side, [centre + droplet for droplet in _droplets(rng, kind, shape, mpp)])
    mucus = cv2.GaussianBlur(mucus, (0, 0), 0.35 / mpp) / np.float32(255)
    empty = cv2.GaussianBlur(hollow, (0, 0), max(0.3 / mpp, 0.4)) / np.float32(255)
    empty = empty * (1 - kind.debris * np.clip(3 * fibres - 1.2, 0, 1))
    h = kind.h * (1.2 - 0.4 * fibres) * (1 + 0.5 * np.exp(-depth_um / 8)) * (1 - 0.55 * mucus) * (1 - 0.97 * empty)
    e = kind.e * (0.75 + 0.5 * fibres) * (1 + 0.4 * np.exp(-apical_um / 1.2))
    e = e * (1 - (0.9 - 0.2 * fibres) * mucus) * (1 - 0.95 * empty)
    h8, e8 = (np.clip(plane, 0, 255).astype(np.uint8) for plane in (h, e))

    placed = _Crowd()
    room_for_nuclei = (body == 255) & (hollow == 0) & (apical_um >= 3)
    stamps = nuclei[kind.nucleus]
    for xy, direction in _rows_of_nuclei(rng, kind, shape, mpp):
        x, y = (xy + centre).astype(int).tolist()
        if room_for_nuclei[y, x] and placed.admits(xy, kind.pitch_um / mpp * rng.uniform(0.36, 0.5)):
            turn = direction / np.pi * NUCLEUS_ANGLES + rng.normal(0, 0.5 + 2 * kind.disorder)
            stamp_nucleus(h8, e8, stamps[round(turn) % NUCLEUS_ANGLES][int(rng.integers(len(stamps[0])))], x, y)

    pull = np.linalg.norm(blob(rng, 96, 1.5, 1.5), axis=1)[:, None]
    alpha = cv2.GaussianBlur(
        _fill(side, [centre + shape * (1 + kind.halo_um / mpp / radius * pull)]), (0, 0), 0.6 / mpp
    )
    solid = cv2.GaussianBlur(body, (0, 0), 0.3 / mpp) / np.float32(255)
    h8, e8 = (np.round(p * solid + pale * (1 - solid)).astype(np.uint8) for p, pale in ((h8, 3), (e8, 9)))
    centres = np.floor(np.array(placed.xy).reshape(-1, 2) + centre) + 0.5
    return Sprite(h8, e8, alpha, np.minimum(body, 255 - hollow), centre + shape, centres)


def _fill(side: int, polygons: list[Floats]) -> Bytes:
    raster = np.zeros((side, side), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(raster, [np.round((polygon - 0.5) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return raster


def _lumens(rng: np.random.Generator, kind: _GlandKind, shape: Floats) -> list[Floats]:
    """Return outlines of one lumen in the middle and, in cribriform glands, of small ones about it."""
    radius = float(np.linalg.norm(shape, axis=1).mean())
    lumens = [shape * rng.uniform(*kind.lumen) * np.linalg.norm(blob(rng, len(shape), 0.6), axis=1)[:, None]]
    for _ in range(int(rng.integers(0, kind.lumens))):
        at = shape[rng.integers(len(shape))] * rng.uniform(0.5, 0.62)
        lumens.append(at + blob(rng, 24, 0.35) * radius * rng.uniform(0.07, 0.14))
    return lumens


def _droplets(rng: np.random.Generator, kind: _GlandKind, shape: Floats, mpp: float) -> list[Floats]:
    """Return outlines of mucus droplets in a ring within the row of nuclei; they do not meet."""
    droplets: list[Floats] = []
    if kind.goblet_um == 0:
        return droplets
    placed = _Crowd()
    for rim in _along(shape, 3 / mpp):
        size = kind.goblet_um / mpp * rng.uniform(0.75, 1.15)
        middle = rim * (1 - (kind.row_um * 1.9 / mpp + size) / np.hypot(*rim))
        if rng.random() < 0.8 and placed.admits(middle, size):
            droplets.append(middle + blob(rng, 24, 0.25) * size)
    return droplets


def _rows_of_nuclei(
    rng: np.random.Generator, kind: _GlandKind, shape: Floats, mpp: float
) -> Iterator[tuple[Floats, float]]:
    """Yield where nuclei would stand, from the rim inwards, and the direction that points there from the middle."""
    for row in range(kind.rows):
        for rim in _along(shape, kind.pitch_um / mpp * (0.5 if row else 1)):
            inward = (6.0 + row * kind.row_um + rng.normal(0, 1.2 + kind.disorder)) / mpp
            xy = rim * max(0.1, 1 - inward / np.hypot(*rim)) + rng.normal(0, 0.4 / mpp, 2)
            yield xy, math.atan2(rim[1], rim[0])


class _Crowd:
    """Discs that do not meet."""

    def __init__(self) -> None:
        self.xy: list[Floats] = []
        self._radius: list[float] = []

    def admits(self, xy: Floats, radius: float) -> bool:
        """Take a disc in if it meets none that is there already; return whether it was."""
        if self.xy:
            gap = np.linalg.norm(np.array(self.xy) - xy, axis=1)
            if (gap < np.array(self._radius) + radius).any():
                return False
        self.xy.append(xy)
        self._radius.append(radius)
        return True


def _along(shape: Floats, step: float) -> Iterator[Floats]:
    """Yield points of a closed outline at equal steps."""
    closed = np.concatenate([shape, shape[:1]])
    walked = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    for at in np.linspace(0, walked[-1], max(3, round(walked[-1] / step)), endpoint=False):
        yield np.array([np.interp(at, walked, closed[:, 0]), np.interp(at, walked, closed[:, 1])])


# --- all of them at one resolution ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Textures:
    """Everything that is drawn once for a resolution.

    ``fields`` are the repeating textures by name, ``(ATLAS_PX, ATLAS_PX)``; ``granules`` the same size, is what every
    concentration is multiplied by; ``nuclei[kind][angle][variant]`` are the stamps; ``glands[kind]`` the sprites;
    ``margin_px`` is the farthest that a stamp reaches from its centre.
    """

    fields: dict[str, Bytes]
    granules: Plane
    nuclei: Nuclei
    glands: dict[str, list[Sprite]]
    margin_px: int


@lru_cache(maxsize=4)
def textures(mpp: float) -> Textures:
    """Draw all textures at ``mpp``; the last few resolutions are kept."""
    rng = np.random.default_rng(17)
    angles = np.arange(NUCLEUS_ANGLES) * np.pi / NUCLEUS_ANGLES
    nuclei = {
        name: [[_nucleus(rng, kind, angle, mpp) for _ in range(4)] for angle in angles]
        for name, kind in _NUCLEUS_KINDS.items()
    }
    fields = {"bundles": _bundles(mpp), "mesh": _mesh(mpp), "fat": _fat(mpp)}
    glands = {
        name: [_gland(np.random.default_rng([23, k, i]), kind, fields["mesh"], nuclei, mpp) for i in range(12)]
        for k, (name, kind) in enumerate(_GLAND_KINDS.items())
    }
    margin = max(stamp.h.shape[0] // 2 for kind in nuclei.values() for turned in kind for stamp in turned)
    granules = 1 + 0.19 * np.clip(_filtered(rng, *[max(1.3, 0.5 / mpp)] * 2), -3, 3)
    return Textures(fields, granules, nuclei, glands, margin)
