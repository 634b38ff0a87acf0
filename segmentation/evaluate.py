"""Evaluation: what was found on slides against what people drew on them, class by class, with intervals over slides."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import shapely
from numpy.typing import NDArray

from segmentation.annotated import with_class
from segmentation.heat import ProbabilityMap
from segmentation.metrics import Interval, calibration, compare_maps, compare_objects, interval_of_mean
from segmentation.place import MapPlace
from segmentation.raster import Raster
from segmentation.results import PROBABILITY
from segmentation.sampling import IGNORED, REGION
from wsi._files import nan_as_none, write_atomically, write_table
from wsi.annotation import Annotation
from wsi.annotations import check_annotations, match_annotations, read_annotations
from wsi.errors import UsageError
from wsi.geojson import Frame

__all__ = ["METRICS", "EvaluateOptions", "Evaluation", "Score", "evaluate", "evaluate_slide"]

_POLYGONS: Final = (".geojson", ".geojson.gz")
_MASKS: Final = (".ome.tif", ".ome.tiff", ".tif", ".tiff")


@dataclass(frozen=True)
class EvaluateOptions:
    """How slides are compared; saved with the numbers.

    Attributes:
        mpp: microns per pixel that areas and borders are compared at; not finer than the slide itself.
        classes: what is compared; all classes that were drawn, if empty.
        objects: whether polygons are compared one by one, as glands are.
    """

    mpp: float = 2.0
    classes: tuple[str, ...] = ()
    objects: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mpp < float("inf"):
            raise UsageError(f"mpp must be positive, got {self.mpp}")


@dataclass(frozen=True)
class Score:
    """One class on one slide. What is not defined, as recall where nothing was drawn, is NaN.

    ``ece`` and ``brier`` are of the probabilities of pixels, where results have them.
    """

    slide: str
    class_name: str
    dice: float
    iou: float
    precision: float
    recall: float
    hd95_um: float
    object_f1: float = math.nan
    object_dice: float = math.nan
    object_hausdorff_um: float = math.nan
    ece: float = math.nan
    brier: float = math.nan
    n_found: int = 0
    n_true: int = 0


METRICS: Final = tuple(field.name for field in fields(Score) if field.type is float)


@dataclass(frozen=True)
class Evaluation:
    """Scores of all slides, and lines about what stood in the way.

    Attributes:
        scores: a row a slide and class.
        notes: what was left out or changed in the truth, and slides without it.
    """

    scores: tuple[Score, ...]
    options: EvaluateOptions
    notes: tuple[str, ...] = ()

    def summary(self, *, draws: int = 2000, seed: int = 0) -> dict[str, dict[str, Interval]]:
        """For each class and metric the mean over slides with its bootstrap interval."""
        names = dict.fromkeys(score.class_name for score in self.scores)
        return {
            name: {
                metric: interval_of_mean(
                    [getattr(score, metric) for score in self.scores if score.class_name == name],
                    draws=draws,
                    seed=seed,
                )
                for metric in METRICS
            }
            for name in names
        }

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``scores.csv``, a row a slide and class, and ``summary.json`` with intervals, options and notes."""
        folder = Path(folder)
        write_table(folder / "scores.csv", [field.name for field in fields(Score)], map(astuple, self.scores))
        summary = {
            name: {metric: nan_as_none(found._asdict()) for metric, found in row.items()}
            for name, row in self.summary().items()
        }
        content = {"classes": summary, "options": asdict(self.options), "notes": self.notes}
        write_atomically(folder / "summary.json", json.dumps(content, indent=1, allow_nan=False).encode())


def evaluate_slide(
    found: Sequence[Annotation], truth: Sequence[Annotation], frame: Frame, options: EvaluateOptions | None = None
) -> tuple[Score, ...]:
    """Compare what was found on a slide with what was drawn, both in level-0 pixels.

    What is drawn as ``Ignore*`` does not count, neither for areas nor, where it covers most of them, for objects; nor does,
    on a slide with ``Region*``, what lies outside.
    """
    options, truth = options or EvaluateOptions(), _without_regions(truth, frame)
    drawn = sorted({a.class_name for a in truth if a.class_name is not None} - {IGNORED})
    names = options.classes or tuple(drawn)
    factor = (max(1.0, options.mpp / frame.mpp[0]), max(1.0, options.mpp / frame.mpp[1]))
    shape = (max(1, round(frame.size[1] / factor[1])), max(1, round(frame.size[0] / factor[0])))
    place = MapPlace.covering(frame, shape)
    labels = {name: number for number, name in enumerate(names, start=1)}
    ignore = len(labels) + 1
    maps = (Raster(found, place, shape, labels), Raster(truth, place, shape, {**labels, IGNORED: ignore}))
    overlaps = compare_maps(*maps, place, {number: name for name, number in labels.items()}, ignore=ignore)
    ignored = shapely.union_all([a.geometry for a in truth if a.class_name == IGNORED])
    scores = []
    for name in names:
        area = overlaps[name]
        score = Score(frame.slide, name, area.dice, area.iou, area.precision, area.recall, area.hd95_um)
        if options.objects:
            mine, true = (_objects(each, name, ignored) for each in (found, truth))
            seen = compare_objects(mine, true, frame.mpp)
            score = replace(
                score,
                object_f1=seen.f1,
                object_dice=seen.dice,
                object_hausdorff_um=seen.hausdorff_um,
                n_found=seen.n_found,
                n_true=seen.n_true,
            )
        scores.append(score)
    return tuple(scores)


