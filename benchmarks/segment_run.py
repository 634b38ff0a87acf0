"""What it takes to segment a large slide on a CPU: H2G-Net's two stages, from the file to outlines, in one process.

The slide is made up, 100,000 x 80,000 pixels at 0.25 microns, about 40 % of it tissue. The networks are those of the paper,
MobileNetV2 on patches of 256 px at 1 micron and the U-Net on 1024 px, with random weights: their values do not matter to
the time. The paper has 58.07 s with OpenVINO on a computer that it does not name.

    python benchmarks/segment_run.py --slide big.svs      # made there if it is not there: some minutes, 0.9 GB
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, parser, report

from segmentation.classifier import NetworkOptions, PatchClassifier
from segmentation.config import SegmentationConfig
from segmentation.refine import Refiner
from segmentation.segmenter import CLASSIFIER_FILE, REFINEMENT_FILE, export_model, write_model
from wsi.phantom import PhantomSpec, write_svs

SIZE = (100_000, 80_000)
QUICK = (24_000, 20_000)
MOST_S = 30.0
MOST_MB = 1500.0


def make_slide(path: Path, size: tuple[int, int]) -> None:
    spec = PhantomSpec(*size, mpp=0.25, seed=7, n_pieces=3, tissue_fraction=0.4, tumour=0.3)
    write_svs(path, spec, levels=(1, 4, 16, 64))


def make_model(folder: Path) -> None:
    """H2G-Net as published, untrained."""
    config = SegmentationConfig.of_classes(("tumour",))
    options = NetworkOptions(random_seed=0)
    PatchClassifier(config.facts, options, options.load()).save(folder / CLASSIFIER_FILE)
    Refiner.untrained(config.refinement).save(folder / REFINEMENT_FILE)
    write_model(folder, {"method": "cascade", "classes": list(config.classes), "config": config.as_json()})
    for line in export_model(folder):
        print(line)


def run(slide: Path, model: Path, out: Path, runtime: str) -> dict[str, object]:
    """The slide's line of the report of ``wsi segment run``, in a process of its own."""
    words = ["segment", "run", str(slide), str(out), "--model", str(model), "--runtime", runtime]
    program = "from cli.main import main; main()"
    subprocess.run([sys.executable, "-c", program, *words], check=True)
    line = (out / "report.jsonl").read_text().splitlines()[0]
    found: dict[str, object] = json.loads(line)
    if found["status"] != "done":
        raise SystemExit(f"{slide}: {found}")
    return found


def figures_of(found: dict[str, object], name: str, *, reach: bool) -> list[Figure]:
    facts: dict[str, float] = found["seconds"]  # type: ignore[assignment]  # JSON
    total = sum(seconds for stage, seconds in facts.items() if stage != "encoding")
    words = {
        "prepare": "opening and finding tissue",
        "patches": "patches: reading and stage 1",
        "encoding": "of which in stage 1's network",
        "refinement": "picture and stage 2",
        "polygons": "outlines",
        "writing": "GeoJSON, mask pyramid, picture",
    }
    figures = [Figure(f"{name}: all of a slide", total, "s", MOST_S if reach else None, higher_is_better=False)]
    figures += [Figure(f"{name}: {word}", facts[stage], "s") for stage, word in words.items()]
    figures.append(Figure(f"{name}: patches", float(str(found["n_tiles"])), ""))
    memory = float(str(found["peak_memory_mb"]))
    figures.append(Figure(f"{name}: peak memory", memory, "MB", MOST_MB if reach else None, higher_is_better=False))
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--slide", type=Path, help="made there if it is not there; a temporary file by default")
    options.add_argument("--runtimes", default="auto,torch", help="auto: ONNX Runtime where it is faster; torch")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        slide = chosen.slide or folder / "slide.svs"
        if not slide.exists():
            make_slide(slide, QUICK if chosen.quick else SIZE)
        model = folder / "model"
        model.mkdir()
        make_model(model)
        figures = []
        for runtime in ("auto",) if chosen.quick else chosen.runtimes.split(","):
            found = run(slide, model, folder / runtime, runtime)
            name = "fastest" if runtime == "auto" else "PyTorch alone"
            figures += figures_of(found, name, reach=runtime == "auto")
    report("A large slide, segmented on a CPU", figures, chosen.json)


if __name__ == "__main__":
    main()
