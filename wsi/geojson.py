"""GeoJSON: annotations to and from the files that QuPath reads and writes.

What is written imports in QuPath 0.4 to 0.7, which give up a whole file for one shape or one null they do not like:
every shape is put on a grid of 0.01 px, made valid there, and checked once more in the 32-bit numbers QuPath keeps.
What is read may be anything that QuPath, or a tool writing for it, has ever made; what cannot be used is rejected
feature by feature, with a reason.

Two frames meet here. ``Annotation`` counts level-0 pixels from the corner of the full slide; QuPath counts from the
corner of the scanned bounds (``openslide.bounds-x`` and ``-y``). The difference, ``Frame.origin``, is subtracted on
writing, stands in the file as a top-level member ``wsi``, which QuPath skips, and is added back on reading.

Sources: RFC 7946; ``QuPathTypeAdapters``, ``ROITypeAdapters``, ``GsonTools`` and ``PathIO`` of QuPath 0.3.2 to 0.7.0.
"""

import gzip
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple, cast
from uuid import UUID, uuid5

import numpy as np
import numpy.typing as npt
import shapely

from wsi._files import replace_atomically
from wsi._version import __version__
from wsi.annotation import Annotation, ObjectType, canonical_class_name, canonical_wkb, class_color, content_id
from wsi.errors import AnnotationError, UsageError

__all__ = [
    "Frame",
    "GeoJsonContents",
    "ParsedFeatures",
    "Rejection",
    "Repair",
    "WriteReport",
    "is_geojson",
    "parse_features",
    "read_geojson",
    "stated_frame",
    "write_geojson",
]

Shapes = npt.NDArray[np.object_]

FORMAT_VERSION: Final = 1
MAX_BYTES: Final = 2 << 30

_GRID_PX: Final = 0.01
# Exact in two decimals and, up to _MAX_PX, in 32-bit numbers: what is valid on this grid stays valid in both.
_EXACT_GRID_PX: Final = 0.25
_SNAPS: Final = 8
_MAX_PX: Final = 2.0**22
_CHUNK: Final = 4096  # annotations handled at once: the shapely calls then cost little each
_LINEAR_RING: Final = 2  # of shapely.GeometryType
_COLLECTION: Final = 7
_FILE_NAME: Final = re.compile(r".*\.(geojson|json)(\.gz)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a file's coordinates lie: which slide, how large, how fine, and where its (0, 0) is.

    ``size`` is the full frame (width, height) and ``origin`` the corner of the scanned bounds in it, both in level-0
    pixels; ``mpp`` is microns per level-0 pixel along x and y.

    Raises:
        UsageError: a number is missing, not finite, or makes no sense.
    """

    slide: str
    size: tuple[int, int]
    mpp: tuple[float, float]
    origin: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if not isinstance(self.slide, str):
            raise UsageError(f"the slide's name must be text, not {self.slide!r}")
        width, height = _pair(self.size, "size")
        if min(width, height) < 1 or not width.is_integer() or not height.is_integer():
            raise UsageError(f"size must be two whole numbers of pixels, not {self.size!r}")
        if min(_pair(self.mpp, "mpp")) <= 0:
            raise UsageError(f"mpp must be two positive numbers, not {self.mpp!r}")
        object.__setattr__(self, "size", (int(width), int(height)))
        object.__setattr__(self, "mpp", _pair(self.mpp, "mpp"))
        object.__setattr__(self, "origin", _pair(self.origin, "origin"))


def _pair(values: Any, what: str) -> tuple[float, float]:
    try:
        x, y = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        x = y = math.nan
    if not (abs(x) <= _MAX_PX and abs(y) <= _MAX_PX):
        raise UsageError(f"{what} must be two numbers within ±{_MAX_PX:.0f}, not {values!r}")
    return x, y


@dataclass(frozen=True, slots=True)
class Rejection:
    """A feature that was left out. ``index`` counts from 0 in the order of the file, children after their parent."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Repair:
    """A feature that was changed so that it could be used. ``index`` counts as for ``Rejection``."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What became of the annotations given to ``write_geojson``; indices count these from 0."""

    n_written: int
    repaired: tuple[Repair, ...]
    dropped: tuple[Rejection, ...]


@dataclass(frozen=True, slots=True)
class GeoJsonContents:
    """What a file holds. Annotations are in level-0 pixels of the slide's full frame; their shapes are valid.

    ``origin`` is what was added to the file's coordinates and ``origin_source`` says who said so: the file itself
    (``frame`` is then all it says), the caller, or nobody, in which case it is (0, 0).
    """

    annotations: tuple[Annotation, ...]
    origin: tuple[float, float]
    origin_source: Literal["file", "argument", "default"]
    rejected: tuple[Rejection, ...]
    repaired: tuple[Repair, ...]
    frame: Frame | None


class ParsedFeatures(NamedTuple):
    """Annotations, and what became of the features that are not among them or were changed."""

    annotations: list[Annotation]
    rejected: list[Rejection]
    repaired: list[Repair]


# Writing


def is_geojson(path: Path) -> bool:
    """Whether QuPath would open a file of this name: ``.geojson`` or ``.json``, perhaps with ``.gz`` behind it."""
    return _FILE_NAME.fullmatch(path.name) is not None


def write_geojson(path: str | os.PathLike[str], annotations: Iterable[Annotation], frame: Frame) -> WriteReport:
    """Write annotations as one FeatureCollection that QuPath imports at the right place.

    The file is whole or not there. The same annotations give the same bytes, compressed or not, and so does writing
    again what was read back. Features go to disk as they come: ``annotations`` may be a generator of any length.

    Args:
        path: ends in ``.geojson`` or ``.json``; with ``.gz`` behind it the file is compressed.
        annotations: in level-0 pixels of the full frame. Shapes that are not valid are repaired: points that are not
            finite are dropped, crossings resolved, overlapping parts joined. What then vanishes is dropped.
        frame: the slide they belong to.

    Raises:
        UsageError: a name that QuPath would not open.
    """
    path = Path(path)
    if not is_geojson(path):
        raise UsageError(f"{path}: QuPath opens .geojson and .json, and either with .gz behind it; choose such a name")
    repaired: list[Repair] = []
    dropped: list[Rejection] = []
    n_written = 0
    with replace_atomically(path) as file, _compressor(file, path.name) as out:
        out.write(f'{{"type":"FeatureCollection","wsi":{_dumps(_wsi_member(frame))},"features":['.encode("ascii"))
        for line in _features(annotations, frame.origin, repaired, dropped):
            out.write((",\n" if n_written else "\n").encode("ascii") + line.encode("ascii"))
            n_written += 1
        out.write(b"\n]}\n")
    return WriteReport(n_written, tuple(repaired), tuple(dropped))


def _compressor(file: IO[bytes], name: str) -> AbstractContextManager[IO[bytes]]:
    if not name.lower().endswith(".gz"):
        return nullcontext(file)
    # No name and no time inside: the same content gives the same bytes.
    return cast("IO[bytes]", gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0))


