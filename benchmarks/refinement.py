"""H2G-Net's ablation in shape: patches alone, the low-resolution U-Net alone, and the cascade of both, on made-up slides.

Every slide has tumour and, from afar in the same colours, adenoma; both with ragged borders. The patch classifier is kept
weak on purpose: a small network from scratch, for a few epochs. All three learn from the same slides and are tested on
others; differences are of slides drawn with replacement.

    python benchmarks/refinement.py --work FOLDER      # keeps slides and models there; a second call goes on
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from figures import Figure, parser, report
from PIL import Image

from segmentation.annotated import annotated_slides
from segmentation.classifier import NetworkOptions
from segmentation.classifier_training import ClassifierTraining
from segmentation.config import SegmentationConfig
from segmentation.evaluate import EvaluateOptions, evaluate_slide
from segmentation.fit import FitConfig
from segmentation.metrics import interval_of_mean, paired_difference
from segmentation.polygons import PolygonOptions
from segmentation.results import outlines_of
from segmentation.sampling import PatchOptions
from segmentation.segmenter import MODEL_FILE, Segmenter
from segmentation.train import SilentWatcher, train
from wsi.annotation import Annotation
from wsi.discover import discover
from wsi.geojson import read_geojson, write_geojson
from wsi.grid import Tiling
from wsi.phantom import Phantom, PhantomSpec, write_svs
from wsi.picture import draw_areas
from wsi.slide import Slide

CLASS = "tumour"
LEAST = 0.93
GAIN = 0.03


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        width, height: of slides at 2 microns per pixel.
        side_px: of the picture that the second network sees.
    """

    train: int = 24
    test: int = 12
    width: int = 4_096
    height: int = 3_584
    epochs: int = 6
    patches: int = 768
    side_px: int = 96
    steps: int = 600


QUICK = Size(train=6, test=3, width=2048, height=1792, epochs=2, patches=160, side_px=48, steps=60)
MPP = 2.0


def spec_of(number: int, size: Size) -> PhantomSpec:
    rng = np.random.default_rng([3, number])
    return PhantomSpec(
        size.width,
        size.height,
        mpp=MPP,
        seed=2000 + number,
        n_pieces=int(rng.integers(1, 4)),
        tissue_fraction=float(rng.uniform(0.35, 0.5)),
        tumour=float(rng.uniform(0.12, 0.35)),
        adenoma=float(rng.uniform(0.15, 0.35)),
        n_holes=int(rng.integers(0, 4)),
        stain="pale" if rng.random() < 0.3 else "he",
    )


def make_cohort(folder: Path, size: Size) -> None:
    """Slides and their truth, ``train`` and ``test`` apart; those there already stay."""
    for number in range(size.train + size.test):
        part = folder / ("train" if number < size.train else "test")
        path, truth = part / "slides" / f"case-{number:02d}.svs", part / "truth" / f"case-{number:02d}.geojson"
        if truth.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        phantom = Phantom(spec_of(number, size))
        write_svs(path, phantom)
        with Slide.open(path) as slide:
            write_geojson(truth, [Annotation(phantom.tumour, CLASS)], slide.frame)


def config_of(size: Size) -> SegmentationConfig:
    base = SegmentationConfig.of_classes((CLASS,))
    return replace(
        base,
        patches=PatchOptions((CLASS,), Tiling(mpp=MPP, tile_px=96, min_tissue=0.25, spare=1.0)),
        network=NetworkOptions("timm:resnet10t", random_seed=0),
        classifier=ClassifierTraining(
            epochs=size.epochs, patches=size.patches, validation_patches=size.patches // 2, batch_size=32, lr=1e-3
        ),
        refinement=replace(
            base.refinement, side_px=size.side_px, hyper={"filters": (16, 32, 64, 64, 64), "norm": "batch"}
        ),
        fit=FitConfig(
            steps=size.steps, batch_size=6, accumulate=1, learning_rate=1e-3, validate_every=25, patience=100
        ),
        folds=2,
    )


class _Lines(SilentWatcher):
    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)


def trained(folder: Path, name: str, config: SegmentationConfig, cohort: Path) -> float:
    """Train a model unless it is there; the seconds it took."""
    if (folder / name / MODEL_FILE).exists():
        return 0.0
    slides = annotated_slides(discover(cohort / "slides").sources, cohort / "truth", (CLASS,)).slides
    print(name, flush=True)
    began = time.perf_counter()
    train(slides, config, folder / name, watcher=_Lines())
    return time.perf_counter() - began


def scores_of(segmenter: Segmenter, cohort: Path, heats: Path, picture: Path | None = None) -> list[float]:
    """Dice of each test slide; and a picture of the first."""
    found = []
    for source in discover(cohort / "slides").sources:
        with Slide.open(source.location) as slide:
            heat = None
            if segmenter.first is not None:
                heat = segmenter.score(slide, heats / f"{segmenter.about['method']}-{slide.name}.zarr")
            outlines = outlines_of(segmenter.find(slide, heat), PolygonOptions(tolerance_um=0))
            truth = read_geojson(cohort / "truth" / f"{Path(slide.name).stem}.geojson").annotations
            options = EvaluateOptions(mpp=4.0, classes=(CLASS,), objects=False)
            found.append(evaluate_slide(outlines, truth, slide.frame, options)[0].dice)
            if picture is not None and len(found) == 1:
                view = slide.overview(max_px=900)
                drawn = [replace(each, color=(0, 110, 230)) for each in outlines]
                Image.fromarray(draw_areas(view, [*drawn])).save(picture)
    return found


def figures_of(scores: Mapping[str, Sequence[float]], *, promised: bool) -> list[Figure]:
    figures = []
    for name, values in scores.items():
        mean = interval_of_mean(values)
        reach = LEAST if promised and name == "cascade" else None
        figures.append(Figure(f"{name}: Dice, mean of {mean.n} slides", mean.value, "", reach, interval=mean[1:3]))
    for name in ("patches", "picture"):
        more = paired_difference(scores["cascade"], scores[name])
        reach = GAIN if promised else None
        figures.append(Figure(f"cascade more than {name}", more.value, "", reach, interval=more[1:3]))
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--work", type=Path, help="folder for slides and models; a temporary one by default")
    options.add_argument("--pictures", type=Path, help="folder for a picture of each, PNG")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    size = QUICK if chosen.quick else Size()
    with tempfile.TemporaryDirectory() as temporary:
        work = chosen.work or Path(temporary)
        make_cohort(work, size)
        config = config_of(size)
        seconds = trained(work, "cascade", config, work / "train")
        trained(work, "picture", config.with_method("picture"), work / "train")
        cascade = Segmenter.load(work / "cascade")
        segmenters = {
            "cascade": cascade,
            "patches": cascade.first_alone(),
            "picture": Segmenter.load(work / "picture"),
        }
        scores = {}
        for name, segmenter in segmenters.items():
            picture = None if chosen.pictures is None else chosen.pictures / f"{name}.png"
            with tempfile.TemporaryDirectory() as heats:
                scores[name] = scores_of(segmenter, work / "test", Path(heats), picture)
            print(name, *(f"{value:.3f}" for value in scores[name]))
    figures = figures_of(scores, promised=not chosen.quick)
    if seconds:
        figures.append(Figure("training the cascade, classifiers of all folds included", seconds, "s"))
    report("Patch-refinement segmentation on made-up slides", figures, chosen.json)


if __name__ == "__main__":
    main()
