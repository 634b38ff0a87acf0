"""Plots of predictions: ROC, precision-recall, confusion, calibration, Kaplan-Meier, learning curves.

Each returns a matplotlib Figure and leaves pyplot alone: nothing is shown, nothing global is touched.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mil.metrics import measure
from mil.predictions import Predictions
from wsi.annotation import class_color
from wsi.errors import EnvironmentFaultError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mil.train import Epoch

__all__ = [
    "calibration",
    "confusion",
    "kaplan_meier",
    "learning_curves",
    "precision_recall",
    "roc",
    "split_survival",
]

_INCHES = (5.0, 4.6)
_BINS = 10


def roc(predictions: Predictions) -> "Figure":
    """True against false positives; one curve for two classes, else one a class against the rest."""
    from sklearn.metrics import roc_auc_score, roc_curve

    figure, axes = _figure("false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color="0.8", lw=1)
    for name, truth, score in _one_against_rest(predictions):
        x, y, _ = roc_curve(truth, score)
        axes.plot(x, y, color=_color(name), label=f"{name}: AUROC {roc_auc_score(truth, score):.3f}")
    axes.legend(loc="lower right", frameon=False)
    return figure


def precision_recall(predictions: Predictions) -> "Figure":
    """Precision against recall; the dotted line is what guessing gives."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    figure, axes = _figure("recall", "precision")
    for name, truth, score in _one_against_rest(predictions):
        precision, recall, _ = precision_recall_curve(truth, score)
        label = f"{name}: AUPRC {average_precision_score(truth, score):.3f}"
        axes.step(recall, precision, where="post", color=_color(name), label=label)
        axes.axhline(truth.mean(), color=_color(name), ls=":", lw=1)
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower left", frameon=False)
    return figure


def confusion(predictions: Predictions) -> "Figure":
    """How often each true class (row) was taken for each (column): count, and share of the row as shade."""
    from sklearn.metrics import confusion_matrix

    known = _with_classes(predictions)
    names = known.target.classes
    counts = confusion_matrix(known.y.astype(int), known.answers.argmax(axis=1), labels=range(len(names)))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _figure("predicted", "true")
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        dark = shares[row, column] > 0.5
        axes.text(column, row, f"{count}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    return figure


def calibration(predictions: Predictions) -> "Figure":
    """How often answers of each confidence were right, in ten bins; the area of a point grows with its cases."""
    known = _with_classes(predictions)
    confidence = known.answers.max(axis=1)
    right = known.answers.argmax(axis=1) == known.y
    bin_of = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    figure, axes = _figure("confidence", "share right")
    axes.plot([0, 1], [0, 1], color="0.8", lw=1)
    used = np.unique(bin_of)
    x, y = (np.array([values[bin_of == i].mean() for i in used]) for values in (confidence, right))
    axes.plot(x, y, color="tab:blue", lw=1)
    axes.scatter(x, y, s=[400 * (bin_of == i).mean() + 10 for i in used], color="tab:blue", alpha=0.7, clip_on=False)
    axes.set_title(f"expected calibration error {measure(known)['ece']:.3f}", fontsize=10)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    return figure


def kaplan_meier(predictions: Predictions) -> "Figure":
    """Survival of the half with lower and the half with higher risk (parted at the median), with the log-rank p."""
    if predictions.target.kind != "survival":
        raise UsageError(
            f"Kaplan-Meier curves are for survival; {predictions.target.name} is {predictions.target.kind}"
        )
    predictions = predictions.known
    figure, p = split_survival(
        predictions.score, predictions.y, predictions.event, of="risk", time=predictions.target.name
    )
    if p is not None:
        title = f"log-rank p = {p:.2g}, c-index {measure(predictions)['c_index']:.3f}"
        figure.axes[0].set_title(title, fontsize=10)
    return figure


def split_survival(
    value: NDArray[np.float64], y: NDArray[np.float64], event: NDArray[np.bool_], *, of: str, time: str = "time"
) -> "tuple[Figure, float | None]":
    """Kaplan-Meier curves of the half with lower and the half with higher values, parted at the median; and the log-rank p.

    Args:
        value, y, event: (n,) what parts them, time, and whether the event was seen.
        of: what the values are; ``time``, what the times are, with their unit.

    Returns:
        The figure, and p; None where all have one value and there is nothing to part.
    """
    from lifelines import KaplanMeierFitter
    from lifelines.statistics import logrank_test

    high = value > np.median(value)
    figure, axes = _figure(time, "share without the event")
    for name, group, color in ((f"lower {of}", ~high, "tab:blue"), (f"higher {of}", high, "tab:red")):
        if not group.any():
            continue
        fitted = KaplanMeierFitter().fit(y[group], event[group])
        times = fitted.survival_function_.index.to_numpy()
        curve = fitted.survival_function_.to_numpy()[:, 0]
        axes.step(times, curve, where="post", color=color, label=f"{name} (n = {group.sum()})")
        band = fitted.confidence_interval_.to_numpy()
        axes.fill_between(times, band[:, 0], band[:, 1], step="post", color=color, alpha=0.15, lw=0)
    p = None
    if high.any() and (~high).any():
        p = float(logrank_test(y[high], y[~high], event[high], event[~high]).p_value)
        axes.set_title(f"log-rank p = {p:.2g}", fontsize=10)
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower left", frameon=False)
    return figure, p


def learning_curves(curves: Sequence[Sequence["Epoch"]]) -> "Figure":
    """Training loss (thin) and validation loss (thick) of every model, a colour a fold; a dot where it was kept."""
    figure, axes = _figure("epoch", "loss")
    for number, curve in enumerate(curves):
        color = f"C{number % 10}"
        for member in sorted({epoch.member for epoch in curve}):
            of_member = [epoch for epoch in curve if epoch.member == member]
            x = [epoch.epoch for epoch in of_member]
            axes.plot(x, [epoch.loss for epoch in of_member], color=color, lw=0.5)
            axes.plot(x, [epoch.stop_loss for epoch in of_member], color=color, lw=1.5)
            kept = [epoch for epoch in of_member if epoch.kept][-1]
            axes.plot(kept.epoch, kept.stop_loss, "o", ms=3, color=color)
    return figure


def _figure(x: str, y: str) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentFaultError("plots need matplotlib, which is not installed: pip install matplotlib") from error
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _one_against_rest(predictions: Predictions) -> list[tuple[str, Any, Any]]:
    """Name, truth (n,) bool and score (n,) of each curve; classes that are all or nothing of the cases have none."""
    known = _with_classes(predictions)
    indices = [1] if known.target.kind == "binary" else range(len(known.target.classes))
    curves = [(known.target.classes[i], known.y == i, known.answers[:, i]) for i in indices]
    return [curve for curve in curves if 0 < curve[1].sum() < len(known)]


def _with_classes(predictions: Predictions) -> Predictions:
    if not predictions.target.is_classes:
        raise UsageError(f"this plot is for classes; {predictions.target.name} is {predictions.target.kind}")
    return predictions.known


def _color(name: str) -> tuple[float, ...]:
    return tuple(value / 255 for value in class_color(name))
