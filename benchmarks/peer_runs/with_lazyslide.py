"""LazySlide on a folder, through its public interface.

with_lazyslide.py run SLIDES OUT
with_lazyslide.py export OUT FILE.npz

Two loader processes (its default is none), tiles as bytes without a transform: the fastest way it offers on two cores.
"""

import sys
import warnings
from pathlib import Path

from means import BATCH, MIN_TISSUE, MPP, TILE_PX, WORKERS, MeansOfBytes, save


def run(slides: Path, out: Path) -> None:
    import lazyslide as zs  # type: ignore[import-not-found]

    warnings.simplefilter("ignore")  # zarr speaks of coming defaults on every write
    for path in sorted(slides.iterdir()):
        slide = zs.open_wsi(path, store=str(out))
        zs.pp.find_tissues(slide)
        zs.pp.tile_tissues(slide, TILE_PX, mpp=MPP, background_fraction=1 - MIN_TISSUE)
        zs.tl.feature_extraction(
            slide, MeansOfBytes(), model_name="means", batch_size=BATCH, num_workers=WORKERS, pbar=False
        )
        slide.write()


def export(out: Path, file: Path) -> None:
    import spatialdata  # type: ignore[import-not-found]

    slides = {}
    for path in sorted(out.glob("*.zarr")):
        stored = spatialdata.read_zarr(path)
        corners = stored.shapes["tiles"].bounds[["minx", "miny"]].to_numpy().astype(int)
        slides[path.stem] = (corners, stored.tables["means_tiles"].X)
    save(file, slides)


if __name__ == "__main__":
    {"run": run, "export": export}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
