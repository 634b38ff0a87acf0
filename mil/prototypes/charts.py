"""Charts of shares: a bar a slide, and a cohort's heat map of slides × prototypes.

Each returns a matplotlib Figure and leaves pyplot alone.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mil.prototypes.palette import prototype_color, slide_name
from mil.prototypes.survey import Survey
from wsi.annotation import class_color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["proportions", "share_map"]

_MOST_NAMES = 80  # of slides written beside a heat map; more could not be read


def proportions(survey: Survey, slides: Sequence[str] | None = None) -> "Figure":
    """What slides are made of: a bar each, a colour a prototype, the most common first.

    Args:
        slides: which, in this order; by default all.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = survey.slides if slides is None else tuple(slides)
    rows = [survey.slides.index(name) for name in names]
    k = survey.prototypes.k
    columns = min(k, 8)
    figure = Figure(figsize=(7.5, 0.24 * len(rows) + 0.3 * -(-k // columns) + 0.6), layout="constrained")
    axes = figure.subplots()
    start = np.zeros(len(rows))
    for index in range(k):
        width = survey.shares[rows, index]
        axes.barh(
            range(len(rows)), width, left=start, height=0.8, color=_rgb(prototype_color(index)), ec="white", lw=0.4
        )
        start += width
    axes.set_yticks(range(len(rows)), [slide_name(name) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the slide's tiles", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=_rgb(prototype_color(index)), label=str(index + 1)) for index in range(k)]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=7, title="prototype",
        title_fontsize=7, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    return figure


def share_map(survey: Survey, labels: Mapping[str, str] | None = None) -> "Figure":
    """Slides × prototypes, the shade a share, slides and prototypes ordered so that like ones stand together.

    Slides are clustered by their square roots of shares (Hellinger distance: rare prototypes count, without those of a tile or
    two deciding), prototypes by their shares' correlation over slides; average linkage.

    Args:
        labels: what is known of slides, such as a class; a strip of colours beside them shows it.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shares = survey.shares
    slide_order, slide_tree = _clustered(np.sqrt(shares), "euclidean")
    proto_order, proto_tree = _clustered(_standardised(shares).T, "euclidean")
    n, k = shares.shape
    few = n <= _MOST_NAMES
    height = max(2.6, (0.2 if few else 0.03) * n)
    width = max(2.4, 0.36 * k)
    named = 1.9 if few else 0.2
    known = sorted(set(labels.values())) if labels else []
    strip = 0.16 if known else 0.001
    figure = Figure(figsize=(0.9 + strip + width + named + 1.2, height + 1.5), layout="constrained")
    grid = figure.subplots(
        2, 4, squeeze=False, width_ratios=[0.7, strip, width, 0.14], height_ratios=[0.55, height],
        gridspec_kw={"wspace": 0.02, "hspace": 0.02},
    )  # fmt: skip
    for axes in (*grid[0, [0, 1, 3]], *grid[1, [0, 1]], grid[0, 2]):
        axes.set_axis_off()
    _draw_tree(grid[1, 0], slide_tree, "left")
    _draw_tree(grid[0, 2], proto_tree, "top")
    axes = grid[1, 2]
    image = axes.imshow(np.sqrt(shares[np.ix_(slide_order, proto_order)]), aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(k), [str(index + 1) for index in proto_order], fontsize=8)
    for tick, index in zip(axes.get_xticklabels(), proto_order, strict=True):
        tick.set(
            bbox={"boxstyle": "round,pad=0.22", "fc": _rgb(prototype_color(int(index))), "ec": "none"},
            color="white" if _is_dark(prototype_color(int(index))) else "black",
        )
    axes.tick_params(length=0, pad=5)
    axes.set_xlabel("prototype", fontsize=8)
    axes.yaxis.tick_right()
    if few:
        axes.set_yticks(range(n), [slide_name(survey.slides[i]) for i in slide_order], fontsize=7)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{n} slides", fontsize=8)
    if labels:
        colours = np.array(
            [
                _rgb(class_color(labels[survey.slides[i]])) if survey.slides[i] in labels else (1, 1, 1)
                for i in slide_order
            ]
        )
        grid[1, 1].imshow(colours[:, None], aspect="auto")
        handles = [Patch(color=_rgb(class_color(label)), label=label) for label in known]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(known)), frameon=False, fontsize=8)
    bar = figure.colorbar(image, cax=grid[1, 3])
    ticks = [share for share in (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1) if np.sqrt(share) <= image.norm.vmax + 1e-9]
    bar.set_ticks([float(np.sqrt(share)) for share in ticks], labels=[f"{share:.0%}" for share in ticks], fontsize=7)
    bar.set_label("share of tiles", fontsize=8)
    bar.outline.set_visible(False)
    return figure


def _clustered(x: NDArray[np.float64], metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    """The order of the rows in their tree, and the tree; of a single row none."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(x) < 2:
        return np.arange(len(x)), None
    tree = linkage(x, "average", metric, optimal_ordering=len(x) <= 500)
    return np.asarray(leaves_list(tree), np.int64), tree


def _standardised(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = shares.std(axis=0)
    return np.asarray((shares - shares.mean(axis=0)) / np.where(deviation > 0, deviation, 1))


def _draw_tree(axes: object, tree: NDArray[np.float64] | None, side: str) -> None:
    from scipy.cluster.hierarchy import dendrogram

    if tree is None:
        return
    drawn = dendrogram(tree, no_plot=True)
    for across, up in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        x, y = (np.asarray(across) - 5) / 10, np.asarray(up)
        axes.plot(*((x, y) if side == "top" else (y, x)), color="0.35", lw=0.8)  # type: ignore[attr-defined]
    n, top = len(tree) + 1, max(float(tree[-1, 2]), 1e-12)
    if side == "top":
        axes.set(xlim=(-0.5, n - 0.5), ylim=(0, 1.02 * top))  # type: ignore[attr-defined]
    else:
        axes.set(ylim=(n - 0.5, -0.5), xlim=(1.02 * top, 0))  # type: ignore[attr-defined]


def _rgb(color: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255


def _is_dark(color: tuple[int, int, int]) -> bool:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue < 128