def _dumps(value: Any) -> str:
    # ASCII, because QuPath 0.4 decodes with the charset of the machine, which on Windows is not UTF-8.
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _wsi_member(frame: Frame) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "generator": f"wsi-engine {__version__}",
        "slide": frame.slide,
        "size": frame.size,
        "mpp": frame.mpp,
        "origin": [int(value) if value.is_integer() else value for value in frame.origin],
    }


def _features(
    annotations: Iterable[Annotation],
    origin: tuple[float, float],
    repaired: list[Repair],
    dropped: list[Rejection],
) -> Iterator[str]:
    """Yield one line of JSON per annotation that can be written, and note what happened to the others."""
    stream = iter(annotations)
    seen: set[int] = set()
    index = 0
    while chunk := list(islice(stream, _CHUNK)):
        shapes, faults = _fit([annotation.geometry for annotation in chunk], origin)
        nuclei, nucleus_faults = _fit([annotation.nucleus for annotation in chunk], origin)
        # The id an annotation has once it is read back.
        wkbs = canonical_wkb(shapely.transform(shapes, lambda xy: xy + origin))
        for i, annotation in enumerate(chunk):
            if shapes[i] is None:
                dropped.append(Rejection(index + i, faults[i]))
                continue
            if reasons := _fault_texts(faults.get(i), nucleus_faults.get(i)):
                repaired.append(Repair(index + i, "; ".join(reasons)))
            uid = content_id(wkbs[i], annotation.object_type, annotation.class_name, annotation.name)
            yield _feature(annotation, shapes[i], nuclei[i], _unused(uid, seen))
        index += len(chunk)


def _fault_texts(fault: str | None, nucleus_fault: str | None) -> list[str]:
    texts = [] if fault is None else [fault]
    return texts if nucleus_fault is None else [*texts, f"nucleus: {nucleus_fault}"]


