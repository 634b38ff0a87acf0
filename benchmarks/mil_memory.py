"""How much memory does an answer for a very large slide take? A bag of 100,000 tiles, 1536 wide, from a store on disk.

For each model a run is trained on a few small bags, then, in a process of its own, ``mil.Predictor`` answers for the large
slide. Growth is what the process holds at its peak beyond what it held with the run loaded; the whole is all of it, Python,
torch and the rest included. The bag alone is 293 MB.

    python benchmarks/mil_memory.py
"""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from figures import Figure, parser, report

from features.keys import slide_key
from features.store import FeatureStore
from features.writing import FeatureWriter, write_slide
from mil import Cohort, TrainConfig, cross_validate
from wsi.grid import TileGrid, Tiling

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("abmil", "abmil-gated", "clam-sb", "clam-mb")
DIM = 1536
BLOCK = 4096
RUN = """
import resource, sys
from pathlib import Path
from mil import Predictor
predictor = Predictor.load(sys.argv[1], device="cpu")
pages = int(Path("/proc/self/statm").read_text().split()[1])
predictor.predict(sys.argv[2])
print(pages * resource.getpagesize() / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
"""


def write_store(root: Path, slides: Mapping[str, int]) -> None:
    """A store of slides with so many tiles each; vectors are noise, those of every other slide shifted."""
    store = FeatureStore.create(root, Tiling())
    rng = np.random.default_rng(0)
    for number, (path, tiles) in enumerate(slides.items()):
        key = slide_key(path)
        xy = np.stack([np.arange(tiles) % 400 * 512, np.arange(tiles) // 400 * 512], axis=1)
        grid = TileGrid(xy=xy, tile_px=256, side=(512, 512), stride=(512, 512), mpp=(0.5, 0.5))
        size = [400 * 512, (tiles // 400 + 1) * 512]
        about = {
            "slide": {"key": key, "relpath": path, "location": path, "size": size, "mpp": [0.25, 0.25], "bounds": None},
            "tissue": {"source": "made up"},
        }
        slide = write_slide(store, key, grid, about)
        writer = FeatureWriter(store, slide, {"name": "noise", "dim": DIM}, {"precision": "fp16"}, dtype="float16")
        noise = rng.standard_normal((min(BLOCK, tiles), DIM), dtype=np.float32) + number % 2
        for start in range(0, tiles, BLOCK):
            rows = noise[: tiles - start]
            writer.write(rows, np.zeros(len(rows), np.uint8))
        writer.finish({})


def train(folder: Path, model: str) -> Path:
    """A finished run on small slides, just so that there is one."""
    names = {f"{i}.svs": 20 for i in range(8)}
    if not (folder / "small").exists():
        write_store(folder / "small", names)
        with (folder / "cohort.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("slide", "label"), *((name, i % 2) for i, name in enumerate(names))])
    cohort = Cohort.from_store(folder / "small", folder / "cohort.csv", "label")
    cross_validate(cohort, TrainConfig(model=model, folds=2, members=1, epochs=2, draws=2), out=folder / model)
    return folder / model


def main() -> None:
    chosen = parser(__doc__).parse_args()
    tiles = 25_000 if chosen.quick else 100_000
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "large", {"large.svs": tiles})
        for model in MODELS:
            command = [sys.executable, "-c", RUN, str(train(folder, model)), str(folder / "large")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            before, peak = (float(word) for word in done.stdout.split()[-2:])
            figures += [
                Figure(f"{model}: growth at the peak", peak - before, "MB"),
                Figure(f"{model}: whole process at the peak", peak, "MB", 2000, False),
            ]
    report(f"Memory of an answer for {tiles:,} tiles × {DIM}, half precision", figures, chosen.json)


if __name__ == "__main__":
    main()
