"""Pictures: everything there is to see of prototypes in a cohort, drawn into a folder."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mil.cohort import Cohort
from mil.prototypes.charts import proportions, share_map
from mil.prototypes.maps import map_slide
from mil.prototypes.palette import prototype_name, slide_name
from mil.prototypes.sheets import atlas, contact_sheet, tile_pixels
from mil.prototypes.survey import Survey
from mil.sources import StoreSource
from wsi._files import write_atomically, write_table
from wsi.errors import SlideError, UsageError
from wsi.slide import Slide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mil.sources import BagSource

__all__ = ["draw_charts", "draw_maps", "draw_sheets"]

_DPI = 150
_MAP_PX = 2048
_MOST_BARS = 100  # of slides; a picture of more is not read, the table is


def draw_sheets(
    survey: Survey, source: "BagSource", folder: Path, *, done: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Write ``prototypes.png`` and ``sheets/``.

    Args:
        source: the store that the survey was made of.
        done: is told each slide whose tiles have been read.

    Returns:
        Slides whose pixels could not be read, and why.
    """
    store, failed = _store_of(source).store, dict[str, str]()
    pixels = tile_pixels(
        store, source, [tile for near in survey.nearest for tile in near],
        failed=lambda slide, error: failed.update({slide: str(error)}), done=done,
    )  # fmt: skip
    save(atlas(survey, pixels), folder / "prototypes.png")
    for index in range(survey.prototypes.k):
        name = prototype_name(index).lower().replace(" ", "-")
        save(contact_sheet(survey, index, pixels), folder / "sheets" / f"{name}.png")
    return failed


def draw_charts(survey: Survey, folder: Path, cohort: Cohort | None = None) -> None:
    """Write ``shares.csv``, ``shares.png`` (of up to 100 slides) and ``cohort.png``.

    Args:
        cohort: whose classes are shown beside the slides, where its target has classes.
    """
    head = ("slide", "tiles", *(prototype_name(index) for index in range(survey.prototypes.k)))
    each = zip(survey.slides, survey.n_tiles.tolist(), survey.shares.tolist(), strict=True)
    rows = ((slide_name(slide), tiles, *(f"{share:.6g}" for share in shares)) for slide, tiles, shares in each)
    write_table(folder / "shares.csv", head, rows)
    if len(survey.slides) <= _MOST_BARS:
        save(proportions(survey), folder / "shares.png")
    labels = {}
    if cohort is not None and cohort.target.is_classes:
        task = cohort.tasks[0]
        labels = {slide: task.word(row) for row, slide in enumerate(cohort.slides) if task.known[row]}
    save(share_map(survey, labels), folder / "cohort.png")


def draw_maps(
    survey: Survey, source: "BagSource", folder: Path, *, done: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Write ``maps/``: a picture and a GeoJSON file of each slide, by its key.

    Returns:
        Slides whose pixels could not be read, and why; their maps are drawn on white.
    """
    store, failed = _store_of(source).store, {}
    for key in survey.slides:
        made = map_slide(source, key, survey.prototypes)
        about = store.slide(key).manifest["slide"]
        view = None
        try:
            with Slide.open(about["location"], mpp=tuple(about["mpp"])) as slide:
                view = slide.overview(max_px=_MAP_PX)
        except SlideError as error:
            failed[key] = str(error)
        made.save(folder / "maps" / f"{key}.jpg", view=view)
        made.save(folder / "maps" / f"{key}.geojson")
        if done is not None:
            done(key)
    return failed


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG; the file is whole or not there."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    write_atomically(path, buffer.getvalue())


def _store_of(source: "BagSource") -> StoreSource:
    if not isinstance(source, StoreSource):
        raise UsageError("pictures of slides need a feature store, which says where they are")
    return source
