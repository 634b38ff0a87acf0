"""Results: what was found on a slide as files people open: outlines, a mask, a picture, areas."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import shapely

from segmentation.blend import WritableMap
from segmentation.heat import Corners, write_map
from segmentation.masks import write_ome_tiff, write_ome_zarr
from segmentation.measure import ClassSummary, summarize, write_objects_csv
from segmentation.objects import find_objects
from segmentation.polygons import PolygonOptions, find_polygons
from segmentation.sampling import BACKGROUND
from segmentation.segmenter import Found
from wsi.annotation import Annotation
from wsi.asap import write_asap
from wsi.errors import UsageError
from wsi.geojson import Frame, write_geojson
from wsi.picture import draw_areas, write_picture
from wsi.slide import Slide

__all__ = ["FORMATS", "PROBABILITY", "ResultOptions", "Results", "outlines_of", "tissue_area_mm2", "write_results"]

FORMATS = ("geojson", "mask", "picture", "asap", "ome-zarr", "objects", "probability")
PROBABILITY: Final = ".probability.zarr"
_MANY = 20_000  # polygons, from which on GeoJSON is compressed
_PICTURE_PX = 2048
_STRIP_PX = 256


@dataclass(frozen=True)
class ResultOptions:
    """What is written of a slide; saved with it.

    Attributes:
        polygons: how the label map becomes outlines.
        formats: of ``FORMATS``: ``geojson`` for QuPath, ``mask`` as pyramidal OME-TIFF, ``picture`` of the slide with the
            areas on it, ``asap`` XML, ``ome-zarr`` label image, ``objects``: a table with a row a piece, ``probability``: of each
            class, in Zarr, as ``segmentation.heat.ProbabilityMap`` opens it.
    """

    polygons: PolygonOptions = field(default_factory=PolygonOptions)
    formats: tuple[str, ...] = ("geojson", "mask", "picture")

    def __post_init__(self) -> None:
        unknown = set(self.formats) - set(FORMATS)
        if unknown or not self.formats:
            raise UsageError(f"formats are of {', '.join(FORMATS)}, and one at least; got {', '.join(self.formats)}")


@dataclass(frozen=True)
class Results:
    """What was written of a slide.

    Attributes:
        files: names below the folder of results.
        areas: of each class that was found.
        n_objects: outlines in all.
    """

    files: tuple[str, ...]
    areas: tuple[ClassSummary, ...]
    n_objects: int


def outlines_of(found: Found, options: PolygonOptions) -> list[Annotation]:
    """The pieces that were found as annotations with area, perimeter and mean probability, in level-0 pixels."""
    if found.objects is not None:
        return list(find_objects(found, found.objects, options))
    return list(find_polygons(found.labels, found.place, found.classes, options, probabilities=found.probability))


def write_results(
    stem: Path,
    slide: Slide,
    found: Found,
    annotations: Sequence[Annotation],
    options: ResultOptions,
    *,
    tissue_mm2: float | None = None,
) -> Results:
    """Write a slide's files, named as ``stem`` with their suffixes; each is whole or not there, and replaces an older one.

    Args:
        annotations: as ``outlines_of`` gives them.
        tissue_mm2: the area of tissue that densities refer to.
    """
    files: list[Path] = []

    def name(suffix: str) -> Path:
        files.append(stem.with_name(stem.name + suffix))
        return files[-1]

    stem.parent.mkdir(parents=True, exist_ok=True)
    if "geojson" in options.formats:
        many = len(annotations) >= _MANY
        stem.with_name(stem.name + (".geojson" if many else ".geojson.gz")).unlink(missing_ok=True)  # of another run
        write_geojson(name(".geojson.gz" if many else ".geojson"), annotations, slide.frame)
    if "mask" in options.formats:
        write_ome_tiff(name(".ome.tif"), found.labels, found.place, found.classes)
    if "ome-zarr" in options.formats:
        path = name(".ome.zarr")
        if path.exists():
            shutil.rmtree(path)
        write_ome_zarr(path, found.labels, found.place, found.classes)
    if "probability" in options.formats:
        path = name(PROBABILITY)
        if path.exists():
            shutil.rmtree(path)
        _write_probability(path, slide, found)
    if "asap" in options.formats:
        write_asap(name(".xml"), annotations)
    if "objects" in options.formats:
        write_objects_csv(name(".objects.csv"), annotations)
    if "picture" in options.formats:
        view = slide.overview(max_px=min(_PICTURE_PX, max(slide.size)))
        write_picture(name(".jpg"), draw_areas(view, annotations))
    areas = summarize(annotations, slide.mpp.xy, tissue_mm2=tissue_mm2) if annotations else ()
    return Results(tuple(path.name for path in files), areas, len(annotations))


def _write_probability(path: Path, slide: Slide, found: Found) -> None:
    kinds = [label for label in found.classes if label != found.rim]
    shape = found.probabilities.shape

    def fill(out: WritableMap) -> Corners:
        for top in range(0, shape[1], _STRIP_PX):
            rows = slice(top, min(shape[1], top + _STRIP_PX))
            values = np.array(found.probabilities[:, rows], np.float32)
            if found.rim is not None:  # is a part of the likeliest object
                best = np.take(kinds, values[kinds].argmax(0))[None]
                np.put_along_axis(values, best, np.take_along_axis(values, best, 0) + values[[found.rim]], 0)
            out[:, rows] = values[[0, *kinds]]
        return ()

    names = (BACKGROUND, *(found.classes[label] for label in kinds))
    facts = {"mpp": found.place.pixel_um[0], "patch_px": 1, "options": {"steps": 1}, "patches": 0}
    write_map(path, slide, found.place, names, fill, facts, shape=(shape[1], shape[2]), dtype="float16")


def tissue_area_mm2(tissue: Sequence[Annotation], frame: Frame) -> float:
    """The area of tissue outlines, holes left out."""
    x_um, y_um = frame.mpp
    return float(sum(shapely.area(each.geometry) for each in tissue)) * x_um * y_um / 1e6
