"""ASAP XML: annotations to and from the files of the viewer ASAP, as in CAMELYON.

Coordinates are level-0 pixels of the full frame. A group is a class. ASAP knows no holes: they are written as polygons of
the group ``NAME (hole)``, which reading cuts out again.

Source: ``XmlRepository.cpp`` of ASAP.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final
from xml.etree.ElementTree import Element
from xml.sax.saxutils import quoteattr

import shapely

from wsi._files import replace_atomically
from wsi._holes import cut_out
from wsi._xml import parse_xml
from wsi.annotation import Annotation, class_color
from wsi.errors import AnnotationError
from wsi.geojson import ParsedFeatures, Rejection, Repair, parse_features

__all__ = ["parse_asap", "read_asap", "write_asap"]

_HOLE: Final = " (hole)"
_NO_CLASS_COLOR: Final = (244, 250, 88)  # ASAP's own yellow
_KINDS: Final = {
    "dot": "Point",
    "pointset": "MultiPoint",
    "measurement": "LineString",
    "polygon": "Polygon",
    "spline": "Polygon",
    "rectangle": "Polygon",
}


def read_asap(path: str | os.PathLike[str]) -> ParsedFeatures:
    """Read annotations from an ASAP XML file. What cannot be used is rejected, one by one.

    Groups within groups become derived classes, ``"Outer: Inner"``. The colour of a class is that of its group.

    Raises:
        AnnotationError: the file as a whole cannot be understood.
    """
    return parse_asap(parse_xml(Path(path)), str(path))


def parse_asap(root: Element, where: str) -> ParsedFeatures:
    """As ``read_asap``, of a file's root element."""
    if root.tag != "ASAP_Annotations":
        raise AnnotationError(f"{where}: is XML but not of ASAP (its root is {root.tag!r:.40})")
    groups = {group.get("Name", ""): group for group in root.iterfind("AnnotationGroups/Group")}
    items = list(root.iterfind("Annotations/Annotation"))
    annotations, rejected, repaired = parse_features([_feature(item, groups) for item in items])
    gone = {rejection.index for rejection in rejected}
    repaired += [
        Repair(i, "a spline is read as the polygon through its points")
        for i, item in enumerate(items)
        if i not in gone and item.get("Type", "").lower() == "spline"
    ]
    indices = [i for i in range(len(items)) if i not in gone]
    found, lost = _without_holes(annotations, indices)
    return ParsedFeatures(found, sorted([*rejected, *lost], key=_index), sorted(repaired, key=_index))


def _index(item: Rejection | Repair) -> int:
    return item.index


def _feature(item: Element, groups: dict[str, Element]) -> dict[str, Any]:
    kind = item.get("Type", "Polygon")
    points = sorted(item.iterfind("Coordinates/Coordinate"), key=_order)
    positions: list[Any] = [[point.get("X"), point.get("Y")] for point in points]
    geometry = _KINDS.get(kind.lower(), kind)
    coordinates: Any = positions
    if geometry == "Polygon":
        coordinates = [positions + positions[:1]]
    elif geometry == "Point":
        coordinates = positions[0] if positions else []
    group = item.get("PartOfGroup", "None")
    color = groups[group].get("Color") if group in groups else item.get("Color")
    return {
        "type": "Feature",
        "geometry": {"type": geometry, "coordinates": coordinates},
        "properties": {
            "name": item.get("Name") or None,
            "color": item.get("Color"),
            "classification": {"names": _class_names(group, groups), "color": color},
        },
    }


def _order(point: Element) -> float:
    try:
        return float(point.get("Order", "nan"))
    except ValueError:
        return 0.0


def _class_names(group: str, groups: dict[str, Element]) -> list[str]:
    """The group and those around it, outermost first; a group that is around itself ends the way."""
    names: list[str] = []
    while group != "None" and group not in names:
        names.insert(0, group)
        group = groups[group].get("PartOfGroup", "None") if group in groups else "None"
    return names


