"""SlideSource: which slides a folder, a file or a table holds. Content decides, and parts of a slide are not slides."""

import csv
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from wsi.errors import SlideNotFoundError, UsageError
from wsi.readers import is_remote
from wsi.resolution import parse_mpp

__all__ = ["Discovery", "SlideSource", "Unlisted", "discover", "read_table"]

# Files of these names are meant to be slides: one that no reader accepts is a failure, not something to pass over.
SLIDE_SUFFIXES = frozenset(
    (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".dicom", ".czi")
)
_MAGIC = (
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"ZISRAWFILE",
    b"SQLite format 3\0",
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"BM",
)
_STORE_FILE = "wsi-store.json"
_ZARR_FILES = ("zarr.json", ".zgroup", ".zattrs")
_RESULTS_FILES = ("run.json", "report.jsonl")  # whose masks are pyramids, too


@dataclass(frozen=True)
class SlideSource:
    """One slide to work on.

    Attributes:
        location: its file (the main one, of several), or an fsspec address.
        relpath: path below the cohort's root with forward slashes; what the slide's key is made of.
        bytes: size of all its files; 0 where that is not known.
        mpp: microns per pixel (x, y) from the table, if it has them.
        table: the table's other columns for this slide.
    """

    location: Path | str
    relpath: str
    bytes: int = 0
    mpp: tuple[float, float] | None = None
    table: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unlisted:
    """Something in the folder that is no slide, and why."""

    relpath: str
    reason: str


@dataclass(frozen=True)
class Discovery:
    """What was found, in path order."""

    sources: tuple[SlideSource, ...]
    unlisted: tuple[Unlisted, ...] = ()


def discover(
    slides: str | Path, *, table: Path | None = None, pattern: str | None = None, out: Path | None = None
) -> Discovery:
    """The slides at ``slides``: a folder (searched with all below it), one slide, an address, or a CSV table.

    Args:
        table: a CSV that says which slides below the folder to take, and what is known of them.
        pattern: only paths or names that match this glob, such as ``*.svs``.
        out: where results will go, which must be another folder; what lies in it is no slide.

    Raises:
        SlideNotFoundError: there is nothing at ``slides``.
        UsageError: the table cannot be understood, or the folder is one of results.
    """
    if is_remote(slides):
        return Discovery((SlideSource(str(slides), str(slides)),))
    root = Path(slides)
    if not root.exists():
        raise SlideNotFoundError(f"{root}: there is no such file or folder")
    if out is not None and root.resolve() == out.resolve():
        raise UsageError(f"{out}: OUT must be another folder than SLIDES, such as {out / 'features'}")
    if (root / _STORE_FILE).exists():
        raise UsageError(f"{root}: this folder is a feature store; name the folder of slides")
    if table is not None:
        found = Discovery(tuple(read_table(table, root=root if root.is_dir() else root.parent)))
    elif root.is_dir():
        found = _scan(root, out)
    elif root.suffix.lower() in (".csv", ".tsv"):
        found = Discovery(tuple(read_table(root, root=root.parent)))
    else:
        found = Discovery((SlideSource(root, root.name, _bytes_of(root)),))
    if pattern is None:
        return found
    kept = tuple(
        s for s in found.sources if fnmatch(s.relpath, pattern) or fnmatch(s.relpath.rsplit("/", 1)[-1], pattern)
    )
    return Discovery(kept)


