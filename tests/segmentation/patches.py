"""Small slides of two plain colours, and what was drawn on them: cheap to make, and their patches tell where they are."""

from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image

from segmentation.sampling import AnnotatedSlide, PatchOptions
from wsi.annotation import Annotation
from wsi.grid import Tiling

PX = 16
TUMOUR = shapely.box(64, 32, 160, 128)
OPTIONS = PatchOptions(("tumour",), Tiling(mpp=1.0, tile_px=PX, min_tissue=0.5), min_coverage=0.5)


def box(x0: float, y0: float, x1: float, y1: float, name: str | None) -> Annotation:
    return Annotation(shapely.box(x0, y0, x1, y1), name)


def picture(seed: int, size: tuple[int, int] = (256, 192)) -> NDArray[np.uint8]:
    """Pink with noise; purple with stripes where the tumour is."""
    rng = np.random.default_rng(seed)
    width, height = size
    pixels = np.empty((height, width, 3))
    pixels[:] = (230, 150, 190)
    x0, y0, x1, y1 = (int(value) for value in TUMOUR.bounds)
    pixels[y0:y1, x0:x1] = (120, 60, 150)
    pixels[y0:y1, x0:x1:4] -= 40
    pixels += rng.normal(0, 12, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def slide(folder: Path, seed: int, *, shift: int = 0, grade: str = "1") -> AnnotatedSlide:
    """A picture of 256 x 192 px at 1 micron, its tumour drawn ``shift`` pixels to the right of where it is."""
    path = folder / f"slide-{seed}.png"
    if not path.exists():
        Image.fromarray(picture(seed)).save(path)
    drawn = Annotation(shapely.affinity.translate(TUMOUR, shift), "tumour")
    tissue = (box(0, 0, 256, 160, "Tissue"),)
    return AnnotatedSlide(path, (drawn,), {"grade": grade}, (1.0, 1.0), tissue)
