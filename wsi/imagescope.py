"""ImageScope XML: annotations from Aperio ImageScope, and from HALO, which writes nearly the same.

Coordinates are level-0 pixels. A layer is a class. Regions marked as negative are holes of their layer.

Sources: ``ImageScopeRepository.cpp`` of ASAP; files of both programs.
"""

import math
import os
from pathlib import Path
from typing import Any, Final
from xml.etree.ElementTree import Element

from wsi._holes import cut_out
from wsi._xml import parse_xml
from wsi.annotation import Annotation
from wsi.errors import AnnotationError
from wsi.geojson import ParsedFeatures, Rejection, Repair, parse_features

__all__ = ["parse_imagescope", "read_imagescope"]

_POINTS_OF_ELLIPSE: Final = 72
_LINES: Final = frozenset({"3", "4", "arrow", "ruler", "line", "polyline"})  # Type or GeoShape
_ELLIPSES: Final = frozenset({"2", "ellipse"})
_UNNAMED: Final = frozenset({"", "null", "none", "description"})


def read_imagescope(path: str | os.PathLike[str]) -> ParsedFeatures:
    """Read annotations from an ImageScope or HALO XML file. What cannot be used is rejected, region by region.

    The class is the layer's name; where it has none, the attribute that was typed in for it, else the region's own text.

    Raises:
        AnnotationError: the file as a whole cannot be understood.
    """
    return parse_imagescope(parse_xml(Path(path)), str(path))


def parse_imagescope(root: Element, where: str) -> ParsedFeatures:
    """As ``read_imagescope``, of a file's root element."""
    if root.tag != "Annotations":
        raise AnnotationError(f"{where}: is XML but not of ImageScope (its root is {root.tag!r:.40})")
    regions = [(layer, region) for layer in root.iterfind("Annotation") for region in layer.iterfind("Regions/Region")]
    notes: dict[int, str] = {}
    features = [_feature(layer, region, i, notes) for i, (layer, region) in enumerate(regions)]
    annotations, rejected, repaired = parse_features(features)
    gone = {rejection.index for rejection in rejected}
    repaired += [Repair(i, note) for i, note in notes.items() if i not in gone]
    indices = [i for i in range(len(regions)) if i not in gone]
    left: dict[int, Annotation | None] = dict(zip(indices, annotations, strict=True))
    for layer in root.iterfind("Annotation"):
        rejected += _cut_negatives(left, [i for i in indices if regions[i][0] is layer], regions)
    found = [annotation for annotation in left.values() if annotation is not None]
    return ParsedFeatures(found, sorted(rejected, key=lambda r: r.index), sorted(repaired, key=lambda r: r.index))


def _cut_negatives(
    left: dict[int, Annotation | None], of_layer: list[int], regions: list[tuple[Element, Element]]
) -> list[Rejection]:
    """Cut the negative regions of a layer out of its others; what met nothing, or is cut away, is rejected."""
    there = {i: annotation for i in of_layer if (annotation := left[i]) is not None}
    holes = [i for i in there if regions[i][1].get("NegativeROA", "0").lower() in ("1", "true")]
    areas = [i for i in there if i not in set(holes)]
    cut = cut_out([there[i] for i in areas], [there[i].geometry for i in holes])
    left.update(zip(areas, cut.annotations, strict=True))
    left.update(dict.fromkeys(holes))
    lost = [
        Rejection(i, "nothing is left of it beside the negative regions of its layer") for i in areas if left[i] is None
    ]
    return lost + [Rejection(holes[i], "a negative region that meets no other of its layer") for i in cut.unused]


def _feature(layer: Element, region: Element, index: int, notes: dict[int, str]) -> dict[str, Any]:
    points = [(v.get("X"), v.get("Y")) for v in region.iterfind("Vertices/*") if v.tag in ("Vertex", "V")]
    positions: list[Any] = [list(point) for point in points]
    kinds = {region.get("Type", "").lower(), region.get("GeoShape", "").lower()}
    geometry: dict[str, Any] = {"type": "Polygon", "coordinates": [positions + positions[:1]]}
    if kinds & _LINES:
        geometry = {"type": "LineString", "coordinates": positions}
    elif len(points) == 1:
        geometry = {"type": "Point", "coordinates": positions[0]}
    elif len(points) in (2, 4) and kinds & _ELLIPSES and (box := _box(points)):
        geometry["coordinates"] = [_ellipse(*box)]
        notes[index] = f"an ellipse is read as a polygon of {_POINTS_OF_ELLIPSE} points"
    elif len(points) == 2 and (box := _box(points)):
        x0, y0, x1, y1 = box
        geometry["coordinates"] = [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]
    text = region.get("Text", "")
    class_name = _layer_name(layer) or ("" if text.lower() in _UNNAMED else text)
    return {
        "type": "Feature",
        "geometry": geometry,
        "properties": {
            "name": None if text.lower() in _UNNAMED else text,
            "classification": {"name": class_name, "color": _color(layer.get("LineColor", ""))} if class_name else None,
            "color": _color(layer.get("LineColor", "")),
        },
    }


def _layer_name(layer: Element) -> str:
    if (name := layer.get("Name", "")).lower() not in _UNNAMED:
        return name
    for attribute in layer.iterfind("Attributes/Attribute"):
        for text in (attribute.get("Value", ""), attribute.get("Name", "")):
            if text.lower() not in _UNNAMED:
                return text
    return ""


def _color(text: str) -> list[int] | None:
    """Red, green and blue of a Windows colour, whose lowest byte is red."""
    try:
        value = int(text)
    except ValueError:
        return None
    return [value & 255, value >> 8 & 255, value >> 16 & 255]


def _box(points: list[tuple[str | None, str | None]]) -> tuple[float, float, float, float] | None:
    """The box around two or four points; None where they are no numbers, which parsing then tells."""
    try:
        x, y = zip(*((float(x or ""), float(y or "")) for x, y in points), strict=True)
    except ValueError:
        return None
    return min(x), min(y), max(x), max(y)


def _ellipse(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    """The ellipse in a box; its points are a hair outside, so that the areas are equal."""
    step = 2 * math.pi / _POINTS_OF_ELLIPSE
    grow = math.sqrt(step / math.sin(step))
    rx, ry = (x1 - x0) / 2 * grow, (y1 - y0) / 2 * grow
    ring = [
        [(x0 + x1) / 2 + rx * math.cos(i * step), (y0 + y1) / 2 + ry * math.sin(i * step)]
        for i in range(_POINTS_OF_ELLIPSE)
    ]
    return [*ring, ring[0]]
