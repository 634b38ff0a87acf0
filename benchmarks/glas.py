"""How well are glands found? Dense network, cascade, and a first stage on known weights, on real H&E with gland masks.

Needs the GlaS composites (``slides/glas_composite_{train,testB}.tif``, ``.json``, ``_mask.png``): fields of the GlaS
challenge (Sirinukunwattana et al., Medical Image Analysis 35, 2017) laid out on two slides. Networks start from random
weights, learn from ``train`` and are tested on ``testB``. Resolution, colours and how objects are parted were chosen on
every fifth field of ``train`` by networks that learned from the others, as ``--held-out`` does; fields of one patient may be
on both sides of that line. The number of steps is what time allowed, twice that of the last such trial. Settings of the
cascades were not chosen by any trial.

Truth are the pieces of the masks, as the composites do not say which pieces are one gland; nothing outside the fields
counts. Object scores are those of the challenge, over all objects of the slide, and as means over fields.

    python benchmarks/glas.py ../shared --parts dense --picture glas.jpg
    python benchmarks/glas.py ../shared --parts dense,cascade,gleason --json glas.json
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import shapely
from figures import Figure, parser, report
from numpy.typing import NDArray
from PIL import Image

from segmentation.augment import Augmentation
from segmentation.classifier import NetworkOptions
from segmentation.classifier_training import ClassifierTraining
from segmentation.config import DENSE_FIT, SegmentationConfig
from segmentation.dense import DenseConfig, DenseLook, segment_slide, train_dense
from segmentation.evaluate import EvaluateOptions, evaluate_slide
from segmentation.fit import FitConfig
from segmentation.heat import HeatOptions
from segmentation.instances import InstanceOptions
from segmentation.metrics import compare_objects
from segmentation.objects import find_objects
from segmentation.prior import Prior
from segmentation.refine import RefineConfig, Refiner, refine
from segmentation.sampling import REGION, AnnotatedSlide, PatchOptions
from segmentation.segmenter import REFINEMENT_FILE, Found, Segmenter
from segmentation.train import train
from wsi.annotation import Annotation
from wsi.geojson import Frame
from wsi.grid import Box, Tiling
from wsi.mask import MaskOptions, read_mask
from wsi.slide import Slide

ROOT = Path(__file__).resolve().parents[1]
GLAND = "gland"
PARTS = ("dense", "cascade", "gleason")
SPECK_UM2 = 10.0  # of a mask: pixels that hang on a gland by a corner
MARGIN_PX = 100  # half the glass between fields, which is known to hold no gland

DENSE = DenseConfig(
    (GLAND,),
    mpp=2.0,
    hyper={"filters": (16, 32, 64, 96, 128), "norm": "batch"},
    tile_px=128,
    overlap_px=64,
    contour_um=6.0,
)
FIT = DENSE_FIT
OBJECTS = InstanceOptions(contour_threshold=0.2, min_area_um2=1000, min_hole_um2=5000)
LOOK = DenseLook(tile_px=256, turns=True)
QUICK_STEPS = 20

REFINEMENT = RefineConfig((GLAND,), hyper=DENSE.hyper, side_px=DENSE.tile_px, mpp=DENSE.mpp, overlap_px=64)
SMALL = SegmentationConfig(
    PatchOptions((GLAND,), Tiling(1.0, 64, 32, 0.5), min_coverage=0.5, min_background=0.5),
    REFINEMENT,
    DENSE,
    network=NetworkOptions(hidden=0, random_seed=0),
    classifier=ClassifierTraining(
        ("class",), epochs=4, patches=6400, lr=1e-3, augmentation=Augmentation(stain_sigma=0.05), device="cpu"
    ),
    heat=HeatOptions(steps=2, min_tissue=0.25),
    fit=replace(FIT, steps=1000),
    folds=2,
    validation=0.0,
)
# The network's own input is 224 px at about 0.7 microns. Less of it tells glands' borders better, and is magnified.
GLEASON = replace(
    SMALL,
    patches=PatchOptions((GLAND,), Tiling(1.0, 128, 96, 0.5), min_coverage=0.5, min_background=0.5),
    network=NetworkOptions(f"{ROOT / 'examples' / 'gleason_mobilenet.py'}:build", frozen=True, hidden=0, dropout=0.0),
    classifier=replace(SMALL.classifier, epochs=2, patches=3200, lr=3e-3),
    heat=HeatOptions(steps=4, min_tissue=0.25),
)
GLEASON_WEIGHTS = "weights/gleason-mobilenet/MobileNet_Gleason_weights.h5"


@dataclass(frozen=True)
class Fields:
    """Some of the fields of a composite.

    Attributes:
        path: the slide.
        boxes: of the fields, in level-0 pixels.
        glands: within them.
        frame: of the slide.
    """

    path: Path
    boxes: tuple[shapely.Polygon, ...]
    glands: tuple[Annotation, ...]
    frame: Frame

    @classmethod
    def read(cls, folder: Path, name: str) -> "Fields":
        path = folder / f"glas_composite_{name}.tif"
        known = json.loads(path.with_suffix(".json").read_text())
        boxes = tuple(shapely.box(f["x"], f["y"], f["x"] + f["w"], f["y"] + f["h"]) for f in known)
        with Slide.open(path) as slide:
            frame = slide.frame
        options = MaskOptions(classes={255: GLAND})
        drawn = read_mask(path.with_name(f"{path.stem}_mask.png"), options, frame=frame)
        speck = SPECK_UM2 / (frame.mpp[0] * frame.mpp[1])
        return cls(path, boxes, tuple(a for a in drawn if a.geometry.area >= speck), frame)

    def take(self, rows: Sequence[int]) -> "Fields":
        boxes = tuple(self.boxes[row] for row in rows)
        here = shapely.union_all(boxes)
        return replace(self, boxes=boxes, glands=tuple(a for a in self.glands if a.geometry.intersects(here)))

    def tissue(self) -> list[Annotation]:
        return [Annotation(box, "Tissue") for box in self.boxes]

    def annotated(self) -> AnnotatedSlide:
        """The fields with some of the glass around them; the rest of the slide is not to be looked at."""
        chosen = [Annotation(shapely.buffer(box, MARGIN_PX, join_style="mitre"), REGION) for box in self.boxes]
        return AnnotatedSlide(self.path, (*self.glands, *chosen), tissue=self.tissue())

    def cut(self, folder: Path) -> list[AnnotatedSlide]:
        """Each field as a slide of its own, so that some can be scored by a network that saw the others."""
        folder.mkdir()
        made = []
        with Slide.open(self.path) as slide:
            for number, box in enumerate(self.boxes):
                x, y, right, bottom = (int(value) for value in box.bounds)
                size = (right - x, bottom - y)
                Image.fromarray(slide.read(Box(x, y, *size), size)).save(folder / f"{number}.png")
                whole = [Annotation(shapely.box(0, 0, *size), "Tissue")]
                drawn = within(self.glands, box)
                moved = [replace(a, geometry=shapely.affinity.translate(a.geometry, -x, -y)) for a in drawn]
                made.append(AnnotatedSlide(folder / f"{number}.png", moved, mpp=self.frame.mpp, tissue=whole))
        return made


@contextmanager
def measured(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds what a block took of the clock, and of all its threads' processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    seconds[f"{name}, clock"] = time.perf_counter() - wall
    seconds[f"{name}, processor"] = time.process_time() - processor


def within(found: Sequence[Annotation], box: shapely.Polygon) -> list[Annotation]:
    """Polygons cut off at a field's edge."""
    cut = [(a, part) for a in found for part in shapely.get_parts(shapely.intersection(a.geometry, box))]
    return [replace(a, geometry=part) for a, part in cut if part.geom_type == "Polygon" and not part.is_empty]


