"""Selection: which tiles of a slide's grid are to stand for all of them, so that a few dozen are enough."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.mosaic import Mosaic, colour_histograms, mosaic
from wsi.errors import UsageError
from wsi.fps import THUMBNAIL_PX, FastPatches, fast_patches, spread
from wsi.grid import Box, TileGrid
from wsi.slide import Slide
from wsi.tissue import MAX_PIXELS

__all__ = [
    "SELECTIONS",
    "Selected",
    "Selection",
    "parse_selection",
    "select_rows",
    "select_tiles",
    "selection_facts",
    "selection_from_facts",
]

Selection = FastPatches | Mosaic

SELECTIONS: Mapping[str, type[FastPatches] | type[Mosaic]] = MappingProxyType({"fps": FastPatches, "mosaic": Mosaic})

_MOSAIC_MPP = 2.0  # of the picture that colours are taken from: 5x, as in the paper


class Selected(NamedTuple):
    """Rows of the tiles that were chosen, ascending, and remarks for a person."""

    rows: NDArray[np.int64]
    notes: tuple[str, ...] = ()


def parse_selection(text: str) -> Selection:
    """``fps``, ``mosaic``, or with settings: ``mosaic:k=9,share=0.1,seed=0``.

    Raises:
        UsageError: no such selection or setting, or a value that cannot be.
    """
    name, _, rest = text.strip().partition(":")
    settings: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, word = pair.partition("=")
        if not equals:
            raise UsageError(f"selection {text!r}: write KEY=VALUE where {pair!r} stands")
        settings[key.strip()] = word.strip()
    return selection_from_facts({"method": name, **settings})


def selection_facts(selection: Selection) -> dict[str, Any]:
    """A selection as JSON: ``method`` and its settings."""
    method = next(name for name, made in SELECTIONS.items() if type(selection) is made)
    return {"method": method, **asdict(selection)}


def selection_from_facts(facts: Mapping[str, Any]) -> Selection:
    """The selection of these facts; numbers may be words.

    Raises:
        UsageError: as ``parse_selection``.
    """
    settings = dict(facts)
    method = settings.pop("method")
    if method not in SELECTIONS:
        raise UsageError(f"no selection of tiles {method!r}; there are {', '.join(SELECTIONS)}")
    kinds = {field.name: field.type for field in fields(SELECTIONS[method])}
    for key, value in settings.items():
        if key not in kinds:
            raise UsageError(f"{method} has no setting {key!r}; it has {', '.join(kinds)}")
        try:
            settings[key] = int(value) if kinds[key] is int else float(value)
        except ValueError:
            raise UsageError(f"{method}: {key} is a number, not {value!r}") from None
    try:
        return SELECTIONS[method](**settings)
    except ValueError as error:
        raise UsageError(f"{method}: {error}") from None


def select_tiles(slide: Slide, grid: TileGrid, selection: Selection) -> Selected:
    """Choose tiles of an open slide by a picture of it; ``grid`` has those that hold tissue.

    Tiles that lie where the picture could not be read are not chosen.
    """
    match selection:
        case FastPatches():
            view = slide.overview(max_px=THUMBNAIL_PX)
            rows = np.flatnonzero(_readable(grid, view.unreadable))
            found = fast_patches(view, grid.take(rows), slide.mpp.xy, selection)
            if len(rows) and not len(found):
                wide = f"patches of {selection.patch_um:g} µm, {selection.tissue:.0%} tissue"
                return Selected(
                    rows[found], (f"no tile chosen: {wide}, fit nowhere; ask for less with fps:patch_um=,tissue=",)
                )
        case Mosaic():
            width_um, height_um = (pixels * um for pixels, um in zip(slide.size, slide.mpp.xy, strict=True))
            view = slide.overview(mpp=max(_MOSAIC_MPP, (width_um * height_um / MAX_PIXELS) ** 0.5))
            rows = np.flatnonzero(_readable(grid, view.unreadable))
            kept = grid.take(rows)
            found = mosaic(colour_histograms(view, kept), kept.xy, selection)
    return Selected(rows[found])


def select_rows(
    grid: TileGrid, features: NDArray[np.floating], mpp: tuple[float, float], selection: Selection
) -> NDArray[np.int64]:
    """Choose tiles that have features already, without their slide: rows, ascending.

    A mosaic groups them by their features in place of colours; fps lets tiles of the grid lie as far apart as its patches.

    Args:
        grid: (N) tiles.
        features: (N, D) their vectors.
        mpp: microns per pixel of level 0, x and y.
    """
    match selection:
        case FastPatches():
            return spread(grid, mpp, selection)
        case Mosaic():
            return mosaic(np.asarray(features, np.float32), grid.xy, selection)


def _readable(grid: TileGrid, unreadable: tuple[Box, ...]) -> NDArray[np.bool_]:
    """(N,) whether a tile has nothing in common with these level-0 boxes."""
    clear = np.ones(len(grid), np.bool_)
    for box in unreadable:
        low, high = np.array([box.x, box.y]), np.array([box.x + box.w, box.y + box.h])
        clear &= ~((grid.xy < high) & (grid.xy + np.array(grid.side) > low)).all(axis=1)
    return clear
