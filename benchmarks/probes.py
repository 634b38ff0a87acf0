"""Probes: linear models on slide vectors, fitted on the training part of a fold alone and judged patient by patient.

Penalties are chosen on inner folds of the training part. Vectors are divided by the root of their length first, so that one
grid of penalties serves a vector of 192 numbers and one of 6,000.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mil.cohort import Cases
from mil.metrics import Difference, Interval
from mil.predictions import Predictions
from mil.splits import Fold, validation_parts
from mil.target import Target

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)  # C of scikit-learn, for vectors of unit scale
PENALTIES = (0.01, 0.1, 1.0)  # of ``cox``
COMPONENTS = 16
_INNER = 3
_STEPS = 30


class Probed(NamedTuple):
    """Answers for the test part of a fold, and the mean AUROC of the inner folds that chose the penalty."""

    predictions: Predictions
    inner: float
    strength: float


def by_patient(cases: Cases, target: Target, fold: Fold, answers: NDArray[np.float64]) -> Predictions:
    """(S, P) answers for all slides as those for the patients of the test part, each the mean over the slides."""
    test = list(fold.test)
    means = np.stack([answers[cases.bags_of([case])].mean(0) for case in test])
    names, patients = (tuple(column[i] for i in test) for column in (cases.names, cases.patients))
    return Predictions(target, names, patients, cases.y[test], cases.event[test], means, (fold.name,) * len(test))


def rotated(vectors: NDArray[Any], train: NDArray[np.int64]) -> NDArray[np.float64]:
    """(S, E) vectors of slides as (S, R), in the axes of those of ``train``, the longest first; R is below their number.

    Each number is standardised on ``train`` and divided by √E. What a model with a ridge learns from ``train`` is the same in
    these axes, and costs no more for thousands of numbers a slide than for as many as there are slides.
    """
    mean, deviation = vectors[train].mean(0), vectors[train].std(0)
    varies = deviation > 1e-6 * np.abs(mean) + 1e-9
    z = (vectors[:, varies] - mean[varies]) / (deviation[varies] * np.sqrt(varies.sum()))
    if z.shape[1] < len(train):
        axes = np.linalg.eigh(z[train].T @ z[train])[1][:, ::-1]
        return np.asarray(z @ axes, np.float64)
    squares, axes = np.linalg.eigh((z[train] @ z[train].T).astype(np.float64))
    kept = squares > 1e-6 * squares[-1]
    axes = (z[train].T @ axes[:, kept]) / np.sqrt(squares[kept])
    return np.asarray(z @ axes[:, ::-1], np.float64)


def logistic(
    z: NDArray[np.float64], train: NDArray[np.int64], y: NDArray[np.float64], strength: float
) -> NDArray[np.float64]:
    """(S, 2) probabilities of all slides from a logistic regression on those of ``train``."""
    model = LogisticRegression(C=strength, max_iter=10_000, tol=1e-6).fit(z[train], y[train])
    return np.asarray(model.predict_proba(z), np.float64)


def probe(cases: Cases, target: Target, fold: Fold, vectors: NDArray[Any], strength: float | None = None) -> Probed:
    """A logistic regression on (S, E) vectors; its strength chosen on inner folds of patients where none is given."""
    train = cases.bags_of(fold.train)
    z, y = rotated(vectors, train), cases.y[cases.owner]
    scores = dict.fromkeys(STRENGTHS if strength is None else (strength,), 0.0)
    strata = target.strata(cases.y, cases.event)
    for fit, held in validation_parts(strata, cases.patients, fold.train, parts=_INNER, seed=0):
        some, others = cases.bags_of(fit), cases.bags_of(held)
        for each in scores:
            scores[each] += roc_auc_score(y[others], logistic(z, some, y, each)[others, 1]) / _INNER
    best = max(scores, key=scores.__getitem__)
    return Probed(by_patient(cases, target, fold, logistic(z, train, y, best)), scores[best], best)


@dataclass(frozen=True, eq=False)
class Survivors:
    """Patients with follow-up.

    Attributes:
        months: (n,) time to the event, or to the last visit.
        event: (n,) whether the patient died.
        stratum: (n,) risks are compared within a stratum, and each has a baseline of its own.
    """

    months: NDArray[np.float64]
    event: NDArray[np.bool_]
    stratum: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> "Survivors":
        return Survivors(self.months[rows], self.event[rows], self.stratum[rows])


def cox(x: NDArray[np.float64], patients: Survivors, train: NDArray[np.int64], penalty: float) -> NDArray[np.float64]:
    """(n,) log risk of all patients from Cox regression with a ridge on those of ``train``, a baseline a stratum.

    Newton's steps on the partial likelihood of Breslow, divided by the patients, less half the penalty times the squared
    coefficients, as lifelines has it but for its standardising, in a fiftieth of its time.
    """
    there, z = patients.take(train), x[train]
    dead = there.event
    at_risk = ((there.months >= there.months[dead, None]) & (there.stratum == there.stratum[dead, None])).astype(float)
    beta = np.zeros(z.shape[1])
    for _ in range(_STEPS):
        hazard = np.exp(z @ beta)
        total = at_risk @ hazard  # (deaths,)
        mean = at_risk @ (hazard[:, None] * z) / total[:, None]  # (deaths, D)
        slope = (z[dead] - mean).sum(0) / len(z) - penalty * beta
        weight = hazard * (at_risk.T @ (1 / total))
        curve = ((z.T * weight) @ z - mean.T @ mean) / len(z) + penalty * np.eye(len(beta))
        step = np.linalg.solve(curve, slope)
        beta = beta + step
        if np.abs(step).max() < 1e-6:
            break
    return np.asarray(x @ beta, np.float64)


def comparable(patients: Survivors, folds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n, n) whether i is known to have died before j, for patients of one stratum whom one model answered for."""
    months, event = patients.months, patients.event
    before = months[:, None] < months
    last_seen_then = (months[:, None] == months) & ~event
    same = (patients.stratum[:, None] == patients.stratum) & (folds[:, None] == folds)
    return np.asarray(event[:, None] & (before | last_seen_then) & same)


def concordance(
    pairs: NDArray[np.bool_], risk: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """(W,) Harrell's concordance among ``pairs`` for each of (W, n) weights of patients; a single one of all by default."""
    right = np.where(risk[:, None] == risk, 0.5, risk[:, None] > risk) * pairs
    weights = np.ones((1, len(risk))) if weights is None else weights
    return np.asarray(((weights @ right) * weights).sum(1) / ((weights @ pairs) * weights).sum(1))


def aurocs(predictions: Predictions, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """(W,) AUROC for each of (W, n) weights of the patients; a single one of all by default.

    With ``resamples`` the bootstrap of ``mil.metrics.intervals``, in a hundredth of its time, as it makes this metric alone.
    """
    return concordance((predictions.y[:, None] == 1) & (predictions.y == 0), predictions.score, weights)


def resamples(n: int, draws: int, seed: int = 0) -> NDArray[np.float64]:
    """(draws, n) how often each of n patients is drawn, as many as there are with replacement."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


def interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def difference(value: float, drawn: NDArray[np.float64]) -> Difference:
    """With the two-sided p of ``mil.metrics.compare``."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)) + 1
    return Difference(value, float(low), float(high), float(min(1.0, 2 * tail / (len(drawn) + 1))))