def scores(name: str, found: Sequence[Annotation], fields: Fields, reach: dict[str, float]) -> list[Figure]:
    """Scores over the whole slide and as means over fields."""
    mine, true = ([within(each, box) for box in fields.boxes] for each in (found, fields.glands))
    options = EvaluateOptions(mpp=max(fields.frame.mpp), classes=(GLAND,))
    (whole,) = evaluate_slide(
        [a for part in mine for a in part], [a for part in true for a in part], fields.frame, options
    )
    each = [
        compare_objects([a.geometry for a in m], [a.geometry for a in t], fields.frame.mpp)
        for m, t in zip(mine, true, strict=True)
    ]
    rows = {
        "Dice": (whole.dice, ""),
        "object F1": (whole.object_f1, ""),
        "object Dice": (whole.object_dice, ""),
        "object Hausdorff": (whole.object_hausdorff_um, "µm"),
        "object F1, mean of fields": (float(np.nanmean([one.f1 for one in each])), ""),
        "object Dice, mean of fields": (float(np.nanmean([one.dice for one in each])), ""),
        "object Hausdorff, mean of fields": (float(np.nanmean([one.hausdorff_um for one in each])), "µm"),
        "objects found": (whole.n_found, f"of {whole.n_true}"),
    }
    return [Figure(f"{name}: {row}", value, unit, reach.get(row)) for row, (value, unit) in rows.items()]


def dense(
    learned: Fields, test: Fields, work: Path, fit: FitConfig, *, keep: Path | None
) -> tuple[list[Annotation], dict[str, float]]:
    """Train at full resolution, and find the glands of the other fields."""
    seconds: dict[str, float] = {}
    with measured(seconds, "dense: training"):
        trained, _ = train_dense([learned.annotated()], DENSE, fit)
    if keep is not None:
        trained.save(keep, fitted=fit)
    with measured(seconds, "dense: test"), Slide.open(test.path) as slide:
        made = segment_slide(trained, slide, work / "dense.zarr", LOOK, tissue=test.tissue())
        return list(find_objects(Found.of_map(made), OBJECTS)), seconds


