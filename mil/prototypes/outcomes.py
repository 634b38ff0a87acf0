"""OutcomeTable: which prototypes go with an outcome, patient by patient, corrected for how many were asked about.

Classes: Mann-Whitney (two) or Kruskal-Wallis (more). Grades and values: Spearman. Survival: Cox, one prototype at a time.
All p together are corrected by Benjamini, Hochberg: Controlling the False Discovery Rate, JRSS B 1995. Effects: the chance
that a patient of one class has more than one of another (McGraw, Wong 1992); epsilon squared (Kelley 1935); rho; hazard
ratio for each deviation more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mil.cohort import Cohort
from mil.prototypes.palette import prototype_name
from mil.prototypes.survey import Survey
from mil.target import Target
from wsi._files import write_table
from wsi.errors import UsageError

__all__ = ["OutcomeRow", "OutcomeTable", "outcome_table", "patient_shares"]


@dataclass(frozen=True)
class OutcomeRow:
    """One prototype against the outcome.

    Attributes:
        prototype: index, from 0.
        effect: see ``OutcomeTable.effect``; NaN where all patients have the same share, or no test can be computed.
        p: of the test; NaN likewise.
        q: p corrected for all prototypes of the table.
        means: mean share in each class; of all patients where there are no classes.
    """

    prototype: int
    effect: float
    p: float
    q: float
    means: tuple[float, ...]


@dataclass(frozen=True)
class OutcomeTable:
    """A row for each prototype, in their order; prints as a table, the smallest p first.

    Attributes:
        target: the outcome.
        test, effect: which test and what its effect is, in words.
        n_patients: who took part; each counts once.
        n_events: with the event, for survival.
    """

    rows: tuple[OutcomeRow, ...]
    target: Target
    test: str
    effect: str
    n_patients: int
    n_events: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """What ``OutcomeRow.means`` are of."""
        return self.target.classes if self.target.is_classes else ("all",)

    def write(self, path: Path) -> None:
        """As CSV: prototype, effect, p, q, and the mean shares."""
        head = ("prototype", "effect", "p", "q", *(f"mean share, {name}" for name in self.columns))
        each = ((row.prototype + 1, row.effect, row.p, row.q, *row.means) for row in self.rows)
        rows = ((number, *(None if math.isnan(x) else f"{x:.6g}" for x in values)) for number, *values in each)
        write_table(path, head, rows)

    def __str__(self) -> str:
        heads = [f"{name[:14]:>14}" for name in self.columns]
        lines = [f"{'':14}{'effect':>8}{'p':>10}{'q':>10}  " + " ".join(heads)]
        for row in sorted(self.rows, key=lambda row: (math.isnan(row.p), row.p)):
            means = " ".join(f"{mean:>14.1%}" for mean in row.means)
            lines.append(
                f"{prototype_name(row.prototype):14}{row.effect:>8.3f}{row.p:>10.2g}{row.q:>10.2g}  {means}".replace(
                    "nan", " – "
                )
            )
        events = "" if self.n_events is None else f", {self.n_events} events"
        about = f"{self.target.name}: {self.test}, {self.n_patients} patients{events}; effect: {self.effect}"
        about += "; q: Benjamini-Hochberg"
        return "\n".join((*lines, about))


def outcome_table(survey: Survey, cohort: Cohort) -> OutcomeTable:
    """Test every prototype's share against the cohort's first target, over patients.

    Slides of a patient are averaged. Slides without a label, or that the survey lacks, take no part. Shares of a slide sum to
    one: where one prototype is more, another must be less, so that rows are not independent findings.

    Raises:
        UsageError: too few patients are left to compare anything.
        CohortError: slides of a patient differ in their label.
    """
    shares, y, event = patient_shares(survey, cohort)
    target = cohort.target
    n_classes = len(np.unique(y)) if target.is_classes else 2
    if len(y) < 3 or n_classes < 2 or (target.kind == "survival" and not event.any()):
        raise UsageError(
            f"{cohort.name}: {len(y)} patients with slides and {target.name} are too few, or too alike, to compare"
        )
    tests = {
        "binary": (
            _mann_whitney,
            "Mann-Whitney",
            f"chance that {target.classes[-1]} has more" if target.classes else "",
        ),
        "multiclass": (_kruskal, "Kruskal-Wallis", "epsilon squared"),
        "ordinal": (_spearman, "Spearman", "rho"),
        "regression": (_spearman, "Spearman", "rho"),
    }
    if target.kind == "survival":
        found = [_cox(share, y, event) for share in shares.T]
        test, effect = "Cox, one at a time, likelihood ratio", "hazard ratio for each deviation more"
    else:
        function, test, effect = tests[target.kind]
        found = [function(share, y) if np.ptp(share) > 0 else (math.nan, math.nan) for share in shares.T]
    q = corrected([p for _, p in found])
    groups = [y == i for i in range(len(target.classes))] if target.is_classes else [np.ones(len(y), bool)]
    means = [
        tuple(float(shares[group, k].mean()) if group.any() else math.nan for group in groups) for k in range(len(q))
    ]
    rows = tuple(OutcomeRow(k, *found[k], float(q[k]), means[k]) for k in range(len(q)))
    return OutcomeTable(rows, target, test, effect, len(y), int(event.sum()) if target.kind == "survival" else None)


def patient_shares(
    survey: Survey, cohort: Cohort
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Shares (P, K), label (P,) and event (P,) of each patient with a label and a slide of the survey, in the cohort's order."""
    row_of = {slide: row for row, slide in enumerate(survey.slides)}
    cases = cohort.cases("late")
    slides_of: dict[int, list[int]] = {}
    for bag, owner in zip(cases.bags, cases.owner.tolist(), strict=True):
        slides_of.setdefault(owner, []).extend(row_of[slide] for slide in bag if slide in row_of)
    kept = [i for i in range(len(cases)) if slides_of.get(i) and not math.isnan(cases.y[i])]
    shares = np.array([survey.shares[slides_of[i]].mean(axis=0) for i in kept]).reshape(len(kept), survey.prototypes.k)
    return shares, cases.y[kept], cases.event[kept]


