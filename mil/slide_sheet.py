"""Sheet of slides: thumbnails of a slide and of those found to be like it, side by side."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from features.store import FeatureStore
from mil.predict import overview_of
from mil.prototypes.palette import short_name
from mil.search import Hit
from wsi._files import write_atomically

__all__ = ["draw_hits"]

_COLUMNS, _INCHES, _DPI, _THUMBNAIL_PX = 6, 2.1, 150, 480


def draw_hits(
    store: FeatureStore | str | Path,
    query: str,
    hits: Sequence[Hit],
    path: Path,
    labels: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write a PNG: the query first, then what was found, each with its name, similarity and label.

    Returns:
        Slides whose files are gone or cannot be read; their places are empty.
    """
    from matplotlib.figure import Figure

    store = store if isinstance(store, FeatureStore) else FeatureStore(store)
    columns = min(_COLUMNS, len(hits) + 1)
    rows = -(-(len(hits) + 1) // columns)
    figure = Figure(figsize=(columns * _INCHES, rows * (_INCHES + 0.55)), layout="constrained")
    gone = []
    places = [(query, "asked with"), *((hit.slide, f"{hit.similarity:.3f}") for hit in hits)]
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(places) :]:
        axes.set_axis_off()
    for axes, (slide, words) in zip(grid.flat, places, strict=False):
        axes.set_xticks([])
        axes.set_yticks([])
        view = overview_of(store.slide(slide))
        if view is None:
            gone.append(slide)
            axes.set_box_aspect(1)
            axes.text(
                0.5, 0.5, "no pixels", ha="center", va="center", fontsize=8, color="0.5", transform=axes.transAxes
            )
        else:
            axes.imshow(view.reduced(_THUMBNAIL_PX).image, interpolation="antialiased")
        label = f"  {labels[slide]}" if labels and slide in labels else ""
        axes.set_xlabel(f"{short_name(slide)}\n{words}{label}", fontsize=8)
        for spine in axes.spines.values():
            spine.set(color="black" if slide == query else "0.8", linewidth=2 if slide == query else 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    write_atomically(path, buffer.getvalue())
    return tuple(gone)