def cascade(
    name: str, config: SegmentationConfig, learned: Fields, test: Fields, work: Path
) -> tuple[dict[str, list[Annotation]], dict[str, float]]:
    """Train a patch classifier and a refinement network; the glands that the first, and both, find on other fields."""
    seconds: dict[str, float] = {}
    folder = work / name
    with measured(seconds, f"{name}: training"):
        train(learned.cut(work / f"{name}-fields"), config, folder)
    with measured(seconds, f"{name}: test"), Slide.open(test.path) as slide:
        heat = Segmenter.load(folder, device="cpu", runtime="torch").score(
            slide, work / f"{name}.zarr", tissue=test.tissue()
        )
        refined = refine(Refiner.load(folder / REFINEMENT_FILE, device="cpu"), slide, Prior.of_classes(heat, (GLAND,)))
        found = {
            "patch map": list(find_objects(Found.of_map(heat), OBJECTS)),
            "refined": list(find_objects(refined, OBJECTS)),
        }
    return found, seconds


def quick(config: SegmentationConfig) -> SegmentationConfig:
    """To see that everything runs."""
    return replace(
        config,
        classifier=replace(config.classifier, epochs=1, patches=64),
        fit=replace(config.fit, steps=10),
        heat=replace(config.heat, steps=1),
        refinement=replace(config.refinement, overlap_px=0),
    )


def picture(test: Fields, found: Sequence[Annotation], n: int, mpp: float = 1.2) -> NDArray[np.uint8]:
    """Fields with outlines, the truth in green and what was found in blue; three in a row, evenly from all."""
    rows = np.linspace(0, len(test.boxes) - 1, n).astype(int)
    panels = []
    with Slide.open(test.path) as slide:
        for box in (test.boxes[row] for row in rows):
            x, y, right, bottom = (int(value) for value in box.bounds)
            scale = test.frame.mpp[0] / mpp
            size = (round((right - x) * scale), round((bottom - y) * scale))
            panel = np.ascontiguousarray(slide.read(Box(x, y, right - x, bottom - y), size))
            for drawn, colour in ((test.glands, (0, 170, 60)), (found, (20, 60, 255))):
                for ring in (ring for a in within(drawn, box) for ring in shapely.get_rings(a.geometry)):
                    points = np.rint((shapely.get_coordinates(ring) - (x, y)) * scale * 16).astype(np.int32)
                    cv2.polylines(panel, [points], True, colour, 2, cv2.LINE_AA, shift=4)
            panels.append(cv2.copyMakeBorder(panel, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=(255, 255, 255)))
    height, width = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    even = [
        cv2.copyMakeBorder(p, 0, height - p.shape[0], 0, width - p.shape[1], cv2.BORDER_CONSTANT, value=(255, 255, 255))
        for p in panels
    ]
    return np.vstack([np.hstack(even[i : i + 3]) for i in range(0, len(even), 3)])


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "shared", type=Path, nargs="?", default=ROOT.parent / "shared", help="folder with slides/ and weights/"
    )
    options.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    options.add_argument(
        "--held-out", action="store_true", help="test on every fifth field of train, learn from the others"
    )
    options.add_argument("--steps", type=int, help=f"of the dense network's training; {FIT.steps} by default")
    options.add_argument("--keep", type=Path, metavar="FILE", help="write the dense network here")
    options.add_argument("--picture", type=Path, metavar="FILE", help="write fields with their outlines here")
    chosen = options.parse_args()
    parts = chosen.parts.split(",")
    learned = Fields.read(chosen.shared / "slides", "train")
    test = Fields.read(chosen.shared / "slides", "testB")
    if chosen.held_out:
        rows = range(len(learned.boxes))
        learned, test = learned.take([i for i in rows if i % 5 != 4]), learned.take([i for i in rows if i % 5 == 4])
    if chosen.quick:
        learned, test = (each.take(range(0, len(each.boxes), len(each.boxes) // 5)) for each in (learned, test))
    promised = not (chosen.quick or chosen.held_out)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if "dense" in parts:
            fit = replace(FIT, steps=chosen.steps or (QUICK_STEPS if chosen.quick else FIT.steps))
            found, seconds = dense(learned, test, work, fit, keep=chosen.keep)
            figures += scores("dense", found, test, {"Dice": 0.82, "object F1": 0.70} if promised else {})
            limit = {"dense: training, processor": 7200.0} if promised else {}
            figures += [Figure(row, value, "s", limit.get(row), False) for row, value in seconds.items()]
            if chosen.picture is not None:
                Image.fromarray(picture(test, found, 6)).save(chosen.picture, quality=85)
        for name, config in (("cascade", SMALL), ("gleason", GLEASON)):
            if name in parts:
                os.environ["GLEASON_WEIGHTS"] = str(chosen.shared / GLEASON_WEIGHTS)
                glands, seconds = cascade(name, quick(config) if chosen.quick else config, learned, test, work)
                for stage, found in glands.items():
                    figures += scores(f"{name}, {stage}", found, test, {})
                figures += [Figure(row, value, "s") for row, value in seconds.items()]
    report("GlaS: glands found", figures, chosen.json)


if __name__ == "__main__":
    main()
