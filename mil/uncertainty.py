"""Uncertainty: how sure an ensemble is, whether its members agree, and sets of classes that keep a promise.

Sources: Lakshminarayanan, Pritzel, Blundell: Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles,
NeurIPS 2017; Depeweg et al., Decomposition of Uncertainty in Bayesian Deep Learning, ICML 2018, equation 2; Sadinle, Lei,
Wasserman: Least Ambiguous Set-Valued Classifiers with Bounded Error Levels, JASA 2019 (split-conformal sets).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mil.predictions import Predictions
from wsi.errors import UsageError

__all__ = ["Conformal", "Coverage", "Doubt", "cross_coverage", "doubt"]


class Doubt(NamedTuple):
    """What an ensemble does not know, in bits; ``total`` = ``noise`` + ``disagreement``.

    Attributes:
        total: (n,) entropy of the mean answer.
        noise: (n,) mean entropy of the members' answers: the case itself is hard.
        disagreement: (n,) the rest: the members were not taught enough to agree.
    """

    total: NDArray[np.float64]
    noise: NDArray[np.float64]
    disagreement: NDArray[np.float64]


def doubt(answers: NDArray[np.float64]) -> Doubt:
    """Doubt of an ensemble of M members over n cases; ``answers`` are (M, n, C) probabilities."""
    total, noise = _entropy_bits(answers.mean(axis=0)), _entropy_bits(answers).mean(axis=0)
    return Doubt(total, noise, np.maximum(total - noise, 0.0))


class Coverage(NamedTuple):
    """How often prediction sets held the true class.

    Attributes:
        promised: 1 − alpha.
        found: share of the cases.
        low, high: its 95% interval (Wilson).
        mean_size: classes a set.
        n: cases.
    """

    promised: float
    found: float
    low: float
    high: float
    mean_size: float
    n: int

    def __str__(self) -> str:
        return (
            f"{self.promised:.0%} promised, {self.found:.1%} [{self.low:.1%}, {self.high:.1%}] found on {self.n} cases, "
            f"{self.mean_size:.2f} classes a set"
        )


@dataclass(frozen=True)
class Conformal:
    """Sets of classes that hold the true one with probability at least 1 − alpha.

    That is a promise over cases exchangeable with those it was calibrated on, not one for each class or hospital.

    Attributes:
        alpha: share of the sets that may miss.
        least: the probability from which a class belongs to the set; 0 where there are too few cases to leave any out.
    """

    alpha: float
    least: float

    @classmethod
    def fit(cls, predictions: Predictions, alpha: float = 0.1) -> "Conformal":
        """Calibrate on answers for cases that the models did not see.

        Raises:
            UsageError: the target has no classes, or alpha is none.
        """
        if not predictions.target.is_classes:
            raise UsageError(f"prediction sets are for classes; {predictions.target.name} is {predictions.target.kind}")
        if not 0 < alpha < 1:
            raise UsageError(f"alpha is between 0 and 1, not {alpha}")
        known = np.flatnonzero(~np.isnan(predictions.y))
        of_truth = np.sort(predictions.answers[known, predictions.y[known].astype(int)])
        # The k-th smallest of n + 1, the new case among them, misses with probability at most k / (n + 1).
        k = math.floor(alpha * (len(known) + 1))
        return cls(alpha, float(of_truth[k - 1]) if k >= 1 else 0.0)

    def sets(self, answers: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(n, C) which classes belong to each set; ``answers`` are (n, C) probabilities. A set may be empty."""
        return answers >= self.least

    def coverage(self, predictions: Predictions) -> Coverage:
        """How the promise was kept on other cases."""
        known = np.flatnonzero(~np.isnan(predictions.y))
        sets = self.sets(predictions.answers[known])
        held = sets[np.arange(len(known)), predictions.y[known].astype(int)]
        return _coverage(self.alpha, held, sets.sum(axis=1))


def cross_coverage(predictions: Predictions, alpha: float = 0.1) -> Coverage:
    """Coverage measured on each fold with sets calibrated on all others.

    Raises:
        UsageError: there is one fold only.
    """
    predictions = predictions.known
    folds = np.array(predictions.folds)
    if len(set(predictions.folds)) < 2:
        raise UsageError("coverage across folds needs two or more")
    held, sizes = [], []
    for name in sorted(set(predictions.folds)):
        test = predictions.take(np.flatnonzero(folds == name))
        sets = Conformal.fit(predictions.take(np.flatnonzero(folds != name)), alpha).sets(test.answers)
        held.append(sets[np.arange(len(test)), test.y.astype(int)])
        sizes.append(sets.sum(axis=1))
    return _coverage(alpha, np.concatenate(held), np.concatenate(sizes))


def _coverage(alpha: float, held: NDArray[np.bool_], sizes: NDArray[np.int64]) -> Coverage:
    from scipy.stats import binomtest

    interval = binomtest(int(held.sum()), len(held)).proportion_ci(0.95, method="wilson")
    return Coverage(
        1 - alpha, float(held.mean()), float(interval.low), float(interval.high), float(sizes.mean()), len(held)
    )


def _entropy_bits(p: NDArray[np.float64]) -> NDArray[np.float64]:
    safe = np.where(p > 0, p, 1.0)
    return np.asarray(-(p * np.log2(safe)).sum(axis=-1))
