"""Holes: shapes that a file lists beside those they are cut out of."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import shapely

from wsi.annotation import Annotation

__all__ = ["CutOut", "cut_out"]


class CutOut(NamedTuple):
    """What is left of each annotation, None where that is nothing; and which holes met none of them."""

    annotations: list[Annotation | None]
    unused: list[int]


@np.errstate(all="ignore")  # GEOS leaves floating-point flags behind, which numpy would report as warnings
def cut_out(annotations: Sequence[Annotation], holes: Sequence[shapely.Geometry]) -> CutOut:
    """Cut holes out of all areas they meet. Shapes are valid; points and lines are left as they are."""
    if not holes:
        return CutOut(list(annotations), [])
    tree = shapely.STRtree(list(holes))
    used: set[int] = set()
    left: list[Annotation | None] = []
    for annotation in annotations:
        found = tree.query(annotation.geometry, predicate="intersects").tolist()
        if shapely.get_dimensions(annotation.geometry) != 2 or not found:
            left.append(annotation)
            continue
        used.update(found)
        rest = shapely.difference(annotation.geometry, shapely.union_all([holes[i] for i in found]))
        parts = [part for part in shapely.get_parts(rest) if part.geom_type == "Polygon" and not part.is_empty]
        shape = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
        left.append(replace(annotation, geometry=shape) if parts else None)
    return CutOut(left, sorted(set(range(len(holes))) - used))
