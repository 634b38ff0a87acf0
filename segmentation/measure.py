"""ClassSummary: what was found of each class, counted and measured; tables as CSV."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from wsi._files import nan_as_none, write_table
from wsi.annotation import Annotation

__all__ = ["ClassSummary", "summarize", "write_areas_csv", "write_objects_csv", "write_summary_csv"]


@dataclass(frozen=True)
class ClassSummary:
    """All pieces of one class together.

    Attributes:
        name: of the class; empty for pieces without one.
        count: how many pieces.
        area_mm2: their area in all.
        mean_area_um2, median_area_um2: of a piece.
        perimeter_mm: of all outlines, holes included.
        tissue_share: area by area of tissue; NaN where that is not known.
        per_mm2: pieces a square millimetre of tissue; NaN where that is not known.
    """

    name: str
    count: int
    area_mm2: float
    mean_area_um2: float
    median_area_um2: float
    perimeter_mm: float
    tissue_share: float
    per_mm2: float

    def as_json(self) -> dict[str, Any]:
        """By name; what is not known is None."""
        return nan_as_none(asdict(self))

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "ClassSummary":
        """What ``as_json`` gave."""
        known: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
        return cls(**known)


def summarize(
    annotations: Sequence[Annotation], mpp: tuple[float, float], *, tissue_mm2: float | None = None
) -> tuple[ClassSummary, ...]:
    """What was found of each class, by name. A piece is a polygon: an annotation of several parts counts as several.

    Args:
        mpp: microns per level-0 pixel in x and y.
        tissue_mm2: the area of tissue that densities refer to.
    """
    names = [annotation.class_name or "" for annotation in annotations]
    parts, owner = shapely.get_parts([annotation.geometry for annotation in annotations], return_index=True)
    in_um = shapely.transform(parts, lambda xy: xy * np.array(mpp))
    areas, perimeters = shapely.area(in_um), shapely.length(in_um)
    class_of = np.array(names, dtype=object)[owner]
    tissue = math.nan if tissue_mm2 is None else tissue_mm2
    summaries = []
    for name in sorted(set(names)):
        area, perimeter = areas[class_of == name], perimeters[class_of == name]
        total = float(area.sum()) / 1e6
        summaries.append(
            ClassSummary(
                name=name,
                count=len(area),
                area_mm2=total,
                mean_area_um2=float(area.mean()),
                median_area_um2=float(np.median(area)),
                perimeter_mm=float(perimeter.sum()) / 1000,
                tissue_share=total / tissue if tissue > 0 else math.nan,
                per_mm2=len(area) / tissue if tissue > 0 else math.nan,
            )
        )
    return tuple(summaries)


def write_summary_csv(path: str | os.PathLike[str], summaries: Iterable[ClassSummary]) -> None:
    """Write a row a class; what is not known is left empty. The file is whole or not there."""
    rows = ([_cell(value) for value in astuple(summary)] for summary in summaries)
    write_table(Path(path), [field.name for field in fields(ClassSummary)], rows)


def write_areas_csv(path: str | os.PathLike[str], areas: Iterable[tuple[str, ClassSummary]]) -> None:
    """Write a row a slide and class; what is not known is left empty. The file is whole or not there."""
    rows = ([slide, *(_cell(value) for value in astuple(summary))] for slide, summary in areas)
    write_table(Path(path), ["slide", "class", *(field.name for field in fields(ClassSummary)[1:])], rows)


def write_objects_csv(path: str | os.PathLike[str], annotations: Sequence[Annotation]) -> None:
    """Write a row an annotation: id, class, centre in level-0 pixels and every measurement that any of them has."""
    names = list(dict.fromkeys(name for annotation in annotations for name in annotation.measurements))
    centres = shapely.get_coordinates(shapely.centroid([annotation.geometry for annotation in annotations]))
    rows = (
        [
            str(annotation.id),
            annotation.class_name or "",
            *(f"{value:.2f}" for value in centre),
            *(_cell(annotation.measurements.get(name, math.nan)) for name in names),
        ]
        for annotation, centre in zip(annotations, centres, strict=True)
    )
    write_table(Path(path), ["id", "class", "x", "y", *names], rows)


def _cell(value: str | float) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return str(value)
