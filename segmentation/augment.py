"""Augmentation: patches as another scanner, stain or cut might have shown them. On batches, from a seed."""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi.errors import UsageError
from wsi.readers.base import Pixels

__all__ = ["NO_AUGMENTATION", "Augmentation", "LensOptions", "Lenses", "augment", "hed_jitter", "macenko_jitter"]

_Floats = NDArray[np.floating[Any]]

# Optical densities of haematoxylin, eosin and DAB in R, G and B. Ruifrok and Johnston: Quantification of histochemical
# staining by color deconvolution, 2001.
_HED: Final = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
_HED_RGB: Final = _HED / np.linalg.norm(_HED, axis=1, keepdims=True)
_RGB_HED: Final = np.linalg.inv(_HED_RGB).astype(np.float32)

_GLASS_OD: Final = 0.15  # of Macenko's paper: below it there is no stain to tell directions from
_PERCENTILE: Final = 1.0
_LEAST_STAINED: Final = 256  # pixels, to tell two stains from
_STAIN_SAMPLE: Final = 4  # every so manyth pixel tells them
_LIGHT: Final = 255.0


@dataclass(frozen=True)
class LensOptions:
    """Lenses laid over a patch, each of which magnifies or shrinks what lies under it.

    Attributes:
        n: how many.
        radius_px: from, and below, which radii are drawn.
        strength: likewise; above 0 magnifies.

    The defaults are those of DRU-Net's patch classifier.
    """

    n: int = 4
    radius_px: tuple[int, int] = (80, 110)
    strength: tuple[float, float] = (-0.4, 0.4)

    def __post_init__(self) -> None:
        if self.n < 1 or not 1 <= self.radius_px[0] < self.radius_px[1]:
            raise UsageError(f"there is at least one lens, its radius from 1 px; got {self.n}, {self.radius_px}")
        if not -1 < self.strength[0] <= self.strength[1] < 1:
            raise UsageError(f"a lens has a strength from above -1 to below 1, got {self.strength}")

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> "Lenses":
        """Lenses for a picture of (H, W) pixels, drawn in the order of the reference."""
        height, width = shape
        cx, cy = rng.integers(0, width, self.n), rng.integers(0, height, self.n)
        drawn = [(rng.integers(*self.radius_px), rng.uniform(*self.strength)) for _ in range(self.n)]
        radius, strength = zip(*drawn, strict=True)
        return Lenses(cx, cy, np.array(radius), np.array(strength))


@dataclass(frozen=True, eq=False)
class Lenses:
    """Lenses in place: apply the same ones to a picture and to whatever maps belong to it.

    Oskouei et al.: DRU-Net, arXiv 2407.18100. Differs from the source: pictures, maps and masks of one patch share their
    lenses; there each draws its own.

    Attributes:
        cx, cy: (n,) centres in pixels.
        radius: (n,) in pixels.
        strength: (n,) above 0 magnifies.
    """

    cx: NDArray[np.int64]
    cy: NDArray[np.int64]
    radius: NDArray[np.int64]
    strength: NDArray[np.float64]

    def apply(self, picture: NDArray[Any]) -> NDArray[Any]:
        """A picture (H, W) or (H, W, C) of any type as seen through one lens after the other; nearest pixels."""
        height, width = picture.shape[:2]
        for cx, cy, radius, strength in zip(self.cx, self.cy, self.radius, self.strength, strict=True):
            # Beyond its radius a lens leaves pixels where they are.
            y0, y1 = max(0, int(cy - radius)), min(height, int(cy + radius) + 1)
            x0, x1 = max(0, int(cx - radius)), min(width, int(cx + radius) + 1)
            dy, dx = np.ogrid[y0 - cy : y1 - cy, x0 - cx : x1 - cx]
            scale = 1 - strength * np.maximum(1 - np.sqrt(dx * dx + dy * dy) / radius, 0)
            x = np.clip(cx + dx * scale, 0, width - 1).astype(np.intp)
            y = np.clip(cy + dy * scale, 0, height - 1).astype(np.intp)
            seen = picture[y, x]
            picture = picture.copy()
            picture[y0:y1, x0:x1] = seen
        return picture


@dataclass(frozen=True)
class Augmentation:
    """What patches go through, in this order. The defaults are those of H2G-Net's patch classifier, with stain jitter.

    Attributes:
        lenses: laid over half of the patches; None for none.
        turns: flips and quarter turns.
        stain: ``"macenko"`` finds each patch's own two stains and varies them, ``"hed"`` varies those of Ruifrok and
            Johnston, ``"none"`` leaves them.
        stain_sigma: by how much of themselves, and of an optical density of 1, stains vary.
        hue: in steps of OpenCV's hue (2 degrees), up and down.
        saturation: in grey levels, up and down.
        brightness: factors, from and to.
    """

    lenses: LensOptions | None = None
    turns: bool = True
    stain: Literal["none", "hed", "macenko"] = "hed"
    stain_sigma: float = 0.05
    hue: int = 10
    saturation: int = 20
    brightness: tuple[float, float] = (0.8, 1.2)

    def __post_init__(self) -> None:
        if self.stain not in ("none", "hed", "macenko"):
            raise UsageError(f"stain is none, hed or macenko, got {self.stain!r}")
        if not 0 <= self.stain_sigma < 1:
            raise UsageError(f"stain_sigma is a number from 0 to below 1, got {self.stain_sigma}")
        if not 0 <= self.hue <= 90 or not 0 <= self.saturation <= 255:
            raise UsageError(f"hue is from 0 to 90, saturation from 0 to 255; got {self.hue} and {self.saturation}")
        if not 0 < self.brightness[0] <= self.brightness[1] < math.inf:
            raise UsageError(f"brightness is a factor from and to, above 0; got {self.brightness}")