def _without_holes(annotations: list[Annotation], indices: list[int]) -> tuple[list[Annotation], list[Rejection]]:
    """Cut what is of a class ``NAME (hole)`` out of what is of class NAME."""
    left: dict[int, Annotation | None] = dict(zip(indices, annotations, strict=True))
    rejected = []
    for hole_class in sorted({a.class_name for a in annotations if a.class_name and a.class_name.endswith(_HOLE)}):
        holes = [i for i, a in left.items() if a is not None and a.class_name == hole_class]
        base = hole_class.removesuffix(_HOLE)
        around = [i for i, a in left.items() if a is not None and (a.class_name or "None") == base]
        cut = cut_out([_there(left[i]) for i in around], [_there(left[i]).geometry for i in holes])
        left.update(zip(around, cut.annotations, strict=True))
        rejected += [Rejection(i, "nothing is left of it beside its holes") for i in around if left[i] is None]
        rejected += [Rejection(holes[i], f"a hole of {base!r} that meets none") for i in cut.unused]
        left.update(dict.fromkeys(holes))
    return [annotation for annotation in left.values() if annotation is not None], rejected


def _there(annotation: Annotation | None) -> Annotation:
    assert annotation is not None
    return annotation


def write_asap(path: str | os.PathLike[str], annotations: Iterable[Annotation]) -> None:
    """Write annotations for ASAP, one after another as they come; the file is whole or not there.

    Polygons with two decimals, one per part. Measurements and metadata have no place in the format.
    """
    groups: dict[str, tuple[int, int, int]] = {}
    with replace_atomically(Path(path)) as file:
        file.write(b'<?xml version="1.0"?>\n<ASAP_Annotations>\n\t<Annotations>\n')
        for number, annotation in enumerate(annotations):
            for kind, xy, group in _pieces(annotation):
                if group is not None:
                    base = group.removesuffix(_HOLE)
                    groups.setdefault(base, annotation.color or class_color(base))
                    groups.setdefault(group, annotation.color or class_color(base))
                color = annotation.color or (_NO_CLASS_COLOR if group is None else groups[group])
                _write_piece(file, annotation.name or f"Annotation {number}", kind, xy, group or "None", color)
        file.write(b"\t</Annotations>\n\t<AnnotationGroups>\n")
        for name, color in groups.items():
            line = (
                f'\t\t<Group Name={quoteattr(name)} PartOfGroup="None" Color="{_hex(color)}"><Attributes /></Group>\n'
            )
            file.write(line.encode())
        file.write(b"\t</AnnotationGroups>\n</ASAP_Annotations>\n")


def _pieces(annotation: Annotation) -> Iterator[tuple[str, list[list[float]], str | None]]:
    """What ASAP has a type for: its type, its points, its group."""
    group = annotation.class_name
    for part in shapely.get_parts(annotation.geometry):
        match shapely.get_dimensions(part):
            case 0:
                yield "Dot", shapely.get_coordinates(part).tolist(), group
            case 1:
                yield "Measurement", shapely.get_coordinates(part).tolist(), group
            case _:
                shell, *holes = shapely.get_rings(part)
                yield "Polygon", shapely.get_coordinates(shell)[:-1].tolist(), group
                for hole in holes:
                    yield "Polygon", shapely.get_coordinates(hole)[:-1].tolist(), f"{group or 'None'}{_HOLE}"


def _write_piece(
    file: IO[bytes], name: str, kind: str, xy: list[list[float]], group: str, color: tuple[int, int, int]
) -> None:
    file.write(
        f'\t\t<Annotation Name={quoteattr(name)} Type="{kind}" PartOfGroup={quoteattr(group)} Color="{_hex(color)}">\n'
        f"\t\t\t<Coordinates>\n".encode()
    )
    for order, (x, y) in enumerate(xy):
        file.write(f'\t\t\t\t<Coordinate Order="{order}" X="{x:.2f}" Y="{y:.2f}" />\n'.encode())
    file.write(b"\t\t\t</Coordinates>\n\t\t</Annotation>\n")


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
