"""Contact sheets: what prototypes look like, by the tiles nearest to them."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from features.store import FeatureStore
from mil.prototypes.palette import prototype_color, prototype_name, short_name
from mil.prototypes.survey import NearTile, Survey
from mil.sources import BagSource
from wsi.errors import SlideError
from wsi.readers.base import Pixels
from wsi.slide import Slide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["atlas", "contact_sheet", "tile_pixels"]

_TILE_INCHES = 1.6


def tile_pixels(
    store: FeatureStore,
    source: BagSource,
    tiles: Iterable[NearTile],
    *,
    failed: Callable[[str, SlideError], None],
    done: Callable[[str], None] | None = None,
) -> dict[NearTile, Pixels]:
    """Pixels (tile_px, tile_px, 3) of tiles, read from the slides' own files, each of which is opened once.

    Tiles that cannot be read are not in the answer.

    Args:
        source: by which the tiles were found.
        failed: is told each slide whose file cannot be opened, or not be read everywhere, and why.
        done: is told each slide.
    """
    by_slide: dict[str, list[NearTile]] = {}
    for tile in tiles:
        by_slide.setdefault(tile.slide, []).append(tile)
    found = {}
    for name, own in by_slide.items():
        about, place = store.slide(name).manifest["slide"], source.place(name)
        try:
            with Slide.open(about["location"], mpp=tuple(about["mpp"])) as slide:
                for tile in own:
                    found[tile] = slide.read_tile(place.grid, int(place.rows[tile.row]))
        except SlideError as error:
            failed(name, error)
        if done is not None:
            done(name)
    return found


def contact_sheet(survey: Survey, index: int, pixels: Mapping[NearTile, Pixels], *, columns: int = 4) -> "Figure":
    """The tiles nearest to one prototype, nearest first; below each its slide and its distance.

    Args:
        index: of the prototype, from 0.
        pixels: of the tiles (``tile_pixels``); a tile without is an empty frame.
    """
    from matplotlib.figure import Figure

    tiles = survey.nearest[index]
    rows = max(1, -(-len(tiles) // columns))
    figure = Figure(figsize=(columns * (_TILE_INCHES + 0.35), rows * (_TILE_INCHES + 0.55) + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(tiles):
            axes.set_axis_off()
            continue
        tile = tiles[place]
        _draw(axes, pixels.get(tile), index)
        axes.set_xlabel(f"{short_name(tile.slide)}\ndistance {tile.distance:.3g}", fontsize=7, labelpad=3)
    with_it = int((survey.shares[:, index] > 0).sum())
    figure.suptitle(
        f"{prototype_name(index)}: {survey.total[index]:.1%} of all tiles, in {with_it} of {len(survey.slides)} slides",
        fontsize=11,
    )
    return figure


def atlas(survey: Survey, pixels: Mapping[NearTile, Pixels], *, columns: int = 8) -> "Figure":
    """All prototypes on one sheet: a row each, with the ``columns`` tiles nearest to it.

    Args:
        pixels: as for ``contact_sheet``.
    """
    from matplotlib.figure import Figure

    k, side = survey.prototypes.k, 0.95
    columns = max(1, min(columns, max(map(len, survey.nearest))))
    figure = Figure(figsize=(1.15 + columns * side * 1.05, k * side * 1.05 + 0.1))
    room = 1.15 / figure.get_figwidth()
    grid = figure.subplots(
        k, columns, squeeze=False,
        gridspec_kw={"left": room, "right": 0.995, "bottom": 0.01, "top": 0.99, "wspace": 0.04, "hspace": 0.06},
    )  # fmt: skip
    for index in range(k):
        for place, axes in enumerate(grid[index]):
            if place >= len(survey.nearest[index]):
                axes.set_axis_off()
            else:
                _draw(axes, pixels.get(survey.nearest[index][place]), index, width=1.5)
        box = grid[index, 0].get_position()
        middle = (box.y0 + box.y1) / 2
        figure.text(
            room - 0.1 / figure.get_figwidth(),
            middle,
            f"{prototype_name(index)}\n{survey.total[index]:.1%}",
            ha="right",
            va="center",
            fontsize=9,
        )
    return figure


def _draw(axes: "Axes", pixels: Pixels | None, index: int, *, width: float = 2.5) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if pixels is not None:
        axes.imshow(pixels, interpolation="antialiased")
    else:
        axes.set_aspect("equal")
        axes.text(0.5, 0.5, "no pixels", ha="center", va="center", fontsize=7, color="0.5", transform=axes.transAxes)
    for spine in axes.spines.values():
        spine.set(color=[value / 255 for value in prototype_color(index)], linewidth=width)