NO_AUGMENTATION: Final = Augmentation(turns=False, stain="none", hue=0, saturation=0, brightness=(1.0, 1.0))


def augment(pixels: Pixels, options: Augmentation, rng: np.random.Generator) -> Pixels:
    """(B, H, W, 3) uint8 patches as they might have looked; the same for the same generator state."""
    if options.turns and pixels.shape[1] != pixels.shape[2]:
        raise UsageError(f"only square patches can be turned, not {pixels.shape[1:3]}")
    out = np.empty_like(pixels)
    for i, patch in enumerate(pixels):
        out[i] = _augmented(patch, options, rng)
    return out


def _augmented(patch: Pixels, options: Augmentation, rng: np.random.Generator) -> Pixels:
    if options.lenses is not None:
        lenses = options.lenses.draw((patch.shape[0], patch.shape[1]), rng)
        if rng.random() < 0.5:
            patch = lenses.apply(patch)
    if options.turns:
        patch = np.rot90(patch, int(rng.integers(4)))
        if rng.random() < 0.5:
            patch = patch[:, ::-1]
    if options.stain == "hed":
        patch = hed_jitter(patch, options.stain_sigma, rng)
    elif options.stain == "macenko":
        patch = macenko_jitter(patch, options.stain_sigma, rng)
    return _recoloured(patch, options, rng)


def hed_jitter(patch: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """(H, W, 3) uint8 with haematoxylin, eosin and residual each made stronger or weaker.

    Tellez et al.: Whole-slide mitosis detection in H&E breast histology, IEEE TMI 2018. Each concentration c becomes
    a·c + b with a from 1 - sigma to 1 + sigma, b from -sigma to sigma. Differs from the paper: natural logarithms of
    the light in place of scikit-image's scale, so that sigma means optical density.
    """
    factors = rng.uniform(1 - sigma, 1 + sigma, 3).astype(np.float32)
    shifts = rng.uniform(-sigma, sigma, 3).astype(np.float32)
    # Deconvolution, jitter and convolution are all affine in the optical densities: one matrix and one shift.
    mixed = (_RGB_HED * factors) @ _HED_RGB
    return _light(_density(patch) @ mixed + shifts @ _HED_RGB)


def macenko_jitter(patch: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """(H, W, 3) uint8 with its own two stains, as Macenko's method finds them, each made stronger or weaker.

    Macenko et al.: A method for normalizing histology slides, ISBI 2009; jitter as ``hed_jitter``. What the two stains
    do not explain stays as it is. A patch with hardly any stain stays as it is altogether.
    """
    factors = rng.uniform(1 - sigma, 1 + sigma, 2).astype(np.float32)
    shifts = rng.uniform(-sigma, sigma, 2).astype(np.float32)
    density = _density(patch)
    stains = _macenko_stains(density.reshape(-1, 3)[::_STAIN_SAMPLE])
    if stains is None:
        return patch
    unmixing = np.linalg.pinv(stains).astype(np.float32)  # (3, 2)
    change = (unmixing * (factors - 1)) @ stains
    stained = density.max(axis=2, keepdims=True) > _GLASS_OD  # a shift of glass would tint it
    return _light(density + density @ change + np.where(stained, shifts @ stains, 0))


def _macenko_stains(density: _Floats) -> NDArray[np.float32] | None:
    """(2, 3) unit vectors, haematoxylin first, of optical densities (N, 3); None where there are too few to tell."""
    stained = density[(density > _GLASS_OD).all(axis=1)]
    if len(stained) * _STAIN_SAMPLE < _LEAST_STAINED:
        return None
    _, vectors = np.linalg.eigh(np.cov(stained.T))
    plane = vectors[:, [2, 1]]
    plane = plane * np.where(plane[0] < 0, -1, 1)
    along = stained @ plane
    angle = np.arctan2(along[:, 1], along[:, 0])
    ends = np.percentile(angle, [_PERCENTILE, 100 - _PERCENTILE])
    stains = np.stack([plane @ [np.cos(end), np.sin(end)] for end in ends])
    if ends[1] - ends[0] < 1e-3:
        return None  # one stain alone
    return np.asarray(stains[np.argsort(-stains[:, 0])], np.float32)  # haematoxylin takes more of the red


def _density(patch: Pixels) -> NDArray[np.float32]:
    return _DENSITY_OF[patch]


def _light(density: _Floats) -> Pixels:
    return np.clip(np.rint(_LIGHT * np.exp(-density)), 0, 255).astype(np.uint8)


# The light of black is taken for half a grey level: its density would be infinite.
_DENSITY_OF: Final = -np.log(np.maximum(np.arange(256), 0.5) / _LIGHT).astype(np.float32)


def _recoloured(patch: Pixels, options: Augmentation, rng: np.random.Generator) -> Pixels:
    hue = int(rng.integers(-options.hue, options.hue + 1))
    saturation = int(rng.integers(-options.saturation, options.saturation + 1))
    brightness = float(rng.uniform(*options.brightness))
    if hue or saturation:
        hsv = cv2.cvtColor(np.ascontiguousarray(patch), cv2.COLOR_RGB2HSV)
        levels = np.arange(256)
        hsv[..., 0] = ((levels + hue) % 180).astype(np.uint8)[hsv[..., 0]]
        hsv[..., 1] = np.clip(levels + saturation, 0, 255).astype(np.uint8)[hsv[..., 1]]
        patch = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if brightness != 1.0:
        patch = np.clip(np.rint(np.arange(256) * brightness), 0, 255).astype(np.uint8)[patch]
    return patch
