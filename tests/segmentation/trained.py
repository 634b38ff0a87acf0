"""A model that is trained in seconds on small made-up slides: what tests of whole segmentations share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image

from segmentation.augment import NO_AUGMENTATION, Augmentation
from segmentation.classifier import NetworkOptions
from segmentation.classifier_training import ClassifierTraining
from segmentation.config import Method, SegmentationConfig
from segmentation.dense import DenseConfig
from segmentation.fit import FitConfig
from segmentation.losses import SegmentationLoss
from segmentation.refine import RefineConfig
from segmentation.sampling import AnnotatedSlide, PatchOptions
from wsi.annotation import Annotation
from wsi.grid import Tiling

SIZE = (256, 192)
PX = 16
TISSUE = shapely.box(8, 8, 248, 184)
CONFIG = SegmentationConfig(
    patches=PatchOptions(("tumour",), Tiling(mpp=1.0, tile_px=PX, min_tissue=0.5, spare=1.0), min_coverage=0.5),
    refinement=RefineConfig(("tumour",), hyper={"filters": (4, 8), "norm": "batch"}, side_px=64),
    dense=DenseConfig(("tumour",), hyper={"filters": (4, 8), "norm": "batch"}, tile_px=64, overlap_px=16),
    network=NetworkOptions("colour-stats", frozen=True, hidden=0, dropout=0),
    classifier=ClassifierTraining(
        epochs=8, patches=192, validation_patches=64, lr=0.1, device="cpu", augmentation=NO_AUGMENTATION
    ),
    fit=FitConfig(
        steps=30, batch_size=2, accumulate=1, learning_rate=2e-2, validate_every=15,
        augmentation=Augmentation(turns=False, stain="none", hue=0, saturation=0, brightness=(1.0, 1.0)),
        loss=SegmentationLoss(1.0, 0.5),
    ),
    folds=2,
)  # fmt: skip


def tumour(seed: int) -> shapely.Polygon:
    """Where the tumour of a slide lies, in level-0 pixels."""
    x, y = np.random.default_rng(seed).integers((20, 20), (130, 90))
    return shapely.box(x, y, x + 90, y + 70)


def picture(seed: int) -> NDArray[np.uint8]:
    """Pink tissue on white glass, purple where the tumour is."""
    rng = np.random.default_rng(seed)
    pixels = np.full((SIZE[1], SIZE[0], 3), 245.0)
    for shape, colour in ((TISSUE, (230, 150, 190)), (tumour(seed), (120, 60, 150))):
        x0, y0, x1, y1 = (int(value) for value in shape.bounds)
        pixels[y0:y1, x0:x1] = colour
    pixels += rng.normal(0, 8, pixels.shape)
    return np.asarray(np.clip(pixels, 0, 255), np.uint8)


def save_picture(path: Path, seed: int) -> Path:
    """The slide ``seed`` as a file, at 1 micron per pixel, which it does not say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path)
    return path


def save_glands(path: Path, seed: int) -> list[Annotation]:
    """Pairs of glands side by side, with a darker line between, 192 px a side, at 2 microns per pixel; and their outlines."""
    rng = np.random.default_rng(seed)
    pixels = np.full((192, 192, 3), 225, np.uint8)
    truth = []
    for corner in [(10, 20), (100, 10), (20, 110), (105, 105)]:
        x, y = (rng.integers(10, size=2) + corner).tolist()
        for left in (x, x + 30):
            pixels[y : y + 40, left : left + 30] = (110, 60, 120)
            pixels[y + 3 : y + 37, left + 3 : left + 27] = (170, 100, 160)
            truth.append(Annotation(shapely.box(left, y, left + 30, y + 40), "gland"))
    noisy = np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy).save(path)
    return truth


def slide(folder: Path, seed: int) -> AnnotatedSlide:
    """A slide with its truth; the first two are of one patient."""
    path = folder / f"slide-{seed}.png"
    if not path.exists():
        save_picture(path, seed)
    drawn = (Annotation(tumour(seed), "tumour"),)
    return AnnotatedSlide(path, drawn, {"patient": str(max(seed, 1))}, (1.0, 1.0), (Annotation(TISSUE, "Tissue"),))


def config(method: Method = "cascade", **changes: Any) -> SegmentationConfig:
    """``CONFIG`` by another method, or with other settings."""
    return replace(CONFIG.with_method(method), **changes)


def write_truth(path: Path, seed: int, name: str = "tumour") -> Path:
    """The truth of a slide as GeoJSON, as QuPath writes it."""
    feature = {
        "type": "Feature",
        "geometry": json.loads(shapely.to_geojson(tumour(seed))),
        "properties": {"objectType": "annotation", "classification": {"name": name}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}), encoding="utf-8")
    return path