def _unused(uid: UUID, seen: set[int]) -> UUID:
    """Return an id, or one derived from it if an equal one went before, and remember it.

    ``seen`` holds hashes, a third of the memory; should two differ only there, the second merely gets another id.
    """
    while hash(uid) in seen:
        uid = uuid5(uid, "again")
    seen.add(hash(uid))
    return uid


def _feature(annotation: Annotation, shape: Any, nucleus: Any, uid: UUID) -> str:
    nucleus_member = "" if nucleus is None else f',"nucleusGeometry":{_geometry(nucleus)}'
    return (
        f'{{"type":"Feature","id":"{uid}","geometry":{_geometry(shape)}{nucleus_member},'
        f'"properties":{_dumps(_properties(annotation))}}}'
    )


def _properties(annotation: Annotation) -> dict[str, Any]:
    """Return the members QuPath knows, without any that is empty: it takes no null."""
    properties: dict[str, Any] = {"objectType": annotation.object_type}
    if annotation.class_name is not None:
        names = annotation.class_name.split(": ")
        named = {"name": names[0]} if len(names) == 1 else {"names": names}
        properties["classification"] = named | {"color": annotation.color or class_color(annotation.class_name)}
    elif annotation.color is not None:
        properties["color"] = annotation.color
    if annotation.name is not None:
        properties["name"] = annotation.name
    if annotation.is_locked:
        properties["isLocked"] = True
    if measurements := {name: value for name, value in annotation.measurements.items() if math.isfinite(value)}:
        properties["measurements"] = measurements
    if annotation.metadata:
        properties["metadata"] = annotation.metadata
    return properties


def _geometry(shape: Any) -> str:
    numbers = _dumps(_coordinates(shape)).replace(".0,", ",").replace(".0]", "]")  # 12.0 as 12
    return f'{{"type":"{shape.geom_type}","coordinates":{numbers}}}'


def _coordinates(shape: Any) -> list[Any]:
    match shape.geom_type:
        case "Point":
            return cast("list[Any]", shapely.get_coordinates(shape)[0].tolist())
        case "LineString" | "LinearRing":
            return cast("list[Any]", shapely.get_coordinates(shape).tolist())
        case "Polygon":
            return [_coordinates(ring) for ring in shapely.get_rings(shape)]
        case _:
            return [_coordinates(part) for part in shapely.get_parts(shape)]


@np.errstate(all="ignore")  # GEOS leaves floating-point flags behind, which numpy would report as warnings
def _fit(shapes: list[Any], origin: tuple[float, float]) -> tuple[Shapes, dict[int, str]]:
    """Bring shapes into the frame, onto the grid and into the numbers of a file.

    Returns:
        The shapes in the order given, None for those of which nothing is left; and by index what was wrong.
    """
    fitted = np.empty(len(shapes), dtype=object)
    fitted[:] = shapes
    faults: dict[int, str] = {}
    for i in np.flatnonzero(_is_unusual(fitted)):
        fitted[i], fault = _rebuilt(fitted[i])
        if fault:
            faults[int(i)] = fault
    fitted = shapely.transform(fitted, lambda xy: np.round(xy - origin, 2) + 0.0)  # + 0.0: no negative zero
    present = ~shapely.is_missing(fitted)
    valid = shapely.is_valid(fitted)
    fitted[valid] = shapely.remove_repeated_points(fitted[valid], 0)
    for i in np.flatnonzero(present & ~_survives(fitted)):
        fault = "has parts too narrow for the grid" if valid[i] else shapely.is_valid_reason(fitted[i])
        fitted[i] = _repaired(fitted[i])
        left = "" if fitted[i] is not None else "; nothing is left of it"
        faults[int(i)] = "; ".join(filter(None, (faults.get(int(i)), f"on a grid of {_GRID_PX} px: {fault}{left}")))
    areal = shapely.get_dimensions(fitted) == 2
    fitted[areal] = shapely.orient_polygons(shapely.normalize(fitted[areal]), exterior_cw=False)
    return fitted, faults


def _is_unusual(shapes: Shapes) -> npt.NDArray[np.bool_]:
    """Tell which shapes must be taken apart first.

    Those with points that are not finite or far off any slide, those of a type QuPath does not know, and those with
    empty parts.
    """
    unusual = np.isin(shapely.get_type_id(shapes), (_LINEAR_RING, _COLLECTION))
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    unusual[owner[~(np.abs(xy) <= _MAX_PX).all(axis=1)]] = True
    parts, owner = shapely.get_parts(shapes, return_index=True)
    unusual[owner[shapely.is_empty(parts)]] = True
    return unusual


