"""Does the whole way work? Phantom slides, half of them with a tumour somewhere, through extraction, training and heat maps.

60 slides, 30 of which hold a tumour on 0.5 to 20% of their tissue (log-uniform), of several stains, glass, pens, codecs and
qualities, none of which tell anything of the class. Each slide answers for itself; models are trained by five folds over
patients, some of whom have two slides. Attention is compared with the truth, tile by tile, within each slide with tumour, by
the models that never saw its patient: a tile is tumour if half of it or more lies in the phantom's tumour.

With ``--quick`` slides are too few and too small to learn from; it shows that everything runs.

    python benchmarks/phantom_cohort.py                                            # offline, no weights
    python benchmarks/phantom_cohort.py --encoder examples/gleason_mobilenet.py:build --encoder timm:resnet18
    python benchmarks/phantom_cohort.py --work FOLDER                              # goes on where it was stopped
"""

import csv
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import shapely
from figures import Figure, parser, report
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from features import EncoderRequest, ExtractOptions, FeatureStore, extract_slides
from features.keys import safe_name
from features.prepare import PrepareOptions
from mil import Cohort, TrainConfig, cross_validate
from wsi.grid import TileGrid, Tiling
from wsi.phantom import Codec, Phantom, PhantomSpec, Stain, write_svs

ROOT = Path(__file__).resolve().parents[1]
ENCODER = f"{ROOT / 'examples' / 'texture_statistics.py'}:build"
MODELS = ("abmil", "abmil-gated", "clam-sb", "mean", "linear", "max")
ATTENTIVE = MODELS[:3]  # those whose attention is learned
TRAINING = TrainConfig(members=1, fusion="none", device="cpu")
SHARES = (0.005, 0.2)  # of the tissue that is tumour, from and to
TILING = Tiling(mpp=0.5, tile_px=256)
STAINS: tuple[Stain, ...] = ("he", "he", "pale", "ihc")
CODECS: tuple[Codec, ...] = ("jpeg", "jpeg-rgb")
QUALITIES = (70, 80, 90)
GLASS = ((243, 243, 243), (250, 249, 247), (232, 233, 240), (245, 238, 240))


@dataclass(frozen=True, eq=False)
class Painted:
    """A phantom cohort on disk: its folder of slides, its table, and where the tumour of each slide lies."""

    slides: Path
    table: Path
    tumours: dict[str, shapely.MultiPolygon]


