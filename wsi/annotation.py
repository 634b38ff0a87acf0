"""Annotation: a shape on a slide, what it is called, what it measures and how it is drawn.

Coordinates are level-0 pixels ``(x, y)`` of the slide's full frame, y pointing down.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final, Literal, get_args
from uuid import UUID

import numpy as np
import shapely

from wsi.errors import AnnotationError

__all__ = [
    "Annotation",
    "ObjectType",
    "canonical_class_name",
    "canonical_wkb",
    "check_inside",
    "class_color",
    "content_id",
    "tissue_annotations",
]

ObjectType = Literal["annotation", "detection", "tile", "cell", "tmaCore"]
_OBJECT_TYPES: Final = frozenset(get_args(ObjectType))

# Never change it: every id ever written depends on it.
_NAMESPACE: Final = UUID("8c2f4f0e-5d0b-5f0c-9d5c-1b7d3f5a9e61")


@dataclass(frozen=True, slots=True)
class Annotation:
    """A shape with a class, a name and measurements. Frozen; checks itself when made.

    ``geometry`` is any shapely geometry that is not empty. It may be invalid (self-crossing, NaN): writing repairs it
    and says so. Words follow QuPath: ``object_type`` says which kind of object it becomes there, ``class_name`` is the
    classification, its parts joined by ``": "`` (``"Tumor: Positive"``), ``nucleus`` the second outline of a cell.

    ``color`` is RGB, 0 to 255: that of the class where there is one, else that of this shape. None means
    ``class_color(class_name)``. ``measurements`` may hold NaN, which is never written.

    Raises:
        AnnotationError: a field does not hold what it should.
    """

    geometry: shapely.Geometry
    class_name: str | None = None
    _: KW_ONLY
    color: tuple[int, int, int] | None = None
    measurements: Mapping[str, float] = field(default_factory=dict, hash=False)
    name: str | None = None
    object_type: ObjectType = "annotation"
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    is_locked: bool = False
    nucleus: shapely.Geometry | None = None

    def __post_init__(self) -> None:
        for shape in (self.geometry,) if self.nucleus is None else (self.geometry, self.nucleus):
            if not isinstance(shape, shapely.Geometry) or shape.is_empty:
                raise AnnotationError(f"an annotation needs a shape that is not empty, not {shape!r}")
        if self.object_type not in _OBJECT_TYPES:
            raise AnnotationError(f"object type {self.object_type!r} is none of {', '.join(sorted(_OBJECT_TYPES))}")
        if self.nucleus is not None and self.object_type != "cell":
            raise AnnotationError(f"only a cell has a nucleus, not the object type {self.object_type!r}")
        if self.class_name is not None and self.class_name != (wanted := canonical_class_name(self.class_name)):
            raise AnnotationError(f"class name {self.class_name!r}: write it as {wanted!r}")
        if not isinstance(self.name, str | None):
            raise AnnotationError(f"name {self.name!r} is not text")
        if self.color is not None:
            object.__setattr__(self, "color", _checked_color(self.color))
        object.__setattr__(self, "measurements", _checked_measurements(self.measurements))
        if not all(isinstance(text, str) for item in self.metadata.items() for text in item):
            raise AnnotationError(f"metadata maps text to text, not {self.metadata!r}")
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def id(self) -> UUID:
        """UUID of the geometry to 0.01 px, the object type, class and name; the same on every machine.

        Measurements, colour and metadata do not enter: a shape that is scored or coloured anew stays the same object.
        """
        return content_id(canonical_wkb(self.geometry), self.object_type, self.class_name, self.name)


def canonical_wkb(shapes: Any) -> Any:
    """Bytes that are the same for equal shapes, to 0.01 px and whatever the order of rings and points.

    ``shapes`` is one shape, for which ``bytes`` are returned, or an array of them, for which an array of ``bytes`` is.
    """
    with np.errstate(invalid="ignore"):  # a NaN coordinate is a fault of the shape, not of this sum
        rounded = shapely.transform(shapes, lambda xy: np.round(xy, 2) + 0.0)  # + 0.0: no negative zero
    return shapely.to_wkb(shapely.normalize(rounded), byte_order=1)


def content_id(wkb: bytes, *words: str | None) -> UUID:
    """UUID (version 5) of the ``canonical_wkb`` of a shape together with some words."""
    digest = hashlib.sha1(_NAMESPACE.bytes, usedforsecurity=False)
    digest.update(wkb)
    for word in words:
        digest.update(b"\0" if word is None else b"\1" + word.encode("utf-8", "surrogatepass") + b"\0")
    return UUID(bytes=digest.digest()[:16], version=5)


def canonical_class_name(name: str) -> str | None:
    """Return a class name as QuPath keeps it: parts joined by ``": "``, none blank, no line breaks; or None."""
    parts = (" ".join(part.split()) for part in name.split(":"))
    return ": ".join(part for part in parts if part) or None


def _checked_color(color: Any) -> tuple[int, int, int]:
    try:
        red, green, blue = (int(value) for value in color)
        exact = (red, green, blue) == tuple(color)
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or not all(0 <= value <= 255 for value in (red, green, blue)):
        raise AnnotationError(f"a colour is three whole numbers from 0 to 255, not {color!r}")
    return red, green, blue


def _checked_measurements(measurements: Mapping[str, Any]) -> dict[str, float]:
    checked = {}
    for name, value in measurements.items():
        if not isinstance(name, str) or not name:
            raise AnnotationError(f"a measurement needs a name, not {name!r}")
        try:
            checked[name] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise AnnotationError(f"measurement {name!r} is no number: {value!r}") from error
    return checked


# Colours that red-green colour-blind people tell apart, and that stand out on pink and purple: Okabe & Ito, Color
# Universal Design, 2008.
_KNOWN_COLORS: Final[Mapping[str, tuple[int, int, int]]] = {
    "tissue": (0, 158, 115),
    "tumor": (213, 94, 0),
    "tumour": (213, 94, 0),
    "stroma": (86, 180, 233),
    "immune cells": (0, 114, 178),
    "necrosis": (64, 64, 64),
    "normal": (240, 228, 66),
    "positive": (213, 94, 0),
    "negative": (0, 114, 178),
    "other": (230, 159, 0),
    "region*": (0, 0, 0),
    "ignore*": (153, 153, 153),
}

# For all other names: the "muted" scheme of Paul Tol, SRON technical note EPS/TN/09-002, plain and half way to white.
_MUTED: Final = (
    *((51, 34, 136), (136, 204, 238), (68, 170, 153), (17, 119, 51), (153, 153, 51)),
    *((221, 204, 119), (204, 102, 119), (136, 34, 85), (170, 68, 153)),
)
_HASHED_COLORS: Final = _MUTED + tuple(((r + 255) // 2, (g + 255) // 2, (b + 255) // 2) for r, g, b in _MUTED)


def class_color(name: str) -> tuple[int, int, int]:
    """RGB, 0 to 255, of a class: fixed for common names (in any case), drawn from the name by a hash for others.

    The same name has the same colour in every file, on every machine. Two rare names may share one: there are 18.
    """
    key = name.casefold()
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return _KNOWN_COLORS.get(key) or _HASHED_COLORS[int.from_bytes(digest[:8], "big") % len(_HASHED_COLORS)]


def tissue_annotations(polygons: Iterable[shapely.Geometry], mpp: tuple[float, float]) -> tuple[Annotation, ...]:
    """Name tissue outlines "Tissue 1", "Tissue 2", … in the order given and measure them.

    Args:
        polygons: Polygon or MultiPolygon each, level-0 pixels.
        mpp: microns per level-0 pixel along x and y.
    """
    to_mm = np.asarray(mpp, dtype=np.float64) / 1000
    shapes = list(polygons)
    in_mm = [shapely.transform(shape, lambda xy: xy * to_mm) for shape in shapes]
    return tuple(
        Annotation(
            shape,
            "Tissue",
            name=f"Tissue {number}",
            measurements={"Area mm^2": shapely.area(scaled), "Perimeter mm": shapely.length(scaled)},
        )
        for number, (shape, scaled) in enumerate(zip(shapes, in_mm, strict=True), start=1)
    )


def check_inside(annotations: Sequence[Annotation], size: tuple[int, int]) -> str | None:
    """Say in one line why annotations seem not to belong to a slide of this size; None if they do.

    They seem not to if more than half of their area (of their length, of their number, where there is no area) lies
    outside, or if every coordinate could be a longitude and latitude. ``size`` is (width, height) in level-0 pixels.
    """
    shapes = np.array([annotation.geometry for annotation in annotations], dtype=object)
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    finite = np.ones(len(shapes), dtype=bool)
    finite[owner[~np.isfinite(xy).all(axis=1)]] = False
    shapes = shapes[finite]
    if not len(shapes):
        return None
    x0, y0, x1, y1 = shapely.total_bounds(shapes)
    width, height = size
    if max(-x0, x1) <= 180 and max(-y0, y1) <= 90 and width > 360 and height > 180:
        return (
            "every coordinate lies within ±180 and ±90: are these degrees of longitude and latitude? "
            "Coordinates must be level-0 pixels"
        )
    share = _share_outside(shapes, size)
    if share <= 0.5:
        return None
    if x1 - x0 <= width and y1 - y0 <= height:
        shift = [_shift_inside(x0, x1, width), _shift_inside(y0, y1, height)]
        remedy = f"moving the origin by ({shift[0]:+.0f}, {shift[1]:+.0f}) px would bring all of it inside"
    else:
        remedy = "it is larger than the slide, so look for another slide or another resolution"
    return (
        f"{share:.0%} of what is annotated lies outside the slide of {width} x {height} px: origin mismatch? {remedy}"
    )


@np.errstate(all="ignore")  # GEOS leaves floating-point flags behind, which numpy would report as warnings
def _share_outside(shapes: Any, size: tuple[int, int]) -> float:
    shapes = np.where(shapely.is_valid(shapes), shapes, shapely.envelope(shapes))  # near enough for a hint
    bounds = shapely.bounds(shapes)  # (N, 4): x0, y0, x1, y1
    inside = (bounds[:, :2] >= 0).all(axis=1) & (bounds[:, 2:] <= size).all(axis=1)
    clipped = shapely.intersection(shapes[~inside], shapely.box(0, 0, *size))
    for amount in (shapely.area, shapely.length, shapely.get_num_coordinates):
        if (total := amount(shapes).sum()) > 0:
            return float(1 - (amount(shapes[inside]).sum() + amount(clipped).sum()) / total)
    return 0.0


def _shift_inside(low: float, high: float, length: int) -> float:
    return -low if low < 0 else min(0.0, length - high)