def _without_regions(truth: Sequence[Annotation], frame: Frame) -> Sequence[Annotation]:
    """The same, with what lies outside of regions drawn as ``Ignore*``."""
    regions = [a.geometry for a in truth if a.class_name == REGION]
    if not regions:
        return truth
    outside = shapely.difference(shapely.box(0, 0, *frame.size), shapely.union_all(regions))
    return [*(a for a in truth if a.class_name != REGION), Annotation(outside, IGNORED)]


def _objects(annotations: Sequence[Annotation], name: str, ignored: shapely.Geometry) -> list[shapely.Geometry]:
    parts = [
        part
        for annotation in annotations
        if annotation.class_name == name
        for part in shapely.get_parts(annotation.geometry)
        if part.geom_type == "Polygon"
    ]
    if ignored.is_empty:
        return parts
    return [part for part in parts if shapely.intersection(part, ignored).area < part.area / 2]


def evaluate(
    out: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    options: EvaluateOptions | None = None,
    *,
    frame_of: Callable[[str], Frame | None] | None = None,
) -> Evaluation:
    """Compare a folder of results with a folder of annotations; files find each other by the slide's name.

    Args:
        out: holds ``.geojson`` (or ``.geojson.gz``) files, or masks as TIFF for slides without these; and maps of
            probabilities, where it was asked for them.
        truth: annotations of any kind that ``read_annotations`` knows.
        frame_of: finds the frame of a slide by its stem, for masks and for results that do not say it.

    Raises:
        UsageError: there are no results, or nothing says how large a slide is.
    """
    options = options or EvaluateOptions()
    results, left_out = _results(Path(out))
    if not results:
        raise UsageError(f"{out}: holds no results; give the folder that wsi segment run wrote GeoJSON or masks to")
    matches = match_annotations(results, truth)
    notes = [*left_out, *matches.report()]
    scores: list[Score] = []
    for stem, path in matches.files.items():
        known = frame_of(stem) if frame_of is not None else None
        found = read_annotations(results[stem], frame=known)
        frame = known or found.frame
        if frame is None:
            raise UsageError(
                f"{results[stem]}: does not say which slide it belongs to and how large that is; give the slides"
            )
        drawn = read_annotations(path, frame=frame)
        notes += [f"{stem}: {line}" for line in drawn.report()]
        shapes = with_class(drawn, options.classes)
        notes += [
            f"{stem}: {path.name}: {line}" for line in check_annotations(shapes, frame.size, options.classes or None)
        ]
        of_slide = evaluate_slide(with_class(found, options.classes), shapes, frame, options)
        heat = results[stem].with_name(stem + PROBABILITY)
        if heat.exists():
            of_slide = _calibrated(of_slide, ProbabilityMap.open(heat), _without_regions(shapes, frame))
        scores += of_slide
    if not scores:
        raise UsageError(f"{truth}: holds no annotations of the slides in {out}: {'; '.join(notes) or 'no shapes'}")
    return Evaluation(tuple(scores), options, tuple(notes))


class _Counting:
    """(H, W) probabilities of a class, NaN where ``Ignore*`` was drawn."""

    def __init__(self, heat: ProbabilityMap, name: str, ignored: Raster) -> None:
        self._array, self._ignored = heat.array, ignored
        self._channel = heat.classes.index(name)
        self.shape: tuple[int, ...] = ignored.shape
        self.chunks: tuple[int, ...] = heat.array.chunks[1:]

    def __getitem__(self, rows: slice) -> NDArray[np.floating[Any]]:
        values = np.array(self._array[self._channel, rows], np.float64)
        values[self._ignored[rows] == 1] = np.nan
        return values


def _calibrated(scores: Sequence[Score], heat: ProbabilityMap, truth: Sequence[Annotation]) -> tuple[Score, ...]:
    """The same, with how often what was said with a probability is so."""
    shape = (heat.array.shape[1], heat.array.shape[2])
    ignored = Raster(truth, heat.place, shape, {IGNORED: 1})
    found = []
    for score in scores:
        if score.class_name in heat.classes:
            drawn = Raster(truth, heat.place, shape, {score.class_name: 1})
            agreement = calibration(_Counting(heat, score.class_name, ignored), drawn, 1)
            found.append(replace(score, ece=agreement.ece, brier=agreement.brier))
        else:
            found.append(score)
    return tuple(found)


def _results(out: Path) -> tuple[dict[str, Path], list[str]]:
    """The file with each slide's result, by stem: polygons, else a mask; and lines about what is left out."""
    found: dict[str, Path] = {}
    left_out = []
    for suffixes in (_POLYGONS, _MASKS):
        for path in sorted(out.rglob("*")) if out.is_dir() else [out]:
            suffix = next((each for each in suffixes if path.name.lower().endswith(each)), None)
            if suffix is not None and not path.name.startswith("."):
                first = found.setdefault(path.name[: -len(suffix)], path)
                if first.parent != path.parent:
                    left_out.append(
                        f"{path}: left out, as {first} is of a slide of the same name; judge them one by one"
                    )
    return found, left_out
