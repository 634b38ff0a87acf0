"""AnnotationFile: annotations from any file people draw them in, matched with slides and checked against them."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import shapely

from wsi._xml import parse_xml
from wsi.annotation import Annotation, check_inside
from wsi.asap import parse_asap
from wsi.errors import AnnotationError, UsageError
from wsi.geojson import Frame, Rejection, Repair, read_geojson
from wsi.imagescope import parse_imagescope
from wsi.mask import MaskOptions, read_mask

__all__ = [
    "AnnotationFile",
    "AnnotationMatches",
    "check_annotations",
    "check_places",
    "match_annotations",
    "read_annotations",
]

Kind = Literal["geojson", "asap", "imagescope", "mask"]

_SUFFIXES: Final = (".geojson", ".json", ".xml", ".png", ".tif", ".tiff", ".zip")
_PACKED: Final = ".gz"
_ENDINGS: Final = ("_mask", "-mask", "_annotations", "_annotation", ".annotation", ".annotations")
_MASK_MAGIC: Final = (b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_XML_STARTS: Final = (b"<", b"\xef\xbb\xbf<", b"\xff\xfe<", b"\xfe\xff\0<")
_PLACE: Final = re.compile(r"\[[^\]]*\]")  # where GEOS found a fault
_SHOWN: Final = 3  # reasons of a kind that a report lists


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """What a file of any kind holds. Annotations are in level-0 pixels of the slide's full frame, their shapes valid.

    ``rejected`` and ``repaired`` count the file's features from 0. ``origin`` is what was added to its coordinates and
    ``frame`` the slide that it says it belongs to, if it does.
    """

    path: Path
    kind: Kind
    annotations: tuple[Annotation, ...]
    rejected: tuple[Rejection, ...] = ()
    repaired: tuple[Repair, ...] = ()
    origin: tuple[float, float] = (0.0, 0.0)
    frame: Frame | None = None

    def report(self) -> tuple[str, ...]:
        """A line for each reason why features were left out or changed."""
        return tuple(
            f"{self.path.name}: {verb} {len(numbers)} ({_some(numbers)}): {reason}"
            for verb, items in (("left out", self.rejected), ("changed", self.repaired))
            for reason, numbers in _by_reason(items).items()
        )


def _by_reason(items: Iterable[Rejection | Repair]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for item in items:
        found.setdefault(_PLACE.sub("", item.reason), []).append(item.index)
    return found


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:_SHOWN])
    return f"number {shown}{' …' if len(numbers) > _SHOWN else ''}"


def read_annotations(
    path: str | os.PathLike[str], *, frame: Frame | None = None, mask: MaskOptions | None = None
) -> AnnotationFile:
    """Read annotations from a file, whatever its name says: GeoJSON, ASAP XML, ImageScope or HALO XML, or a mask.

    Args:
        frame: of the slide they belong to (``Slide.frame``). A GeoJSON file that does not say where its (0, 0) lies is
            taken to count from ``frame.origin``, as QuPath does; ASAP and ImageScope count from the full frame.
        mask: what a picture of labels does not say itself.

    Raises:
        AnnotationError: the file as a whole cannot be understood.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: there is no such file; check the path") from error
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error}); copy or export it again") from error
    if head.startswith(_MASK_MAGIC):
        return AnnotationFile(path, "mask", tuple(read_mask(path, mask, frame=frame)))
    if head.startswith(b"\xff\xd8\xff"):
        raise AnnotationError(f"{path}: is a JPEG, whose pixels are not what was drawn; save masks as PNG or TIFF")
    if head.lstrip().startswith(_XML_STARTS):
        root = parse_xml(path)
        is_asap = root.tag == "ASAP_Annotations"
        annotations, rejected, repaired = (parse_asap if is_asap else parse_imagescope)(root, str(path))
        kind: Kind = "asap" if is_asap else "imagescope"
        return AnnotationFile(path, kind, tuple(annotations), tuple(rejected), tuple(repaired))
    contents = read_geojson(path, None if frame is None else frame.origin)
    return AnnotationFile(
        path, "geojson", contents.annotations, contents.rejected, contents.repaired, contents.origin, contents.frame
    )


@dataclass(frozen=True, slots=True)
class AnnotationMatches:
    """Which file belongs to which slide.

    Attributes:
        files: by slide, as it was given.
        without: slides that no file belongs to.
        unused: files that belong to no slide.
    """

    files: dict[str, Path]
    without: tuple[str, ...]
    unused: tuple[Path, ...]

    def report(self) -> tuple[str, ...]:
        """A line for each slide without annotations and each file that may mean one of them; one for all other files."""
        stems = {_slide_stem(slide): slide for slide in self.without}
        lines = [f"{slide}: no annotations" for slide in self.without]
        others = []
        for path in self.unused:
            near = difflib.get_close_matches(_stem(path), stems, n=1)
            if near:
                lines.append(f"{path.name}: belongs to no slide; does it mean {stems[near[0]]}?")
            else:
                others.append(path.name)
        if others:
            shown = ", ".join(others[:_SHOWN]) + (" …" if len(others) > _SHOWN else "")
            lines.append(f"{shown}: belong{'s' if len(others) == 1 else ''} to no slide ({len(others)} in all)")
        return tuple(lines)