def corrected(p: Sequence[float]) -> NDArray[np.float64]:
    """Benjamini and Hochberg's q of each p; those that are NaN stay so and do not count."""
    from scipy.stats import false_discovery_control

    values = np.asarray(p, np.float64)
    found = np.full(len(values), math.nan)
    known = ~np.isnan(values)
    if known.any():
        found[known] = false_discovery_control(values[known])
    return found


def _mann_whitney(share: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    from scipy.stats import mannwhitneyu

    first, second = share[y == 0], share[y == 1]
    result = mannwhitneyu(second, first)
    return float(result.statistic / (len(first) * len(second))), float(result.pvalue)


def _kruskal(share: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    from scipy.stats import kruskal

    result = kruskal(*(share[y == label] for label in np.unique(y)))
    return float(result.statistic / (len(y) - 1)), float(result.pvalue)


def _spearman(share: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    from scipy.stats import spearmanr

    if np.ptp(y) == 0:
        return math.nan, math.nan
    result = spearmanr(share, y)
    return float(result.statistic), float(result.pvalue)


def _cox(share: NDArray[np.float64], time: NDArray[np.float64], event: NDArray[np.bool_]) -> tuple[float, float]:
    """Hazard ratio of one deviation more, and p of the likelihood ratio, which holds where Wald's breaks down."""
    import warnings

    import pandas as pd
    from lifelines import CoxPHFitter
    from lifelines.exceptions import ConvergenceError, ConvergenceWarning

    deviation = share.std()
    if not deviation > 0:
        return math.nan, math.nan
    table = pd.DataFrame({"share": (share - share.mean()) / deviation, "time": time, "event": event})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)  # the ratio grows without end: no number is true
            fitted = CoxPHFitter().fit(table, "time", "event")
            return float(np.exp(fitted.params_["share"])), float(fitted.log_likelihood_ratio_test().p_value)
    except (ConvergenceError, ConvergenceWarning):
        return math.nan, math.nan
