"""Metrics: how good predictions are, with intervals over patients, and whether one run beats another.

The numbers are those of scikit-learn, lifelines and SciPy. Only the expected calibration error is computed here, because
none has it: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 5, 15 bins of equal width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mil.predictions import Predictions
from wsi.errors import UsageError

__all__ = [
    "PRIMARY",
    "AucOverTime",
    "Difference",
    "Interval",
    "c_index",
    "compare",
    "expected_calibration_error",
    "intervals",
    "measure",
    "primary",
    "time_dependent_auc",
]

# The one number a kind of target is judged by.
PRIMARY: Mapping[str, str] = {
    "binary": "auroc",
    "multiclass": "auroc",
    "ordinal": "kappa",
    "regression": "r2",
    "survival": "c_index",
}
_ECE_BINS = 15


class Interval(NamedTuple):
    """A metric with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Difference(NamedTuple):
    """How much better the first of two runs is, with its interval and the two-sided p that it is not."""

    value: float
    low: float
    high: float
    p: float


class AucOverTime(NamedTuple):
    """Time-dependent AUC.

    Attributes:
        at: (K,) of each time; NaN where nobody had the event yet, or nobody is left.
        mean: of those that are defined, each weighted by how far survival fell since the one before.
    """

    at: NDArray[np.float64]
    mean: float


def measure(predictions: Predictions) -> dict[str, float]:
    """Every metric of the kind of target, by name. One that the rows do not allow (a single class) is NaN.

    Classes: auroc, auprc (of the positive class; macro one-vs-rest for several), accuracy, balanced_accuracy, f1 (macro),
    kappa (quadratic for ordinal), brier (halved for several classes, so that 1 is worst), ece. Regression: r2, mae,
    pearson. Survival: c_index; auc_q1, auc_q2 and auc_q3 (``time_dependent_auc`` at the quartiles of the cohort's event
    times) and auc_mean (over their octiles), where the target has ``horizons``.
    """
    known = predictions.known
    return {name: float(function(known)) if len(known) else math.nan for name, function in _of_kind(known).items()}


def primary(predictions: Predictions) -> float:
    """The one number that the kind of target is judged by, alone; NaN where the rows do not allow it."""
    known = predictions.known
    return float(_of_kind(known)[PRIMARY[known.target.kind]](known)) if len(known) else math.nan