def _rebuilt(shape: Any) -> tuple[Any, str]:
    mapping = shapely.geometry.mapping(shape)
    if shape.geom_type == "LinearRing":
        mapping = {**mapping, "type": "LineString"}
    notes: list[str] = []
    try:
        return _parse_geometry(mapping, notes), "; ".join(notes)
    except AnnotationError as error:
        return None, str(error)


def _survives(shapes: Shapes) -> npt.NDArray[np.bool_]:
    """Tell which shapes are valid and come out of QuPath's import, from 0.6, as they are.

    It stores coordinates in 32 bits and then snaps polygons to 0.01 px together with their crossings (JTS
    ``GeometryPrecisionReducer``). That empties slivers and may even throw though the polygon is valid, but only where
    it finds something to move. Where it does not, no point lies on an edge but at its ends, so that adding the origin
    back cannot make a shape cross itself either.
    """
    survives = shapely.is_valid(shapes) & ~shapely.is_empty(shapes)
    stored = shapely.transform(shapes, lambda xy: xy.astype(np.float32).astype(np.float64))
    survives &= shapely.is_valid(stored)
    areal = survives & (shapely.get_dimensions(shapes) == 2)
    stored = shapely.remove_repeated_points(stored[areal], 0)
    rounded = shapely.set_precision(stored, _GRID_PX, mode="pointwise")
    snapped = _snapped(stored, _GRID_PX)
    survives[areal] = shapely.equals_exact(shapely.normalize(snapped), shapely.normalize(rounded), _GRID_PX / 2)
    return cast("npt.NDArray[np.bool_]", survives)


def _snapped(shapes: Shapes, grid_px: float) -> Shapes:
    """Return valid shapes snapped to a grid together with their crossings; an empty one where GEOS cannot do it."""
    try:
        return cast("Shapes", shapely.set_precision(shapes, grid_px))
    except shapely.GEOSException:  # one shape stops them all: halve until it is alone
        if len(shapes) == 1:
            return np.array([shapely.Polygon()])
        half = len(shapes) // 2
        return np.concatenate([_snapped(shapes[:half], grid_px), _snapped(shapes[half:], grid_px)])


def _repaired(shape: Any) -> Any:
    """Return a shape near one that does not survive, or None if it vanishes.

    Snapping a shape to a grid may bring other points within reach of an edge, so it is done until nothing moves. Where
    that does not end, or where 32-bit numbers are coarser than the grid (beyond 131,072 px), the exact grid does it.
    """
    for grid_px in (_GRID_PX,) * _SNAPS + (_EXACT_GRID_PX,) * _SNAPS:
        shape = _valid_parts(shape)
        if shape is None:
            return None
        shape = shapely.transform(_snapped(np.array([shape]), grid_px)[0], lambda xy: np.round(xy, 2) + 0.0)
        if _survives(np.array([shape]))[0]:
            return shape
    return None


def _valid_parts(shape: Any) -> Any:
    """Return valid polygons for an areal shape, those lines or points of another that are valid, or None."""
    dimension = shapely.get_dimensions(shape)
    if dimension == 2:
        shape = _made_valid(shape)
    parts = shapely.get_parts(shape)
    parts = parts[(shapely.get_dimensions(parts) == dimension) & shapely.is_valid(parts) & ~shapely.is_empty(parts)]
    return _joined(parts)


def _made_valid(shape: Any) -> Any:
    """Return polygons that cover what a shape covers, perhaps with some lines; an empty one if GEOS knows no way."""
    for make_valid in (_by_structure, _by_linework):
        try:
            return make_valid(shape)
        except shapely.GEOSException:  # of shapes made to be nasty one in thousands
            continue
    return shapely.Polygon()


def _by_structure(shape: Any) -> Any:
    return shapely.make_valid(shape, method="structure", keep_collapsed=False)


def _by_linework(shape: Any) -> Any:
    pieces = shapely.get_parts(shapely.make_valid(shapely.get_parts(shape), method="linework"))
    return shapely.union_all(pieces[shapely.get_dimensions(pieces) == 2], grid_size=_GRID_PX)


def _joined(parts: Shapes) -> Any:
    """Return parts of one dimension as a single or a multi geometry; None if there are none."""
    if len(parts) < 2:
        return parts[0] if len(parts) else None
    join = (shapely.multipoints, shapely.multilinestrings, shapely.multipolygons)[shapely.get_dimensions(parts[0])]
    return join(parts)


# Reading


