"""QuPath's GeoJSON import in pure Python: what it takes, what makes it give up a file, and where things then lie.

Follows ``PathIO.readObjectsFromGeoJSON``, ``QuPathTypeAdapters``, ``ROITypeAdapters``, ``GsonTools`` and ``PathClass``
of the releases in ``VERSIONS``. As there, one object that cannot be parsed aborts the import of its whole file. GEOS
stands in for JTS, of which it is a port. Where JTS sometimes gets away with a polygon that is not valid, this does not;
that JTS throws for about one in a thousand valid slivers, whose points its snapping moves, is not modelled.
"""

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import shapely

VERSIONS = ("0.4", "0.5", "0.6", "0.7")

_TYPES = {
    "annotation": "annotation",
    "detection": "detection",
    "tile": "tile",
    "cell": "cell",
    "tmaCore": "tmaCore",
    "tma_core": "tmaCore",
    "root": "root",
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathTileObject": "tile",
    "PathCellObject": "cell",
    "TMACoreObject": "tmaCore",
    "PathRootObject": "root",
}
_GEOMETRIES = {"Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection"}


class ImportFailedError(Exception):
    """QuPath throws; nothing of the file is imported."""


@dataclass(frozen=True)
class PathObject:
    """One imported object. ``shape`` is in the pixels QuPath shows: the cropped slide's, not level 0's full frame."""

    shape: Any
    object_type: str
    uid: UUID | None
    class_names: tuple[str, ...]
    class_color: tuple[int, ...] | None
    name: str | None
    color: tuple[int, ...] | None
    measurements: dict[str, float]
    metadata: dict[str, str]
    is_locked: bool
    nucleus: Any
    children: tuple["PathObject", ...]


def in_full_frame(shape: Any, bounds_xy: tuple[float, float]) -> Any:
    """Where a shape lies on the slide: QuPath's OpenSlide server reads level 0 at ``(x + bounds-x, y + bounds-y)``."""
    return shapely.transform(shape, lambda xy: xy + bounds_xy)


def import_objects(data: bytes, version: str) -> list[PathObject]:
    """What *File > Import objects* makes of the (unpacked) bytes of a file.

    Raises:
        ImportFailedError: it throws.
    """
    # 0.4 decodes with the charset of the machine: on Windows with the Java 17 it comes with, not UTF-8.
    text = data.decode("cp1252" if version == "0.4" else "utf-8", errors="replace")
    return _objects(json.loads(text), version)


def _objects(element: Any, version: str) -> list[PathObject]:
    if isinstance(element, list):
        return [found for item in element for found in _objects(item, version)]
    if not isinstance(element, dict) or "type" not in element:
        return []
    kind = _string(element["type"])
    if kind == "Feature":
        return [_feature(element, version)]
    if kind == "FeatureCollection":
        features = element.get("features")
        return [_feature(item, version) for item in features] if isinstance(features, list) else []
    if kind in _GEOMETRIES:
        return [_feature({"geometry": element}, version)]
    return []


def _feature(item: Any, version: str) -> PathObject:
    _require(isinstance(item, dict), f"not a feature: {item!r}")
    kind, uid = "unknown", None
    if "id" in item:
        text = _string(item["id"])
        if text in _TYPES and text[0].isupper():
            kind = text
        else:
            uid = _uuid(text)
    shape = _roi(item.get("geometry"), version)
    properties = item.get("properties", {})
    _require(isinstance(properties, dict), "properties are no object")
    for alias in ("objectType", "object_type", "type"):
        if alias in properties:
            kind = _string(properties[alias])
            break
    children = properties.get("childObjects" if "childObjects" in properties else "children")
    names, class_color = _path_class(properties["classification"]) if "classification" in properties else ((), None)
    metadata = properties.get("metadata")
    return PathObject(
        shape=shape,
        object_type=_TYPES.get(kind, "annotation"),
        uid=uid,
        class_names=names,
        class_color=class_color,
        name=_string(properties["name"]) if "name" in properties else None,
        color=_object_color(properties["color"]) if "color" in properties else None,
        measurements=_measurements(properties.get("measurements"), version),
        metadata={key: _string(value) for key, value in metadata.items() if not isinstance(value, dict | list | None)}
        if isinstance(metadata, dict)
        else {},
        is_locked=properties.get("isLocked") is True,
        nucleus=_roi(item["nucleusGeometry"], version) if "nucleusGeometry" in item else None,
        children=tuple(_feature(child, version) for child in children) if isinstance(children, list) else (),
    )


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _path_class(value: Any) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    if value is None:
        return (), None
    if isinstance(value, str):
        return _class_names(value.split(":")), None
    _require(isinstance(value, dict), "Unable to parse PathClass")
    if not value or "colorRGB" in value or "parentClass" in value:  # as gson wrote it before 0.4
        names = [] if value.get("parentClass") is None else list(_path_class(value["parentClass"])[0])
        return tuple(names + ([value["name"]] if value.get("name") is not None else [])), _unpacked(
            value.get("colorRGB")
        )
    _require(("name" in value or "names" in value) and "color" in value, "Unable to parse PathClass")
    color = value["color"]
    _require(isinstance(color, list) and all(map(_is_integer, color)), "color is no int[]")
    _require(len(color) in (0, 1, 3, 4), "RGB array should have length 0, 1, 3 or 4")
    if value.get("name") is not None:
        return _class_names(_string(value["name"]).split(":")), tuple(map(int, color))
    names = value.get("names") or []
    _require(all(isinstance(name, str) and ":" not in name for name in names), "a part of the class holds a colon")
    return _class_names(names), tuple(map(int, color))