def intervals(
    predictions: Predictions, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Every metric with the percentile interval over patients drawn with replacement.

    Draws in which a metric is not defined do not count for it.
    """
    predictions = predictions.known
    drawn: dict[str, list[float]] = {}
    with _unchecked():
        for rows in _patient_draws(predictions, draws, seed):
            for name, value in measure(predictions.take(rows)).items():
                drawn.setdefault(name, []).append(value)
    tails = [(1 - level) / 2, (1 + level) / 2]
    result = {}
    for name, value in measure(predictions).items():
        values = np.array(drawn[name])
        values = values[~np.isnan(values)]
        low, high = np.quantile(values, tails) if len(values) else (math.nan, math.nan)
        result[name] = Interval(value, float(low), float(high))
    return result


def compare(
    first: Predictions, second: Predictions, *, metric: str | None = None, draws: int = 2000, seed: int = 0
) -> Difference:
    """Whether the first run is better than the second on the same cases, by a paired bootstrap over patients.

    Raises:
        UsageError: they answered for other cases.
    """
    at = {name: i for i, name in enumerate(second.names)}
    if set(at) != set(first.names) or first.target != second.target:
        raise UsageError("two runs are compared on the same cases and target; these differ")
    first = first.known
    second = second.take([at[name] for name in first.names])
    metric = metric or PRIMARY[first.target.kind]
    if metric not in (there := measure(first)):
        raise UsageError(f"no metric {metric!r} for a {first.target.kind} target; there are {', '.join(there)}")
    found = there[metric] - measure(second)[metric]
    one = _of_kind(first)[metric]
    with _unchecked():
        pairs = [(one(first.take(rows)), one(second.take(rows))) for rows in _patient_draws(first, draws, seed)]
    drawn = np.array([a - b for a, b in pairs])
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    # Add one to each count, so that a p is never 0: Davison and Hinkley, Bootstrap Methods, 1997, section 4.2.
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)) + 1
    return Difference(found, float(low), float(high), float(min(1.0, 2 * tail / (len(drawn) + 1))))


def c_index(time: NDArray[np.float64], event: NDArray[np.bool_], risk: NDArray[np.float64]) -> float:
    """Harrell's concordance: the share of comparable pairs whose earlier event has the higher risk; NaN without pairs."""
    from lifelines.utils import concordance_index

    try:
        return float(concordance_index(time, -risk, event))
    except ZeroDivisionError:  # no pair can be compared
        return math.nan


def time_dependent_auc(
    time: NDArray[np.float64], event: NDArray[np.bool_], risk: NDArray[np.float64], times: Sequence[float]
) -> AucOverTime:
    """How well risk tells those with the event by a time (cases) from those without it then (controls).

    Uno, Cai, Tian, Wei: Evaluating Prediction Rules for t-Year Survivors with Censored Regression Models, JASA 2007;
    cases count by the inverse of the chance to be still watched just before their event. The mean is that of Lambert,
    Chevret: Summary measure of discrimination in survival models, SMMR 2016. Without ties of events and censorings these
    are the numbers of scikit-survival; it takes a censoring at the time of an event as before it, here it is after.

    Args:
        time, event, risk: (n,) as for ``c_index``.
        times: (K,) rising.
    """
    from scipy.stats import CensoredData, ecdf
    from sklearn.metrics import roc_auc_score

    # Events on even, censorings on odd places, so that those censored with an event are at risk of censoring after it.
    place = 2 * np.unique(time, return_inverse=True)[1]
    watched = ecdf(CensoredData(uncensored=place[~event] + 1, right=place[event])).sf.evaluate(place)
    weight = np.ones(len(time))
    weight[event] = 1 / watched[event]
    at = np.full(len(times), math.nan)
    for k, horizon in enumerate(times):
        case, control = event & (time <= horizon), time > horizon
        if case.any() and control.any():
            of = case | control
            at[k] = roc_auc_score(case[of], risk[of], sample_weight=np.where(case, weight, 1.0)[of])
    alive = ecdf(CensoredData(uncensored=time[event], right=time[~event])).sf.evaluate(times)
    fell = -np.diff(alive, prepend=1.0)
    defined = ~np.isnan(at)
    total = fell[defined].sum()
    return AucOverTime(at, float((at[defined] * fell[defined]).sum() / total) if total > 0 else math.nan)


def expected_calibration_error(y: NDArray[Any], probabilities: NDArray[np.float64], bins: int = _ECE_BINS) -> float:
    """Mean distance of confidence from accuracy over bins of equal width of the top class's probability.

    Args:
        y: (n,) class index.
        probabilities: (n, C).
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == y
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    gaps = np.abs(np.bincount(bin_of, right, bins) - np.bincount(bin_of, confidence, bins))
    return float(gaps.sum() / counts.sum())


def _of_kind(predictions: Predictions) -> Mapping[str, Callable[[Predictions], float]]:
    if predictions.target.is_classes:
        return _CLASSES
    if predictions.target.kind == "regression":
        return _REGRESSION
    return _SURVIVAL | _OVER_TIME if predictions.target.horizons else _SURVIVAL


def _unchecked() -> Any:
    """scikit-learn without its checks of arguments, which take longer than the sums on a few hundred rows."""
    from sklearn import config_context

    return config_context(assume_finite=True, skip_parameter_validation=True)


def _patient_draws(predictions: Predictions, draws: int, seed: int) -> Any:
    """Rows of as many patients as there are, drawn with replacement."""
    _, index = np.unique(np.asarray(predictions.patients), return_inverse=True)
    rows_of = [np.flatnonzero(index == i) for i in range(index.max() + 1)]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.concatenate([rows_of[i] for i in rng.integers(0, len(rows_of), len(rows_of))])


def _all_classes(p: Predictions) -> bool:
    return len(set(p.y.astype(int).tolist())) == len(p.target.classes)


def _auroc(p: Predictions) -> float:
    from sklearn.metrics import roc_auc_score

    if not _all_classes(p):
        return math.nan
    if len(p.target.classes) == 2:
        return float(roc_auc_score(p.y.astype(int), p.score))
    normal = p.answers / p.answers.sum(axis=1, keepdims=True)  # an average of several models is off one by a rounding
    return float(roc_auc_score(p.y.astype(int), normal, multi_class="ovr", labels=range(len(p.target.classes))))


def _auprc(p: Predictions) -> float:
    from sklearn.metrics import average_precision_score

    if not _all_classes(p):
        return math.nan
    if len(p.target.classes) == 2:
        return float(average_precision_score(p.y.astype(int), p.score))
    one_hot = np.eye(len(p.target.classes))[p.y.astype(int)]
    return float(average_precision_score(one_hot, p.answers))


def _accuracy(p: Predictions) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(p.y.astype(int), p.answers.argmax(axis=1)))


def _balanced_accuracy(p: Predictions) -> float:
    from sklearn.metrics import recall_score

    # balanced_accuracy_score warns of classes that only were predicted; over the classes that occur it is the same number
    y = p.y.astype(int)
    return float(recall_score(y, p.answers.argmax(axis=1), labels=np.unique(y), average="macro", zero_division=0))


def _f1(p: Predictions) -> float:
    from sklearn.metrics import f1_score

    labels = range(len(p.target.classes))
    return float(f1_score(p.y.astype(int), p.answers.argmax(axis=1), labels=labels, average="macro", zero_division=0))


def _kappa(p: Predictions) -> float:
    from sklearn.metrics import cohen_kappa_score

    guess = p.answers.argmax(axis=1)
    if len({*p.y.astype(int).tolist(), *guess.tolist()}) < 2:
        return math.nan
    weights = "quadratic" if p.target.kind == "ordinal" else None
    return float(cohen_kappa_score(p.y.astype(int), guess, weights=weights, labels=range(len(p.target.classes))))


def _brier(p: Predictions) -> float:
    from sklearn.metrics import brier_score_loss

    if len(p.target.classes) == 2:
        return float(brier_score_loss(p.y.astype(int), p.score, pos_label=1, labels=[0, 1]))
    labels = range(len(p.target.classes))
    normal = p.answers / p.answers.sum(axis=1, keepdims=True)
    return float(brier_score_loss(p.y.astype(int), normal, labels=labels, scale_by_half=True))


def _ece(p: Predictions) -> float:
    return expected_calibration_error(p.y.astype(int), p.answers)


def _r2(p: Predictions) -> float:
    from sklearn.metrics import r2_score

    return float(r2_score(p.y, p.score)) if len(p) > 1 else math.nan


def _mae(p: Predictions) -> float:
    from sklearn.metrics import mean_absolute_error

    return float(mean_absolute_error(p.y, p.score))


def _pearson(p: Predictions) -> float:
    if len(p) < 2 or np.ptp(p.y) == 0 or np.ptp(p.score) == 0:
        return math.nan
    return float(np.corrcoef(p.y, p.score)[0, 1])


def _c_index(p: Predictions) -> float:
    return c_index(p.y, p.event, p.score)


def _auc_at(p: Predictions, quarter: int) -> float:
    return float(time_dependent_auc(p.y, p.event, p.score, [p.target.quartiles[quarter]]).at[0])


def _auc_mean(p: Predictions) -> float:
    return time_dependent_auc(p.y, p.event, p.score, p.target.horizons).mean


_CLASSES: dict[str, Callable[[Predictions], float]] = {
    "auroc": _auroc,
    "auprc": _auprc,
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "f1": _f1,
    "kappa": _kappa,
    "brier": _brier,
    "ece": _ece,
}
_REGRESSION: dict[str, Callable[[Predictions], float]] = {"r2": _r2, "mae": _mae, "pearson": _pearson}
_SURVIVAL: dict[str, Callable[[Predictions], float]] = {"c_index": _c_index}
_OVER_TIME: dict[str, Callable[[Predictions], float]] = {
    **{f"auc_q{quarter + 1}": partial(_auc_at, quarter=quarter) for quarter in range(3)},
    "auc_mean": _auc_mean,
}