def read_geojson(
    path: str | os.PathLike[str],
    origin: tuple[float, float] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
) -> GeoJsonContents:
    """Read annotations from a GeoJSON file, plain, gzipped or zipped, whatever its name.

    A feature that cannot be used is listed in ``rejected`` and the others are read. Shapes that are not valid are
    repaired and listed in ``repaired``. Nested objects stand behind their parents. The plane of a shape (z, t, channel)
    and the mark that a polygon was drawn as an ellipse are not kept; the ids of the file are not either, since an
    ``Annotation`` derives its own.

    Args:
        path: a FeatureCollection, an array of features, one Feature or one geometry; all entries of a zip together.
        origin: level-0 position of the file's (0, 0), if the file itself does not say: ``openslide.bounds-x`` and
            ``-y`` for an export from QuPath of a slide that has them.
        max_bytes: refuse what is larger than this when unpacked.

    Raises:
        AnnotationError: the file as a whole cannot be understood.
        UsageError: ``origin`` is not two finite numbers.
    """
    path = Path(path)
    given = None if origin is None else _pair(origin, "origin")
    contents = [_contents(where, data, given) for where, data in _load(path, max_bytes)]
    first = contents[0]
    if any(other.frame != first.frame for other in contents):
        raise AnnotationError(f"{path}: its entries belong to different slides; unpack it and read them one by one")
    offsets = np.cumsum([0] + [len(each.annotations) + len(each.rejected) for each in contents]).tolist()
    numbered = list(zip(contents, offsets, strict=False))
    return replace(
        first,
        annotations=tuple(annotation for each in contents for annotation in each.annotations),
        rejected=tuple(Rejection(r.index + offset, r.reason) for each, offset in numbered for r in each.rejected),
        repaired=tuple(Repair(r.index + offset, r.reason) for each, offset in numbered for r in each.repaired),
    )


def _load(path: Path, max_bytes: int) -> list[tuple[str, bytes]]:
    """Return name and unpacked bytes of the file, or of each JSON entry of a zip. Nothing is unpacked to disk."""
    try:
        with path.open("rb") as file:
            if file.read(4) not in (b"PK\3\4", b"PK\5\6"):
                return [(str(path), _unpacked(str(path), file, max_bytes))]
            with zipfile.ZipFile(file) as archive:
                return _entries(path, archive, max_bytes)
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: there is no such file; check the path") from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise AnnotationError(f"{path}: cannot be read ({error}); copy or export it again") from error


def _entries(path: Path, archive: zipfile.ZipFile, max_bytes: int) -> list[tuple[str, bytes]]:
    entries = []
    for info in archive.infolist():
        name = info.filename.rpartition("/")[2]
        if not _FILE_NAME.fullmatch(name) or name.startswith("."):
            continue
        where = f"{path}: {info.filename}"
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise AnnotationError(f"{where}: is encrypted or packed in a rare way; zip it again without a password")
        with archive.open(info) as stream:
            entries.append((where, _unpacked(where, stream, max_bytes)))
        max_bytes -= len(entries[-1][1])
    if not entries:
        raise AnnotationError(f"{path}: holds no .geojson or .json file; zip the exported file itself")
    return entries


def _unpacked(where: str, file: IO[bytes], max_bytes: int) -> bytes:
    file.seek(0)
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream = gzip.GzipFile(fileobj=file) if is_gzip else file
    data = bytearray()
    while block := stream.read(1 << 20):  # never asks for more memory than there is content, however large the limit
        data += block
        if len(data) > max_bytes:
            raise AnnotationError(
                f"{where}: unpacks to more than the limit of {max_bytes:,} bytes; split it or raise it"
            )
    return bytes(data)


def _contents(where: str, data: bytes, given: tuple[float, float] | None) -> GeoJsonContents:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        found = "XML" if data.lstrip().startswith(b"<") else f"not JSON ({error})"
        raise AnnotationError(f"{where}: is {found}; export the annotations as GeoJSON") from error
    kind = document.get("type") if isinstance(document, dict) else None
    if not isinstance(document, list) and not _is_collection(document) and not _is_feature_or_geometry(document):
        raise AnnotationError(f"{where}: is JSON but not GeoJSON (its type is {kind!r:.40}); export it as GeoJSON")
    frame = stated_frame(where, document)
    origin = frame.origin if frame else given or (0.0, 0.0)
    annotations, rejected, repaired = parse_features(document, origin)
    source: Literal["file", "argument", "default"] = "file" if frame else "default" if given is None else "argument"
    return GeoJsonContents(tuple(annotations), origin, source, tuple(rejected), tuple(repaired), frame)


def _is_collection(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("features"), list)