def read_table(path: Path, *, root: Path) -> Iterator[SlideSource]:
    """Slides of a CSV with a column ``slide`` (path below ``root``, absolute path, or address), optionally ``mpp``.

    ``mpp`` is one number or ``x,y`` in quotes; other columns are kept as they are. Comma, semicolon and tab are understood.

    Raises:
        UsageError: no such column, a number that is none, or a slide named twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SlideNotFoundError(f"{path}: there is no such table") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a UTF-8 text table") from error
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    names = [name.lower() if name.lower() in ("slide", "mpp") else name for name in names]
    reader.fieldnames = names
    if names.count("slide") != 1 or names.count("mpp") > 1:
        raise UsageError(
            f"{path}: needs one column 'slide', and one 'mpp' at most; it has: {', '.join(names) or 'nothing'}"
        )
    seen: set[str] = set()
    for row in reader:
        name = (row.pop("slide") or "").strip()
        if not name:
            continue
        location, relpath = _place(name, root)
        if relpath in seen:
            raise UsageError(f"{path} line {reader.line_num}: slide {name} is listed twice")
        seen.add(relpath)
        yield SlideSource(
            location,
            relpath,
            0 if isinstance(location, str) else _bytes_of(location),
            _table_mpp(row.pop("mpp", None), f"{path} line {reader.line_num}"),
            {key: value for key, value in row.items() if key and isinstance(value, str)},
        )


def _table_mpp(text: str | None, where: str) -> tuple[float, float] | None:
    if not text or not text.strip():
        return None
    try:
        return parse_mpp(text)
    except ValueError as error:
        raise UsageError(f"{where}: column mpp: {error}") from error


def _place(name: str, root: Path) -> tuple[Path | str, str]:
    if is_remote(name):
        return name, name
    location = Path(os.path.normpath(root / name))
    try:
        return location, location.relative_to(os.path.normpath(root)).as_posix()
    except ValueError:
        return location, location.as_posix()


def _made_by_us(folder: Path, out: Path | None) -> str | None:
    """What a folder below the slides is that this engine made, in which nothing is a slide; None for any other."""
    if (folder / _STORE_FILE).exists():
        return "a feature store"
    if out is not None and folder.resolve() == out.resolve():
        return "the folder of results"
    if all((folder / name).exists() for name in _RESULTS_FILES):
        return "results of a segmentation"
    return None


def _scan(root: Path, out: Path | None) -> Discovery:
    sources: list[SlideSource] = []
    unlisted: list[Unlisted] = []
    seen: set[tuple[int, int]] = set()

    def walk(folder: Path) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            sources.append(SlideSource(folder, _rel(folder, root)))  # fails by name: nobody knows what is in it
            return
        files: list[Path] = []
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            try:
                facts = entry.stat()
            except OSError:
                if _suffix_says_slide(path):
                    sources.append(SlideSource(path, _rel(path, root)))  # fails by name: it is meant to be a slide
                else:
                    unlisted.append(Unlisted(_rel(path, root), "a link that leads nowhere"))
                continue
            identity = (facts.st_dev, facts.st_ino)
            if identity in seen:  # a loop of links, or a second name for the same file
                unlisted.append(Unlisted(_rel(path, root), "the same file or folder is there under another name"))
                continue
            seen.add(identity)
            if not entry.is_dir():
                files.append(path)
            elif made := _made_by_us(path, out):
                unlisted.append(Unlisted(_rel(path, root), made))
            elif any((path / name).exists() for name in _ZARR_FILES):
                sources.append(SlideSource(path, _rel(path, root)))
            elif not (path / "Slidedat.ini").exists():  # else the companion of a .mrxs file
                walk(path)
        _add_files(files, root, sources, unlisted)

    walk(root)
    return Discovery(tuple(sorted(sources, key=lambda s: s.relpath)), tuple(sorted(unlisted, key=lambda u: u.relpath)))


def _add_files(files: list[Path], root: Path, sources: list[SlideSource], unlisted: list[Unlisted]) -> None:
    """Sort the files of one folder into slides, parts of slides, and others."""
    parts = {part for path in files if path.suffix.lower() in (".vms", ".vmu") for part in _hamamatsu_parts(path)}
    series: dict[str, list[tuple[tuple[bool, int], Path]]] = {}
    for path in files:
        kind = _sniff(path)
        if kind == "dicom":
            uid, rank = _dicom_rank(path)
            series.setdefault(uid, []).append((rank, path))
        elif kind == "slide" and path.name not in parts:
            sources.append(SlideSource(path, _rel(path, root), _bytes_of(path)))
        elif kind != "slide":
            unlisted.append(Unlisted(_rel(path, root), kind))
    for instances in series.values():
        main = max(instances, key=lambda item: (item[0], item[1].name))[1]
        size = sum(path.stat().st_size for _, path in instances)
        sources.append(SlideSource(main, _rel(main, root), size))


def _sniff(path: Path) -> str:
    """``"slide"`` for what may be one, ``"dicom"``, or why it is none."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        return "slide" if _suffix_says_slide(path) else f"cannot be read: {error.strerror}"
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or _suffix_says_slide(path):
        return "slide"
    return "not a picture" if head else "an empty file"


def _suffix_says_slide(path: Path) -> bool:
    return path.suffix.lower() in SLIDE_SUFFIXES


def _dicom_rank(path: Path) -> tuple[str, tuple[bool, int]]:
    """Series, and how much this instance is the one to open: a volume before labels, a wide one before a narrow one."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    tags = ["SeriesInstanceUID", "ImageType", "TotalPixelMatrixColumns"]
    try:
        facts = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except (InvalidDicomError, OSError, ValueError, KeyError, AttributeError):
        return str(path), (False, 0)
    volume = "VOLUME" in (facts.get("ImageType") or [])
    return str(facts.get("SeriesInstanceUID", path)), (volume, int(facts.get("TotalPixelMatrixColumns") or 0))


def _hamamatsu_parts(path: Path) -> set[str]:
    """Names of the pictures that a .vms or .vmu file lists."""
    try:
        text = path.read_text(encoding="latin-1")
    except OSError:
        return set()
    return {line.strip() for line in re.findall(r"=(.*\.(?:jpg|jpeg|ngr|opt))\s*$", text, re.IGNORECASE | re.MULTILINE)}


def _bytes_of(path: Path) -> int:
    try:
        size = path.stat().st_size
        if path.suffix.lower() == ".mrxs":
            size += sum(part.stat().st_size for part in path.with_suffix("").glob("*") if part.is_file())
    except OSError:
        return 0  # opening it says what is wrong
    return size


def _rel(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
