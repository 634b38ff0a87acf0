"""slide2vec on a folder, through its public interface.

with_slide2vec.py run SLIDES OUT
with_slide2vec.py export OUT FILE.npz

Its own choice of reader (cuCIM), two loader processes, no normalisation: the fastest way it offers on two cores.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from means import BATCH, MIN_TISSUE, MPP, TILE_PX, WORKERS, Means, save


def run(slides: Path, out: Path) -> None:
    from hs2p import DEFAULT_MASK_SAMPLING, TilingConfig  # type: ignore[import-not-found]
    from slide2vec import (  # type: ignore[import-not-found]
        ExecutionOptions,
        Model,
        Pipeline,
        PreprocessingConfig,
        TorchTileEncoder,
        register_encoder,
    )
    from torchvision.transforms import v2

    @register_encoder(
        "means",
        encode_dim=3,
        input_size=TILE_PX,
        supports_variable_input_size=True,
        supported_spacing_um=MPP,
        precision="fp32",
    )
    class MeansEncoder(TorchTileEncoder):  # type: ignore[misc]
        def __init__(self, *, output_variant: str | None = None) -> None:
            facts = {"encode_dim": 3, "input_size": TILE_PX, "mean": (0, 0, 0), "std": (1, 1, 1)}
            super().__init__(Means(), **facts, output_variant=output_variant)

        def get_normalization_transform(self) -> v2.Compose:
            return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    preprocessing = PreprocessingConfig(
        tiling=TilingConfig(requested_spacing_um=MPP, requested_tile_size_px=TILE_PX, tolerance=0.05, overlap=0.0),
        masks=replace(DEFAULT_MASK_SAMPLING, min_coverage={"tissue": MIN_TISSUE}),
        num_cucim_workers=1,  # it starts cores / this many loader processes
    )
    execution = ExecutionOptions(
        output_dir=out,
        batch_size=BATCH,
        num_workers_per_gpu=WORKERS,
        num_preprocessing_workers=WORKERS,
        precision="fp32",
    )
    Pipeline(Model.from_preset("means", device="cpu"), preprocessing, execution=execution).run(
        slides=sorted(slides.iterdir())
    )


def export(out: Path, file: Path) -> None:
    slides = {}
    for path in sorted((out / "tile_embeddings").glob("*.pt")):
        tiles = np.load(out / "tiles" / f"{path.stem}.coordinates.npz")
        xy = np.stack([tiles["x"], tiles["y"]], axis=1)
        slides[path.stem] = (xy, torch.load(path, weights_only=True).numpy())
    save(file, slides)


if __name__ == "__main__":
    {"run": run, "export": export}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