def _is_feature_or_geometry(item: Any) -> bool:
    return isinstance(item, dict) and ("geometry" in item or item.get("type") == "Feature" or _is_geometry(item))


def _is_geometry(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") in (*_BUILDERS, "GeometryCollection")


def stated_frame(where: str, document: Any) -> Frame | None:
    """Return what the top-level member ``wsi`` of a document says; None where there is none.

    Raises:
        AnnotationError: it is damaged, or of a later release.
    """
    member = document.get("wsi") if isinstance(document, dict) else None
    if not isinstance(member, dict) or "origin" not in member:
        return None
    version = member.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise AnnotationError(
            f"{where}: its member 'wsi' is of version {version!r}, this release knows {FORMAT_VERSION}; update"
        )
    try:
        return Frame(member.get("slide"), member.get("size"), member.get("mpp"), member["origin"])  # type: ignore[arg-type]
    except UsageError as error:
        raise AnnotationError(f"{where}: its member 'wsi' is damaged ({error}); write the file again") from error


def _candidates(document: Any) -> Iterator[Any]:
    """Yield whatever stands where a feature could, in the order of the file, children after their parent.

    With a stack, so that no depth of nesting is too much.
    """
    stack = [document]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        elif _is_collection(item):
            stack.extend(reversed(item["features"]))
        elif not (isinstance(item, dict) and _object_type(item) is None):
            yield item
        if isinstance(item, dict) and isinstance(properties := item.get("properties"), dict):
            children = properties.get("childObjects", properties.get("children"))
            stack.extend(reversed(children) if isinstance(children, list) else ())


class _Parsed(NamedTuple):
    number: int  # of the feature in the file
    shape: Any
    nucleus: Any
    words: dict[str, Any]
    notes: list[str]


def parse_features(document: Any, origin: tuple[float, float] = (0.0, 0.0)) -> ParsedFeatures:
    """Make annotations of whatever ``json.loads`` found, or of what a reader of another format brought into this form.

    ``origin`` is added to all coordinates. Nothing is raised: what cannot be used is rejected, with its reason.
    """
    parsed, rejected = [], []
    for index, candidate in enumerate(_candidates(document)):
        try:
            parsed.append(_parse_feature(index, candidate))
        except AnnotationError as error:
            rejected.append(Rejection(index, str(error)))
    shapes, faults = _settle([each.shape for each in parsed], origin)
    nuclei, nucleus_faults = _settle([each.nucleus for each in parsed], origin)
    annotations, repaired = [], []
    for i, each in enumerate(parsed):
        notes = each.notes + _fault_texts(faults.get(i), nucleus_faults.get(i))
        if shapes[i] is None:
            rejected.append(Rejection(each.number, "; ".join(notes)))
            continue
        annotations.append(Annotation(shapes[i], nucleus=nuclei[i], **each.words))
        if notes:
            repaired.append(Repair(each.number, "; ".join(notes)))
    return ParsedFeatures(annotations, sorted(rejected, key=lambda rejection: rejection.index), repaired)


@np.errstate(all="ignore")  # as in _fit
def _settle(shapes: list[Any], origin: tuple[float, float]) -> tuple[Shapes, dict[int, str]]:
    """Bring shapes into the full frame and make them valid: None where nothing is left, and what was wrong by index."""
    settled = np.empty(len(shapes), dtype=object)
    settled[:] = shapes
    if any(origin):
        settled = shapely.transform(settled, lambda xy: xy + origin)
    faults: dict[int, str] = {}
    for i in np.flatnonzero(~shapely.is_missing(settled) & ~shapely.is_valid(settled)):
        faults[int(i)] = f"not valid ({shapely.is_valid_reason(settled[i])})"
        settled[i] = _valid_parts(settled[i])
    return settled, faults


def _parse_feature(index: int, item: Any) -> _Parsed:
    if not _is_feature_or_geometry(item):
        raise AnnotationError(f"is neither a feature nor a geometry (its type is {_type(item)!r})")
    notes: list[str] = []
    if "geometry" not in item and item.get("type") != "Feature":
        return _Parsed(index, _parse_geometry(item, notes), None, {}, notes)
    shape = _parse_geometry(item.get("geometry"), notes)
    properties = item.get("properties") or {}
    if not isinstance(properties, dict):
        raise AnnotationError(f"its properties are no object but {properties!r:.40}")
    words = _words(properties, notes) | {"object_type": _object_type(item)}
    nucleus = None
    if words["object_type"] == "cell" and item.get("nucleusGeometry") is not None:
        try:
            nucleus = _parse_geometry(item["nucleusGeometry"], notes)
        except AnnotationError as error:
            notes.append(f"nucleus left out: {error}")
    return _Parsed(index, shape, nucleus, words, notes)


def _type(item: Any) -> Any:
    return item.get("type") if isinstance(item, dict) else type(item).__name__


_OBJECT_TYPES: Final[Mapping[str, ObjectType | None]] = {
    "annotation": "annotation",
    "detection": "detection",
    "tile": "tile",
    "cell": "cell",
    "tmaCore": "tmaCore",
    "tma_core": "tmaCore",
    "root": None,
    # QuPath 0.2 kept the type in the id.
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathTileObject": "tile",
    "PathCellObject": "cell",
    "TMACoreObject": "tmaCore",
    "PathRootObject": None,
}


def _object_type(item: Mapping[str, Any]) -> ObjectType | None:
    """Return what a feature says it is: an annotation if it does not say, None for the root, which is no shape."""
    properties = item.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    stated = next(
        (properties[key] for key in ("objectType", "object_type", "type") if key in properties), item.get("id")
    )
    return _OBJECT_TYPES.get(stated, "annotation") if isinstance(stated, str) else "annotation"


def _words(properties: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return all fields of an Annotation but its shapes."""
    class_name, color = _classification(properties.get("classification"))
    if class_name is None:
        color = _color(properties.get("color"))
    elif color == class_color(class_name):
        color = None
    metadata = properties.get("metadata")
    return {
        "class_name": class_name,
        "color": color,
        "name": _text(properties.get("name")),
        "is_locked": properties.get("isLocked") in (True, "true"),
        "measurements": _measurements(properties.get("measurements"), notes),
        "metadata": {
            key: text
            for key, value in (metadata.items() if isinstance(metadata, dict) else ())
            if (text := _text(value)) is not None
        },
    }


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int | float) else None


def _classification(value: Any) -> tuple[str | None, tuple[int, int, int] | None]:
    """Return name and colour of a class: text, ``name`` or ``names``, or the nested ``parentClass`` of old files."""
    if value is None:
        return None, None
    if isinstance(value, str):
        return canonical_class_name(value), None
    if not isinstance(value, dict):
        raise AnnotationError(f"its classification is neither text nor an object but {value!r:.40}")
    names = value.get("names")
    if not isinstance(names, list):
        names = []
        node: Any = value
        while isinstance(node, dict):
            names.insert(0, node.get("name"))
            node = node.get("parentClass")
    color = value["color"] if "color" in value else value.get("colorRGB")
    return canonical_class_name(": ".join(filter(None, map(_text, names)))), _color(color)


def _color(value: Any) -> tuple[int, int, int] | None:
    """Return RGB of a list (alpha last), of a packed signed integer, or of CSS text; None for anything else."""
    if isinstance(value, str):
        if match := re.fullmatch(r"#([0-9a-fA-F]{6})(?:[0-9a-fA-F]{2})?", value):
            value = int(match[1], 16)
        elif match := re.fullmatch(r"rgba?\((\d{1,3}), ?(\d{1,3}), ?(\d{1,3})(?:,.*)?\)", value):
            value = [int(number) for number in match.groups()]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int):
        return value >> 16 & 255, value >> 8 & 255, value & 255
    if not isinstance(value, list) or len(value) not in (3, 4):
        return None
    red, green, blue = value[:3]
    return (red, green, blue) if all(isinstance(v, int) and 0 <= v <= 255 for v in value[:3]) else None


def _measurements(value: Any, notes: list[str]) -> dict[str, float]:
    """Return measurements from a map, or from the list of name and value that QuPath wrote before 0.4."""
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        items = value if isinstance(value, list) else []
        pairs = [(item.get("name"), item.get("value")) if isinstance(item, dict) else (None, None) for item in items]
    numbers = {}
    n_left_out = 0
    for name, number in pairs:
        try:
            value = float(number)  # text too: "NaN" and "Infinity"
        except (TypeError, ValueError, OverflowError):
            value = None
        if value is not None and isinstance(name, str) and name:
            numbers[name] = value
        else:
            n_left_out += 1
    if n_left_out:
        notes.append(f"{n_left_out} measurements without a name or a number were left out")
    return numbers


def _parse_geometry(value: Any, notes: list[str]) -> Any:
    """Build a shape, not necessarily valid, from the members of a GeoJSON geometry; note what had to be left out.

    Of a GeometryCollection the parts of the highest dimension are kept.

    Raises:
        AnnotationError: nothing can be built.
    """
    if not isinstance(value, dict):
        raise AnnotationError("has no geometry")
    if value.get("type") == "GeometryCollection":
        return _highest(value, notes)
    if not _is_geometry(value):
        raise AnnotationError(f"has a geometry of unknown type {value.get('type')!r:.40}")
    if not isinstance(coordinates := value.get("coordinates"), list | tuple):
        raise AnnotationError(f"its {value['type']} has no coordinates")
    shape = _BUILDERS[value["type"]](coordinates, notes)
    if shape is None:
        raise AnnotationError("; ".join([f"its {value['type']} has too few points", *notes]))
    return shape


def _highest(collection: Mapping[str, Any], notes: list[str]) -> Any:
    stack: list[Any] = [collection]
    shapes = []
    while stack:
        item = stack.pop()
        if isinstance(item, dict) and item.get("type") == "GeometryCollection":
            inner = item.get("geometries")
            stack.extend(reversed(inner) if isinstance(inner, list | tuple) else ())
        else:
            shapes.append(_parse_geometry(item, notes))
    parts = shapely.get_parts(np.array(shapes, dtype=object))
    if not len(parts):
        raise AnnotationError("its GeometryCollection is empty")
    dimensions = shapely.get_dimensions(parts)
    notes.append("of a GeometryCollection the parts of the highest dimension were kept")
    return _joined(parts[dimensions == dimensions.max()])


def _positions(value: Any, notes: list[str]) -> npt.NDArray[np.float64]:
    """Return the finite points (N, 2) of a list of positions; of more than two dimensions the first two count."""
    if not isinstance(value, list | tuple):
        raise AnnotationError("its coordinates are not nested as its type asks")
    if not value:
        return np.empty((0, 2))
    try:
        xy = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        xy = _ragged(value)
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise AnnotationError("its coordinates are not nested as its type asks")
    xy = xy[:, :2]
    finite = np.isfinite(xy).all(axis=1)
    if not finite.all():
        notes.append(f"{np.count_nonzero(~finite)} points that are not finite were left out")
        xy = xy[finite]
    if np.abs(xy).max(initial=0.0) > _MAX_PX:
        raise AnnotationError(f"a point lies beyond ±{_MAX_PX:,.0f} px, farther than any slide reaches")
    return xy


def _ragged(value: Iterable[Any]) -> npt.NDArray[np.float64]:
    try:
        return np.array([[position[0], position[1]] for position in value], dtype=np.float64)
    except (TypeError, ValueError, OverflowError, LookupError) as error:
        raise AnnotationError("a point is not two numbers") from error


def _point(value: Any, notes: list[str]) -> Any:
    xy = _positions([value], notes)
    return shapely.points(xy[0]) if len(xy) else None


def _multi_point(value: Any, notes: list[str]) -> Any:
    xy = _positions(value, notes)
    return shapely.multipoints(xy) if len(xy) else None


def _line(value: Any, notes: list[str]) -> Any:
    xy = _positions(value, notes)
    return shapely.linestrings(xy) if len(xy) > 1 else None


def _ring(value: Any, notes: list[str]) -> Any:
    xy = _positions(value, notes)
    if len(xy) and (xy[0] != xy[-1]).any():
        xy = np.concatenate([xy, xy[:1]])
        notes.append("a ring that was open was closed")
    if len(xy) < 4:
        notes.append("a ring of fewer than three points was left out")
        return None
    return shapely.linearrings(xy)


def _polygon(value: Any, notes: list[str]) -> Any:
    rings = [_ring(ring, notes) for ring in value] if isinstance(value, list | tuple) else []
    if not rings or rings[0] is None:
        return None
    return shapely.polygons(rings[0], [ring for ring in rings[1:] if ring is not None] or None)


def _each(build: Callable[[Any, list[str]], Any], join: Callable[[list[Any]], Any]) -> Callable[[Any, list[str]], Any]:
    def build_all(value: Any, notes: list[str]) -> Any:
        parts = [build(part, notes) for part in value]
        kept = [part for part in parts if part is not None]
        if len(kept) < len(parts):
            notes.append(f"{len(parts) - len(kept)} parts with too few points were left out")
        return join(kept) if kept else None

    return build_all


_BUILDERS: Final[Mapping[str, Callable[[Any, list[str]], Any]]] = {
    "Point": _point,
    "MultiPoint": _multi_point,
    "LineString": _line,
    "MultiLineString": _each(_line, shapely.multilinestrings),
    "Polygon": _polygon,
    "MultiPolygon": _each(_polygon, shapely.multipolygons),
}