def match_annotations(slides: Iterable[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> AnnotationMatches:
    """Find each slide's file in a folder by name: ``case-1.geojson``, ``case-1.svs.json.gz``, ``case-1_mask.png``.

    Args:
        slides: paths or names; their last part counts.
        folder: searched with all folders in it; or one file, which then is that of the only slide.

    Raises:
        UsageError: the folder is not there, or two files belong to one slide.
    """
    names = [os.fspath(slide) for slide in slides]
    root = Path(folder)
    if root.is_file() and len(names) == 1:
        return AnnotationMatches({names[0]: root}, (), ())
    if not root.is_dir():
        raise UsageError(f"{root}: is no folder of annotations" + ("" if root.exists() else "; it is not there"))
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if _is_candidate(path) and path.is_file():
            found.setdefault(_stem(path).casefold(), []).append(path)
    files: dict[str, Path] = {}
    for name in names:
        candidates = [
            path
            for key in dict.fromkeys((Path(name).name.casefold(), _slide_stem(name).casefold()))
            for path in found.get(key, ())
            if path.resolve() != Path(name).resolve()
        ]
        if len(candidates) > 1:
            raise UsageError(
                f"{name}: several files could be its annotations ({', '.join(str(path) for path in candidates)}); leave one"
            )
        if candidates:
            files[name] = candidates[0]
    taken = {path.resolve() for path in (*files.values(), *map(Path, names))}
    unused = tuple(path for paths in found.values() for path in paths if path.resolve() not in taken)
    return AnnotationMatches(files, tuple(name for name in names if name not in files), unused)


def _is_candidate(path: Path) -> bool:
    name = path.name.lower().removesuffix(_PACKED)
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def _stem(path: Path) -> str:
    """A file's name without suffixes of annotation files and the endings people add."""
    name = path.name
    for suffix in (_PACKED, *_SUFFIXES):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    for ending in _ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _slide_stem(slide: str) -> str:
    return Path(slide).stem


def check_annotations(
    annotations: Sequence[Annotation], size: tuple[int, int], classes: Collection[str] | None = None
) -> tuple[str, ...]:
    """Say, a line each, what seems wrong with annotations of a slide; nothing where all is well.

    Looked for: none at all, axes swapped, shapes outside the slide, classes that are not among those wanted, and
    wanted classes that none has.

    Args:
        size: (width, height) of the slide in level-0 pixels.
        classes: the wanted ones; None where any will do.
    """
    if not annotations:
        return ("no annotations",)
    misplaced = check_places(annotations, size)
    lines = [] if misplaced is None else [misplaced]
    if classes is not None:
        counts = Counter(annotation.class_name for annotation in annotations)
        lines += [_unknown_class(name, n, classes) for name, n in counts.items() if name not in classes]
        lines += [f"no shape of the class {name!r}" for name in classes if name not in counts]
    return tuple(lines)


def check_places(annotations: Sequence[Annotation], size: tuple[int, int]) -> str | None:
    """Say in one line why annotations seem to lie elsewhere than on a slide of this (width, height); None if all is well."""
    return _swapped(annotations, size) or check_inside(annotations, size)


def _swapped(annotations: Sequence[Annotation], size: tuple[int, int]) -> str | None:
    x0, y0, x1, y1 = shapely.total_bounds(np.array([annotation.geometry for annotation in annotations], dtype=object))
    width, height = size
    fits = x0 >= -1 and y0 >= -1 and x1 <= width + 1 and y1 <= height + 1
    would_fit = x0 >= -1 and y0 >= -1 and y1 <= width + 1 and x1 <= height + 1
    if fits or not would_fit:
        return None
    return (
        f"x and y seem swapped: shapes reach ({x1:.0f}, {y1:.0f}) on a slide of {width} x {height} px, and all of them "
        f"fit with x and y the other way round; write them as x, y"
    )


def _unknown_class(name: str | None, count: int, classes: Collection[str]) -> str:
    shapes = f"{count} shape{'s' if count > 1 else ''}"
    wanted = ", ".join(classes)
    if name is None:
        return f"{shapes} without a class, none of {wanted}"
    by_case = {known.casefold(): known for known in classes}
    near = difflib.get_close_matches(name.casefold(), by_case, n=1)
    hint = f"; did you mean {by_case[near[0]]!r}?" if near else ""
    return f"{shapes} of the class {name!r}, which is none of {wanted}{hint}"