def paint(folder: Path, n_slides: int, side_px: int, seed: int = 0) -> Painted:
    """Write the slides and the table; looks are drawn by the same chances for both classes."""
    rng = np.random.default_rng(seed)
    slides = folder / "slides"
    slides.mkdir(parents=True, exist_ok=True)
    tumours, rows = {}, [("slide", "patient", "diagnosis")]
    for index in range(n_slides):
        ill, number = index % 2 == 1, index // 2
        tumour = float(np.exp(rng.uniform(*np.log(SHARES)))) if ill else 0.0
        stain = STAINS[int(rng.integers(len(STAINS)))]
        spec = PhantomSpec(
            side_px,
            side_px,
            mpp=0.5,
            seed=100 + 1000 * seed + index,
            tissue_fraction=float(rng.uniform(0.35, 0.5)),
            n_pieces=int(rng.integers(1, 4)),
            n_holes=int(rng.integers(4)),
            tumour=tumour,
            stain=stain,
            background=GLASS[int(rng.integers(len(GLASS)))],
            pen=("blue",) if rng.random() < 0.2 else (),
            blur=bool(rng.random() < 0.2),
        )
        codec, quality = CODECS[int(rng.integers(len(CODECS)))], QUALITIES[int(rng.integers(len(QUALITIES)))]
        phantom = Phantom(spec)
        name = f"s{index:02}.svs"
        if not (slides / name).exists():
            write_svs(slides / name, phantom, codec=codec, quality=quality)
        if ill:
            tumours[name] = phantom.tumour
        # Of three slides of a class in a row, the first two are of one patient.
        rows.append((name, f"{'T' if ill else 'B'}{number - (number % 3 == 1):02}", "tumour" if ill else "benign"))
    with (folder / "cohort.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return Painted(slides, folder / "cohort.csv", tumours)


def extract(painted: Painted, out: Path, encoder: str) -> str:
    """Run the engine on the slides; returns the name under which the features are stored."""
    request = EncoderRequest(encoder, random_seed=0 if encoder.startswith("timm:") else None)
    options = ExtractOptions(prepare=PrepareOptions(tiling=TILING), batch_size=32)
    done = extract_slides(painted.slides, out, request, options)
    if done.count("failed"):
        raise SystemExit(f"{done.count('failed')} slides failed; see {out / 'report.jsonl'}")
    return next(iter(FeatureStore(out))).encoders[0]


def is_tumour(grid: TileGrid, tumour: shapely.MultiPolygon) -> NDArray[np.bool_]:
    """(N,) whether half of a tile or more is tumour."""
    corner = grid.xy.astype(np.float64)
    boxes = shapely.box(*corner.T, *(corner + grid.side).T)
    return np.asarray(shapely.area(shapely.intersection(boxes, tumour)) >= 0.5 * shapely.area(boxes))


def judge(
    painted: Painted, out: Path, encoder: str, config: TrainConfig, label: str, *, promised: bool
) -> list[Figure]:
    """Train one model; its AUROC over the slides, and that of its attention over the tiles of slides with tumour."""
    cohort = Cohort.from_store(out, painted.table, "diagnosis", encoder=encoder)
    result = cross_validate(cohort, config, out=out / "runs" / config.model)
    auroc = result.intervals()["auroc"]
    promised = promised and config.model in ATTENTIVE
    name = f"{label}, {config.model}"
    figures = [Figure(f"{name}: AUROC of slides", auroc.value, "", 0.95 if promised else None, True, auroc[1:3])]
    found = []
    for slide, tumour in painted.tumours.items():
        heat = result.heatmap(slide)
        truth = is_tumour(heat.grid, tumour)[heat.scored]
        if truth.any() and config.model not in ("mean", "linear"):  # whose attention is the same everywhere
            found.append(roc_auc_score(truth, heat.values[heat.scored]))
    if found:
        figures.append(Figure(f"{name}: AUROC of attention", float(np.mean(found)), "", 0.9 if promised else None))
        figures.append(Figure(f"{name}: slides with tumour tiles", len(found), "slides"))
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--encoder", action="append", help="as for wsi-extract; may be given several times")
    options.add_argument("--model", action="append", choices=MODELS, help="only this one; may be given several times")
    options.add_argument("--seed", type=int, default=0, help="of slides and training")
    options.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep slides, features and runs here, and use them"
    )
    chosen = options.parse_args()
    n_slides, side_px = (16, 3072) if chosen.quick else (60, 6656)
    models = chosen.model or (("abmil", "linear") if chosen.quick else MODELS)
    figures: list[Figure] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.work or Path(temporary)
        painted = paint(folder, n_slides, side_px, chosen.seed)
        for asked in chosen.encoder or [ENCODER]:
            label = asked.rsplit("/", 1)[-1].partition(".py:")[0]
            out = folder / safe_name(label)
            encoder = extract(painted, out, asked)
            for model in models:
                config = replace(TRAINING, model=model, seed=chosen.seed)
                figures += judge(painted, out, encoder, config, label, promised=not chosen.quick)
            tiles = [len(slide.grid) for slide in FeatureStore(out)]
    figures.append(Figure("tiles of a slide, median", float(np.median(tiles)), "tiles"))
    figures.append(Figure("the whole run", (time.monotonic() - started) / 60, "minutes"))
    report("Phantom cohort: slide and tile", figures, chosen.json)


if __name__ == "__main__":
    main()
