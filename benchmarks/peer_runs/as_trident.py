"""The loop that TRIDENT, CLAM and many scripts share, on a folder: a new DataLoader for each slide, an h5 file for each.

as_trident.py run SLIDES OUT
as_trident.py export OUT FILE.npz

Written anew after what those tools do, none of their code. Tissue is where a thumbnail is more saturated than Otsu's
threshold, which is quicker than the networks they also offer.
"""

import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import openslide
import torch
from means import BATCH, MIN_TISSUE, MPP, TILE_PX, WORKERS, Means, save
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0, 0, 0), (1, 1, 1))])


class Tiles(Dataset[Tensor]):
    def __init__(self, path: Path, xy: NDArray[np.int64], side_px: int) -> None:
        self.path, self.xy, self.side_px = path, xy, side_px
        self.slide: openslide.OpenSlide | None = None  # each process opens its own

    def __len__(self) -> int:
        return len(self.xy)

    def __getitem__(self, index: int) -> Tensor:
        self.slide = self.slide or openslide.OpenSlide(self.path)
        x, y = (int(value) for value in self.xy[index])
        region = self.slide.read_region((x, y), 0, (self.side_px, self.side_px)).convert("RGB")
        tile: Tensor = TO_TENSOR(region.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR))
        return tile


def tiles_on_tissue(slide: openslide.OpenSlide, side_px: int) -> NDArray[np.int64]:
    """(N, 2) level-0 corners of the tiles of a lattice that lie on tissue."""
    thumbnail = np.asarray(slide.get_thumbnail((2048, 2048)))
    saturation = cv2.medianBlur(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1], 7)
    mask = cv2.threshold(saturation, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1]
    columns, rows = (size // side_px for size in slide.dimensions)
    scale = thumbnail.shape[1] / slide.dimensions[0]
    size = (round(columns * side_px * scale), round(rows * side_px * scale))
    share = cv2.resize(mask[: size[1], : size[0]].astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    return np.argwhere(share >= MIN_TISSUE)[:, ::-1] * side_px


def run(slides: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model = Means()
    for path in sorted(slides.iterdir()):
        with openslide.OpenSlide(path) as slide:
            side_px = round(TILE_PX * MPP / float(slide.properties["openslide.mpp-x"]))
            xy = tiles_on_tissue(slide, side_px)
        loader = DataLoader(Tiles(path, xy, side_px), batch_size=BATCH, num_workers=WORKERS)
        with h5py.File(out / f"{path.stem}.h5", "w") as file, torch.inference_mode():
            file["coords"] = xy
            features = file.create_dataset("features", (0, 3), "f4", maxshape=(None, 3), chunks=(BATCH, 3))
            for batch in loader:
                features.resize(len(features) + len(batch), axis=0)
                features[-len(batch) :] = model(batch).numpy()


def export(out: Path, file: Path) -> None:
    slides = {}
    for path in sorted(out.glob("*.h5")):
        with h5py.File(path) as stored:
            slides[path.stem] = (stored["coords"][:], stored["features"][:])
    save(file, slides)


if __name__ == "__main__":
    {"run": run, "export": export}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