def _class_names(names: list[str]) -> tuple[str, ...]:
    stripped = [name.strip() for name in names]
    _require(all(stripped), "Requested PathClass name cannot be blank!")
    _require(not any(mark in name for name in stripped for mark in "\n\r:"), "is not a valid PathClass name!")
    return tuple(stripped)


def _unpacked(value: Any) -> tuple[int, ...] | None:
    return None if value is None else ((int(value) >> 16) & 255, (int(value) >> 8) & 255, int(value) & 255)


def _object_color(value: Any) -> tuple[int, ...] | None:
    _require(value is not None, "NullPointerException")
    if not isinstance(value, list):
        _require(_is_integer(value), f"NumberFormatException: {value!r}")
        return _unpacked(value)
    return tuple(int(_number(part)) for part in value) if len(value) == 3 else None


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and float(value).is_integer()


def _measurements(value: Any, version: str) -> dict[str, float]:
    if isinstance(value, list):
        _require(all(isinstance(item, dict) and "name" in item and "value" in item for item in value), "no name, value")
        return {_string(item["name"]): _measured(item["value"], version) for item in value}
    if isinstance(value, dict):
        return {name: _measured(number, version) for name, number in value.items()}
    return {}


def _measured(value: Any, version: str) -> float:
    number = _number(value)
    _require(version != "0.4" or (isinstance(value, int | float) and np.isfinite(number)), "ClassCastException")
    return number


def _string(element: Any) -> str:
    if isinstance(element, list) and len(element) == 1:
        return _string(element[0])
    _require(element is not None and not isinstance(element, dict | list), "UnsupportedOperationException")
    return ("true" if element else "false") if isinstance(element, bool) else str(element)


def _number(element: Any) -> float:
    try:
        return float(_string(element))
    except ValueError as error:
        raise ImportFailedError(f"NumberFormatException: {element!r}") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ImportFailedError(message)


# Shapes


def _roi(value: Any, version: str) -> Any:
    _require(isinstance(value, dict), "geometry is null")
    _plane(value["plane"]) if "plane" in value else None
    shape = _geometry(value, version)
    if value.get("isEllipse") is True:
        x0, y0, x1, y1 = shape.bounds
        circle = shapely.Point(0, 0).buffer(1)
        return shapely.transform(
            circle, lambda xy: xy * ((x1 - x0) / 2, (y1 - y0) / 2) + ((x0 + x1) / 2, (y0 + y1) / 2)
        )
    return _reduced(shape) if version >= "0.6" else shape


def _plane(value: Any) -> None:
    _require(isinstance(value, dict) and set(value) <= {"c", "z", "t"}, "unknown keys are not skipped in a plane")
    _require(all(map(_is_integer, value.values())), "a plane counts in whole numbers")


def _reduced(shape: Any) -> Any:
    """Coordinates in 32 bits, then the precision model with a grid of 0.01: throws for a polygon that is not valid."""
    kept = shapely.transform(shape, lambda xy: xy.astype(np.float32).astype(np.float64))
    if shapely.get_dimensions(kept) == 2:
        _require(kept.is_valid, f"Reduction failed, possible invalid input: {shapely.is_valid_reason(kept)}")
    reduced = shapely.set_precision(kept, 0.01)
    _require(not reduced.is_empty, "nothing is left: an empty ROI")
    return shapely.transform(reduced, lambda xy: xy)


def _geometry(value: dict[str, Any], version: str) -> Any:
    _require("type" in value, "geometry without type")
    kind = _string(value["type"])
    if kind == "GeometryCollection":
        _require(version < "0.6", "a GeometryCollection has no coordinates")
        parts = [_geometry(part, version) for part in value["geometries"]]
        areas = [part for part in parts if shapely.get_dimensions(part) == 2]
        return shapely.union_all(areas) if areas else shapely.GeometryCollection(parts)
    _require(kind in _GEOMETRIES, f"No Geometry type found for {kind}")
    coordinates = value.get("coordinates")
    _require(isinstance(coordinates, list), "geometry without coordinates")
    match kind.removeprefix("Multi"):
        case "Point":
            build, join, single = _point, shapely.MultiPoint, kind == "Point"
        case "LineString":
            build, join, single = _line, shapely.MultiLineString, kind == "LineString"
        case _:
            build, join, single = _polygon, shapely.MultiPolygon, kind == "Polygon"
    return build(coordinates) if single else join([build(part) for part in coordinates or []])


def _point(value: Any) -> Any:
    return shapely.Point(_position(value))


def _position(value: Any) -> tuple[float, float]:
    _require(isinstance(value, list) and len(value) >= 2, f"not a position: {value!r}")
    x, y, *_ = (_number(number) for number in value)
    _require(bool(np.isfinite([x, y]).all()), f"not finite: {value!r}")
    return x, y


def _positions(value: Any) -> list[tuple[float, float]]:
    _require(isinstance(value, list), f"not positions: {value!r}")
    return [_position(position) for position in value]


def _line(value: Any) -> Any:
    positions = _positions(value)
    _require(len(positions) != 1, "Invalid number of points in LineString (found 1 - must be 0 or >= 2)")
    return shapely.LineString(positions)


def _polygon(value: Any) -> Any:
    _require(isinstance(value, list), f"not rings: {value!r}")
    rings = [_ring(ring) for ring in value]
    return shapely.Polygon(rings[0], rings[1:]) if rings else shapely.Polygon()


def _ring(value: Any) -> Any:
    positions = _positions(value)
    _require(not positions or positions[0] == positions[-1], "Points of LinearRing do not form a closed linestring")
    _require(not positions or len(positions) >= 4, "Invalid number of points in LinearRing (must be 0 or >= 4)")
    return shapely.LinearRing(positions)
