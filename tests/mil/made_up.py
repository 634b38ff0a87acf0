"""Made-up cohorts whose truth is known: a class shows in the first feature of a few tiles."""

from pathlib import Path
from typing import Any

import numpy as np

from features.keys import slide_key
from features.store import FeatureStore
from features.writing import FeatureWriter, write_slide
from mil.bag import Bag
from mil.cohort import Cohort
from mil.config import TrainConfig
from wsi.grid import TileGrid, Tiling

DIM = 6
QUICK = TrainConfig(
    folds=3, members=1, inner=3, epochs=30, patience=30, lr=1e-2, weight_decay=0.05, batch_size=8, tile_dropout=0.0,
    feature_dropout=0.0, average=0.5,
    device="cpu", draws=20,
    hyper={"embed_dim": 8, "attention_dim": 4, "dropout": 0.0},
)  # fmt: skip


def bag_of(label: float, rng: Any, n: int = 12, shift: float = 5.0) -> Any:
    """(n, DIM) noise; a quarter of the tiles lie ``shift`` further along the first feature where the label is 1."""
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    x[: n // 4, 0] += shift * label
    return rng.permutation(x)


def arrays(n: int = 36, seed: int = 0, shift: float = 5.0) -> Any:
    """Bags, labels and patients; every third patient has two slides."""
    rng = np.random.default_rng(seed)
    patients = [i // 4 * 3 + min(i % 4, 2) for i in range(n)]
    labels = [patient % 2 for patient in patients]
    return [bag_of(label, rng, shift=shift) for label in labels], labels, patients


def cohort(n: int = 36, seed: int = 0, shift: float = 5.0) -> Cohort:
    bags, labels, patients = arrays(n, seed, shift)
    return Cohort.from_arrays([Bag(x, None, f"s{i:03d}") for i, x in enumerate(bags)], labels, patients)


def grid_of(n: int) -> TileGrid:
    xy = np.stack([np.arange(n) % 4 * 10, np.arange(n) // 4 * 10], axis=1)
    return TileGrid(xy=xy, tile_px=5, side=(10, 10), stride=(10, 10), mpp=(0.5, 0.5))


def write_store(
    root: Path, slides: dict[str, Any], *, encoder: str = "made-up", status: Any = None, weights: str = "a",
    revision: str | None = None,
) -> Any:  # fmt: skip
    """A feature store with these slides' vectors; ``slides`` maps relative paths to (N, DIM) arrays."""
    store = FeatureStore.create(root, Tiling())
    for path, x in slides.items():
        key = slide_key(path)
        about: dict[str, Any] = {
            "slide": {"key": key, "relpath": path, "location": path, "size": [200, 160], "mpp": [0.25, 0.25]},
            "tissue": {"source": "made up"},
        }
        about["slide"]["bounds"] = [3, 5, 190, 150]
        slide = store.find(key) or write_slide(store, key, grid_of(len(x)), about)
        identity = {"name": encoder, "dim": x.shape[1], "weights_sha256": weights}
        writer = FeatureWriter(store, slide, identity, {"precision": "fp32", "revision": revision}, dtype="float32")
        if len(x):
            writer.write(x, np.zeros(len(x), np.uint8) if status is None else status)
        writer.finish({})
    return store


def stored_cohort(folder: Path, n: int = 24, seed: int = 0) -> Any:
    """A store and a table of it: paths of both. Slides are ``x/s000.svs`` and so on, two of every third patient."""
    bags, labels, patients = arrays(n, seed)
    write_store(folder / "OUT", {f"x/s{i:03d}.svs": x for i, x in enumerate(bags)})
    lines = ["slide,patient,site,subtype,months,died"]
    for i, (label, patient) in enumerate(zip(labels, patients, strict=True)):
        where, kind = "AB"[patient % 3 == 0], ["luad", "lusc"][label]
        lines.append(f"s{i:03d}.svs,p{patient},{where},{kind},{10 + patient},{patient % 2}")
    (folder / "cohort.csv").write_text("\n".join(lines))
    return folder / "OUT", folder / "cohort.csv"
