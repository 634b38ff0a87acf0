"""Prepare one slide: open it, find or take its tissue, lay the grid, draw the picture, write what a person looks at."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import shapely

from features.keys import slide_key
from features.selection import Selection, select_tiles, selection_facts
from features.store import FeatureStore, SlideStore
from features.writing import disk_errors, replace_slide, write_slide
from wsi._files import file_sha256, write_atomically
from wsi.annotation import Annotation, check_inside, tissue_annotations
from wsi.discover import SlideSource
from wsi.errors import SourceChangedError, UsageError
from wsi.geojson import read_geojson, write_geojson
from wsi.grid import TileGrid, Tiling
from wsi.picture import draw_overview, jpeg_bytes
from wsi.readers import is_remote
from wsi.slide import Overview, Slide, fingerprint, region_of
from wsi.tissue import TissueOptions

__all__ = [
    "PrepareOptions",
    "Prepared",
    "grid_slide",
    "is_current",
    "prepare_slide",
    "read_outlines",
    "tissue_file",
]

IGNORED_CLASS = "Ignore*"  # QuPath's own class for what is to be left out: it is cut out of given tissue
_PICTURE_PX, _LEAST_PICTURE_PX = 2048, 512  # longer side of the picture: of large slides, and of those where it costs


@dataclass(frozen=True)
class PrepareOptions:
    """What decides a slide's grid.

    Attributes:
        tiling: how tiles are laid.
        tissue: how tissue is looked for.
        reader: which reader opens slides.
        slide_mpp: (x, y) microns per pixel of level 0 for every slide, over what files and tables say.
        tissue_dir: folder of GeoJSON outlines to use instead of looking; slides without a file there are looked at.
        roi: a GeoJSON file for all slides, or a folder with one a slide: only what lies inside counts.
        select: which of the tiles that hold tissue are taken; None for all of them.
    """

    tiling: Tiling = field(default_factory=Tiling)
    tissue: TissueOptions = field(default_factory=TissueOptions)
    reader: str = "auto"
    slide_mpp: tuple[float, float] | None = None
    tissue_dir: Path | None = None
    roi: Path | None = None
    select: Selection | None = None

    @property
    def select_facts(self) -> dict[str, Any] | None:
        """``select`` as JSON."""
        return None if self.select is None else selection_facts(self.select)


@dataclass(frozen=True)
class Prepared:
    """An open slide with its grid in the store; ``notes`` are remarks a person should see."""

    slide: Slide
    store: SlideStore
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gridded:
    """A slide's tissue and tiles, nothing written yet.

    ``given`` is the file the outlines came from, ``view`` the picture that they were found in: one of them is there.
    ``selection`` says how tiles were chosen and from how many, where not all of them are taken.
    """

    outlines: tuple[Annotation, ...]
    grid: TileGrid
    facts: dict[str, Any]
    notes: tuple[str, ...]
    given: Path | None = None
    view: Overview | None = None
    selection: dict[str, Any] | None = None


def prepare_slide(source: SlideSource, key: str, store: FeatureStore, options: PrepareOptions) -> Prepared:
    """Open a slide and have its grid in the store, with its tissue GeoJSON and picture beside it.

    A grid that is there and current is taken as it is. One that is there but was made from other outlines is moved to
    ``.replaced`` with its features.
    """
    slide = Slide.open(source.location, mpp=options.slide_mpp, csv_mpp=source.mpp, reader=options.reader)
    try:
        existing = store.find(key)
        if existing is not None and is_current(existing, source, options):
            return Prepared(slide, existing, tuple(_mpp_notes(slide, existing.grid, options.tiling)))
        gridded = grid_slide(slide, source, options)
        outlines = store.root / "tissue" / f"{key}.geojson"
        with disk_errors(store.root), ThreadPoolExecutor(1) as pool:
            picture = pool.submit(_write_picture, store.root / "thumbnails" / f"{key}.jpg", slide, gridded)
            if (
                gridded.given is None or gridded.given.resolve() != outlines.resolve()
            ):  # else a person edits that very file
                write_geojson(outlines, gridded.outlines, slide.frame)
            provenance = {
                "slide": _slide_facts(slide, source, key),
                "tissue": gridded.facts | {"geojson_sha256": file_sha256(outlines)},
            }
            if gridded.selection is not None:
                provenance["selection"] = gridded.selection
            picture.result()
        notes = gridded.notes
        if existing is not None:  # last, so that whatever failed above has cost nothing
            aside = replace_slide(store, key).relative_to(store.root)
            notes = (f"made anew for other outlines, region or resolution; what was there is in {aside}", *notes)
        return Prepared(slide, write_slide(store, key, gridded.grid, provenance), notes)
    except BaseException:
        slide.close()
        raise


def grid_slide(slide: Slide, source: SlideSource, options: PrepareOptions) -> Gridded:
    """Tissue and tiles of an open slide. Nothing is written."""
    lattice = slide.lattice(options.tiling)  # first: a scan that is too coarse is refused before any pixel is read
    given = tissue_file(options.tissue_dir, source)
    roi_file = _roi_file(options.roi, source)
    if options.roi is not None and roi_file is None:
        raise UsageError(
            f"{options.roi}: holds no region of interest for {source.relpath} (looked for {source.relpath}.geojson)"
        )
    notes = _mpp_notes(slide, lattice, options.tiling)
    if not len(lattice):
        notes.append("the slide is smaller than one tile; --edge pad takes it all the same")
    view = None
    if given is None:
        if options.tissue_dir is not None:
            notes.append(f"no outlines for it in {options.tissue_dir}: tissue was looked for")
        view = slide.tissue_view(options.tissue)
        outlines = slide.tissue(options.tissue, view=view)
        found_at = [round(um * step, 4) for um, step in zip(slide.mpp.xy, view.scale, strict=True)]
        facts: dict[str, Any] = {"source": "found", "options": asdict(options.tissue), "found_at_mpp": found_at}
    else:
        outlines, remarks = read_outlines(given, slide)
        facts = {"source": "given", "file": str(given), "sha256": file_sha256(given)}
        notes += [f"tissue from {given.name}", *remarks]
    roi = None
    if roi_file is not None:
        roi, remarks = read_outlines(roi_file, slide)
        facts["roi_sha256"] = file_sha256(roi_file)
        notes += remarks
    region = region_of(outlines, roi, holes=options.tiling.holes)
    facts |= {"n_pieces": len(outlines), "area_mm2": round(float(region.area) * slide.mpp.x * slide.mpp.y / 1e6, 4)}
    grid, selection = lattice.keep(region, options.tiling.min_tissue), None
    if options.select is not None:
        chosen = select_tiles(slide, grid, options.select)
        selection = selection_facts(options.select) | {"of_tiles": len(grid)}
        grid, notes = grid.take(chosen.rows), [*notes, *chosen.notes]
    return Gridded(outlines, grid, facts, tuple(notes), given, view, selection)


def is_current(stored: SlideStore, source: SlideSource, options: PrepareOptions) -> bool:
    """Whether a stored grid is what these options would make of this slide, judged without opening it.

    Given tissue stays in force when a later run gives none.

    Raises:
        SourceChangedError: the slide's file is not the one the grid was made from.
    """
    about, tissue = stored.manifest["slide"], stored.manifest["tissue"]
    _check_source(about, source)
    stated = options.slide_mpp or source.mpp
    if stated is not None and tuple(about["mpp"]) != stated:
        return False
    given = tissue_file(options.tissue_dir, source)
    if given is not None and file_sha256(given) not in (tissue.get("sha256"), tissue["geojson_sha256"]):
        return False
    if tissue["source"] == "found" and tissue["options"] != asdict(options.tissue):
        return False
    roi = _roi_file(options.roi, source)
    if options.roi is not None and roi is None:
        return False
    return bool((None if roi is None else file_sha256(roi)) == tissue.get("roi_sha256"))


def _check_source(about: dict[str, Any], source: SlideSource) -> None:
    if is_remote(source.location):
        return  # a look at every address on every run would cost more than it tells
    then, path = about["file"], Path(source.location)
    try:
        now = path.stat()
    except FileNotFoundError:
        return  # its features are there, and that is what was asked for
    if (now.st_size, now.st_mtime_ns) == (then["bytes"], then["mtime_ns"]):
        return
    if fingerprint(path) != {"bytes": then["bytes"], "sample_sha256": then["sample_sha256"]}:
        raise SourceChangedError(
            f"{path}: not the file its features were made from (they differ in size or content); write to another OUT, or "
            f"delete the slide from the store with wsi remove"
        )


def _write_picture(path: Path, slide: Slide, gridded: Gridded) -> None:
    view, few = _picture_view(slide, gridded.view), gridded.selection is not None
    picture = draw_overview(view, gridded.outlines, gridded.grid, few=few)
    write_atomically(path, jpeg_bytes(picture))


def _picture_view(slide: Slide, seen: Overview | None) -> Overview:
    """A picture of the slide for people, from what has been read of it if that will do.

    A small slide's is as large as a reduced level: to make a larger one, all of level 0 would have to be decoded, which
    is what its features cost.
    """
    if seen is not None and max(seen.image.shape) >= _PICTURE_PX:
        return seen.reduced(_PICTURE_PX)
    reduced = max((max(size) for size in slide.reader.sizes[1:]), default=0)
    return slide.overview(max_px=reduced if _LEAST_PICTURE_PX <= reduced < _PICTURE_PX else _PICTURE_PX)


def _slide_facts(slide: Slide, source: SlideSource, key: str) -> dict[str, Any]:
    remote = is_remote(source.location)
    file = fingerprint(source.location) | {"mtime_ns": None if remote else Path(source.location).stat().st_mtime_ns}
    bounds = slide.reader.bounds
    return {
        "key": key,
        "relpath": source.relpath,
        "location": str(source.location),
        "file": file,
        "size": list(slide.size),
        "levels": [list(size) for size in slide.reader.sizes],
        "mpp": list(slide.mpp.xy),
        "mpp_source": slide.mpp.source,
        "mpp_estimated": slide.mpp.estimated,
        "bounds": None if bounds is None else [bounds.x, bounds.y, bounds.w, bounds.h],
        "vendor": slide.vendor,
        "reader": slide.reader.name,
        "reader_reason": slide.reader.reason,
        "table": dict(source.table),
    }


def _mpp_notes(slide: Slide, grid: TileGrid, tiling: Tiling) -> list[str]:
    notes = []
    if slide.mpp.estimated:
        notes.append(f"mpp {slide.mpp.x:g} is estimated from the {slide.mpp.source}; --slide-mpp if you know better")
    if abs(grid.mpp[0] / tiling.mpp - 1) > 0.05:
        notes.append(f"tiles have {grid.mpp[0]:.3g} mpp, the scan's own, not {tiling.mpp:g}")
    return notes


def _roi_file(roi: Path | None, source: SlideSource) -> Path | None:
    return roi if roi is None or roi.is_file() else tissue_file(roi, source)


def tissue_file(folder: Path | None, source: SlideSource) -> Path | None:
    """The GeoJSON for a slide in a folder of them: by store key, relative path, file name, or stem, in this order.

    Raises:
        UsageError: the folder is not there.
    """
    if folder is None:
        return None
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder of outlines")
    name = source.relpath.rsplit("/", 1)[-1]
    for stem in (
        slide_key(source.relpath),
        source.relpath,
        name,
        source.relpath.rsplit(".", 1)[0],
        name.rsplit(".", 1)[0],
    ):
        for suffix in (".geojson", ".json", ".geojson.gz"):
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return path
    return None


def read_outlines(path: Path, slide: Slide) -> tuple[tuple[Annotation, ...], list[str]]:
    """Polygons of a GeoJSON file less what is of QuPath's class ``Ignore*``, and remarks on what was wrong in it."""
    contents = read_geojson(path, origin=slide.frame.origin)
    remarks = [f"{path.name}: feature {r.index} left out: {r.reason}" for r in contents.rejected]
    hint = check_inside(contents.annotations, slide.size)
    if hint is not None:
        remarks.append(f"{path.name}: {hint}")
    kept = [a.geometry for a in contents.annotations if a.class_name != IGNORED_CLASS]
    cut = [a.geometry for a in contents.annotations if a.class_name == IGNORED_CLASS]
    pieces = shapely.get_parts(shapely.difference(shapely.union_all(kept), shapely.union_all(cut)))
    if contents.annotations and not any(piece.geom_type == "Polygon" for piece in pieces):
        remarks.append(f"{path.name}: none of its {len(contents.annotations)} shapes has an area")
    polygons: Sequence[shapely.Polygon] = [piece for piece in pieces if piece.geom_type == "Polygon"]
    return tissue_annotations(polygons, slide.mpp.xy), remarks
