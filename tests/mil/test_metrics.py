"""Metrics: the numbers of scikit-learn and scikit-survival, intervals over patients, and fair comparisons."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mil.calibration import fit_temperature
from mil.metrics import c_index, compare, expected_calibration_error, intervals, measure, time_dependent_auc
from mil.predictions import Predictions, stack
from mil.target import Target
from wsi.errors import BadFeaturesError, UsageError

BINARY = Target("t", "binary", ("no", "yes"))


def predictions(y: Any, answers: Any, target: Target = BINARY, patients: Any = None, event: Any = None) -> Predictions:
    names = tuple(str(i) for i in range(len(y)))
    answers = np.asarray(answers, np.float64)
    if target.kind == "binary" and answers.ndim == 1:
        answers = np.stack([1 - answers, answers], axis=1)
    return Predictions(
        target,
        names,
        tuple(patients) if patients is not None else names,
        np.asarray(y, np.float64),
        np.ones(len(y), bool) if event is None else np.asarray(event, bool),
        answers.reshape(len(y), -1),
        ("0",) * len(y),
    )


@pytest.mark.shared
def test_classification_metrics_are_those_of_the_reference(shared: Path) -> None:
    with np.load(shared / "golden" / "losses_metrics.npz") as golden:
        found = {key.removeprefix("clf/"): golden[key] for key in golden.files if key.startswith("clf/")}
    four = ("a", "b", "c", "d")
    nominal = measure(predictions(found["y"], found["prob"], Target("t", "multiclass", four)))
    ordinal = measure(predictions(found["y"], found["prob"], Target("t", "ordinal", four)))
    assert nominal["accuracy"] == pytest.approx(float(found["acc"]))
    assert nominal["balanced_accuracy"] == pytest.approx(float(found["bacc"]))
    assert nominal["f1"] == pytest.approx(float(found["f1_macro"]))
    assert nominal["auroc"] == pytest.approx(float(found["auc_ovr_macro"]))
    assert ordinal["kappa"] == pytest.approx(float(found["kappa_quadratic"]))


@pytest.mark.shared
def test_concordance_is_that_of_the_reference_ties_included(shared: Path) -> None:
    with np.load(shared / "golden" / "losses_metrics.npz") as golden:
        names = ("time", "event", "risk", "value")
        time, event, risk, value = (golden[f"cindex_ties/{name}"] for name in names)
    assert c_index(time, event.astype(bool), risk) == pytest.approx(float(value), abs=1e-9)


# Forty made-up cases with ties of risk: time, event, risk.
SURVIVAL = """
2.18 0 0.1, 24.357 1 -0.1, 23.49 1 0.6, 11.059 1 0.1, 13.984 1 -0.5, 11.867 1 0.4, 0.361 0 1.3, 7.261 1 0.9, 3.714 1 -0.7,
15.154 0 -1.3, 0.4 0 -0.6, 11.042 1 0.0, 62.619 0 -2.3, 2.528 1 -0.2, 1.374 0 -1.2, 10.408 1 -0.7, 22.782 1 -0.5,
23.791 1 -0.3, 7.783 1 0.4, 1.119 1 1.0, 43.288 1 -0.1, 3.246 1 1.4, 3.976 1 -0.7, 11.201 1 0.4, 2.886 1 0.9, 7.679 1 0.1,
3.117 0 -0.7, 21.167 1 -0.9, 29.768 1 -0.5, 1.65 1 0.2, 46.575 0 -1.0, 0.476 0 -0.2, 20.296 1 -0.2, 18.41 0 0.5,
8.639 1 0.2, 4.641 0 0.4, 29.932 0 -0.7, 5.945 0 -0.1, 7.847 1 0.8, 3.619 1 1.5
"""


def survival(*, tied: bool = False) -> tuple[Any, Any, Any]:
    rows = np.array([[float(word) for word in row.split()] for row in SURVIVAL.split(",")])
    time, event, risk = rows[:, 0], rows[:, 1] == 1, rows[:, 2]
    # Of many events at one time, but no censoring at such a time: there scikit-survival and we differ on purpose.
    return (np.where(event, np.ceil(time / 4) * 4, time + 0.0137) if tied else time), event, risk


@pytest.mark.parametrize(
    ("tied", "at", "mean"),
    [
        (False, [0.7546428950440411, 0.7431158872275776, 0.8059316890385294], 0.7668910683098359),
        (True, [0.6802884615384616, 0.8067319848293301, 0.8162116858237548], 0.7710706233906235),
    ],
)
def test_time_dependent_auc_is_that_of_scikit_survival(tied: bool, at: Any, mean: float) -> None:
    # cumulative_dynamic_auc(s, s, risk, times) of scikit-survival 0.28.0, the times being the quartiles of event times
    time, event, risk = survival(tied=tied)
    found = time_dependent_auc(time, event, risk, np.quantile(time[event], [0.25, 0.5, 0.75]).tolist())
    np.testing.assert_allclose(found.at, at, rtol=1e-12)
    assert found.mean == pytest.approx(mean, rel=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_time_dependent_auc_counts_each_case_by_its_chance_to_be_still_watched(seed: int) -> None:
    rng = np.random.default_rng(seed)
    time, event = rng.integers(1, 8, 25).astype(float), rng.random(25) < 0.6
    risk = rng.integers(0, 5, 25).astype(float)
    found = time_dependent_auc(time, event, risk, [3.0, 100.0])
    assert np.isnan(found.at[1])  # nobody is left
    pairs, agree = 0.0, 0.0
    for i in np.flatnonzero(event & (time <= 3)):
        watched = 1.0  # just before the event: those censored earlier, of those at risk of it then
        for t in np.unique(time[time < time[i]]):
            watched *= 1 - (~event & (time == t)).sum() / ((time > t) | (~event & (time == t))).sum()
        for j in np.flatnonzero(time > 3):
            pairs += 1 / watched
            agree += (0.5 * (risk[i] == risk[j]) + (risk[i] > risk[j])) / watched
    if pairs:
        assert found.at[0] == pytest.approx(agree / pairs)
    else:
        assert np.isnan(found.at).all()
        assert np.isnan(found.mean)


def test_survival_answers_are_judged_at_the_same_times_in_every_fold_each_with_its_interval() -> None:
    time, event, risk = survival()
    target = Target("months", "survival", horizons=tuple(np.quantile(time[event], np.arange(1, 8) / 8)))
    made = predictions(time, risk, target, event=event)
    found = measure(made)
    assert found["auc_q1"] == pytest.approx(0.7546428950440411)
    assert found["auc_q3"] == pytest.approx(0.8059316890385294)
    assert found["auc_mean"] == pytest.approx(0.764909092445169)  # of scikit-survival, over the seven octiles
    few = made.take(np.argsort(time)[:20])
    assert measure(few)["auc_q1"] == pytest.approx(
        time_dependent_auc(few.y, few.event, few.score, target.quartiles).at[0]
    )
    assert np.isnan(measure(few)["auc_q3"])  # the twenty earliest saw no time so late
    for name, interval in intervals(made, draws=40).items():
        assert interval.low < interval.value < interval.high, name
    assert set(measure(predictions(time, risk, Target("months", "survival"), event=event))) == {"c_index"}


def test_two_classes_are_judged_alike_whatever_they_are_called() -> None:
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 30), rng.uniform(size=30)
    answers = np.stack([1 - p, p], axis=1)
    kinds: Any = ("binary", "multiclass", "ordinal")
    binary, several, grades = (measure(predictions(y, answers, Target("t", kind, ("a", "b")))) for kind in kinds)
    assert binary == pytest.approx(several)
    assert binary == pytest.approx(grades)  # of two grades the quadratic kappa is the plain one


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_metrics_of_random_answers_are_those_of_scikit_learn(n_classes: int) -> None:
    from sklearn import metrics as judge

    for seed in range(5):
        rng = np.random.default_rng(seed)
        y = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, 40)])
        p = rng.dirichlet(np.ones(n_classes), len(y))
        guess, one_hot = p.argmax(axis=1), np.eye(n_classes)[y]
        names = tuple("abcde"[:n_classes])
        found = measure(predictions(y, p, Target("t", "binary" if n_classes == 2 else "multiclass", names)))
        each_against_rest = [judge.roc_auc_score(y == i, p[:, i]) for i in range(n_classes)]
        precision = [judge.average_precision_score(y == i, p[:, i]) for i in range(n_classes)]
        expected = {
            "auroc": each_against_rest[1] if n_classes == 2 else np.mean(each_against_rest),
            "auprc": precision[1] if n_classes == 2 else np.mean(precision),
            "accuracy": (guess == y).mean(),
            "balanced_accuracy": judge.balanced_accuracy_score(y, guess),
            "f1": judge.f1_score(y, guess, average="macro"),
            "kappa": judge.cohen_kappa_score(y, guess),
            "brier": ((p - one_hot) ** 2).sum(axis=1).mean() / 2,
        }
        assert {name: found[name] for name in expected} == pytest.approx(expected)
        grades = measure(predictions(y, p, Target("t", "ordinal", names)))
        assert grades["kappa"] == pytest.approx(judge.cohen_kappa_score(y, guess, weights="quadratic"))


def test_metrics_of_random_values_and_risks_are_those_of_scikit_learn_scipy_and_lifelines() -> None:
    from lifelines.utils import concordance_index
    from scipy.stats import pearsonr
    from sklearn import metrics as judge

    for seed in range(5):
        rng = np.random.default_rng(seed)
        y, said = rng.normal(size=30), rng.normal(size=30)
        found = measure(predictions(y, said[:, None], Target("t", "regression")))
        expected = {
            "r2": judge.r2_score(y, said),
            "mae": np.abs(y - said).mean(),
            "pearson": pearsonr(y, said).statistic,
        }
        assert found == pytest.approx(expected)
        time, event = rng.integers(1, 9, 30).astype(float), rng.random(30) < 0.7
        curve = np.sort(rng.uniform(size=(30, 4)), axis=1)[:, ::-1]  # who lives longer has the larger sum
        survived = measure(predictions(time, curve, Target("t", "survival"), event=event))
        assert survived["c_index"] == pytest.approx(concordance_index(time, curve.sum(axis=1), event))


def delong(y: Any, one: Any, other: Any) -> tuple[float, float]:
    """Difference of two AUCs on the same cases and its deviation: DeLong, DeLong, Clarke-Pearson, Biometrics 1988."""
    wins = [((s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0])) for s in (one, other)]
    gap = wins[0].astype(float) - wins[1].astype(float)  # (cases, controls)
    cases, controls = gap.mean(axis=1), gap.mean(axis=0)
    return float(gap.mean()), float(np.sqrt(cases.var(ddof=1) / len(cases) + controls.var(ddof=1) / len(controls)))


def test_the_paired_bootstrap_comes_to_what_delong_comes_to() -> None:
    from scipy.stats import norm

    for seed, skill in ((0, 0.0), (1, 0.3)):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 2, 250)
        common = 0.8 * y + rng.normal(size=250)
        one, other = common + skill * y + 0.5 * rng.normal(size=250), common + 0.5 * rng.normal(size=250)
        found = compare(*(predictions(y, 1 / (1 + np.exp(-each))) for each in (one, other)), draws=800)
        value, deviation = delong(y, one, other)
        assert found.value == pytest.approx(value)
        assert (found.high - found.low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.1)
        assert found.p == pytest.approx(2 * norm.sf(abs(value) / deviation), abs=0.05)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "ordinal", "regression", "survival"])
def test_every_figure_has_an_interval_that_holds_it_and_grows_with_the_level(kind: Any) -> None:
    rng = np.random.default_rng(0)
    classes = {"binary": ("a", "b"), "multiclass": ("a", "b", "c"), "ordinal": ("a", "b", "c")}.get(kind, ())
    n = 60
    if classes:
        y: Any = rng.integers(0, len(classes), n)
        answers = 0.2 * np.eye(len(classes))[y] + 0.8 * rng.dirichlet(np.ones(len(classes)), n)
    else:
        y = rng.exponential(10, n)
        answers = (-y if kind == "survival" else y)[:, None] + rng.normal(0, 8, (n, 1))
    horizons = tuple(np.quantile(y, np.arange(1, 8) / 8)) if kind == "survival" else ()
    made = predictions(y, answers, Target("t", kind, classes, horizons))
    wide, narrow = (intervals(made, level=level, draws=60) for level in (0.95, 0.5))
    assert set(wide) == set(measure(made))
    for name, interval in wide.items():
        assert interval.low <= narrow[name].low < narrow[name].high <= interval.high, name
        if name != "ece":  # few cases make it larger, and a draw has fewer different ones
            assert interval.low < interval.value < interval.high, name


def test_what_is_not_defined_is_nan_and_not_a_warning() -> None:
    one_class = measure(predictions([1, 1, 1], [0.2, 0.9, 0.8]))
    assert np.isnan([one_class[name] for name in ("auroc", "auprc")]).all()
    assert one_class["accuracy"] == pytest.approx(2 / 3)
    censored = predictions([1.0, 2.0], [[0.1], [0.2]], Target("t", "survival"), event=[False, False])
    assert np.isnan(measure(censored)["c_index"])
    assert np.isnan(measure(predictions([2.0], [[1.0]], Target("t", "regression")))["r2"])


def test_cases_without_truth_do_not_count() -> None:
    with_unknown = predictions([0, 1, np.nan, 1], [0.1, 0.7, 0.0, 0.2])
    assert measure(with_unknown) == measure(with_unknown.take([0, 1, 3]))


def test_the_calibration_error_of_a_known_case() -> None:
    # 10 answers of confidence 0.9 of which 8 are right, 10 of 0.6 of which all are: (0.1 + 0.4) / 2
    answers = np.array([[0.1, 0.9]] * 10 + [[0.4, 0.6]] * 10)
    y = np.array([1] * 8 + [0] * 2 + [1] * 10)
    assert expected_calibration_error(y, answers) == pytest.approx(0.25)
    assert expected_calibration_error(np.array([1]), np.array([[0.0, 1.0]])) == 0.0


def test_intervals_hold_the_value_and_are_wider_when_slides_share_patients() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(rng.integers(0, 2, 40), 5)
    p = np.clip(np.repeat(rng.normal(0.5, 0.2, 40), 5) + 0.25 * (y - 0.5), 0, 1)
    alone = intervals(predictions(y, p), draws=100)["auroc"]
    shared = intervals(predictions(y, p, patients=[str(i // 5) for i in range(200)]), draws=100)["auroc"]
    assert alone.value == shared.value
    assert alone.low < alone.value < alone.high
    assert shared.high - shared.low > 1.5 * (alone.high - alone.low)
    assert intervals(predictions(y, p), draws=5) == intervals(predictions(y, p), draws=5)


def test_a_better_run_is_told_from_an_equal_one() -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 200)
    good = predictions(y, np.clip(0.5 + 0.3 * (y - 0.5) + rng.normal(0, 0.15, 200), 0, 1))
    poor = predictions(y, rng.uniform(0, 1, 200))
    found = compare(good, poor.take(rng.permutation(200)), draws=200)
    assert found.low > 0
    assert found.p < 0.02
    assert found.value == pytest.approx(measure(good)["auroc"] - measure(poor)["auroc"])
    y[:20] = 9  # nobody knows these
    unknown = [replace(each, y=np.where(y == 9, np.nan, y)) for each in (good, poor)]
    assert compare(*unknown, draws=200) == compare(*(each.take(range(20, 200)) for each in (good, poor)), draws=200)
    same = compare(good, good, draws=100)
    assert (same.value, same.p) == (0.0, 1.0)
    with pytest.raises(UsageError, match="same cases"):
        compare(good, poor.take(range(10)))
    with pytest.raises(UsageError, match="there are auroc"):
        compare(good, poor, metric="auc")


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_predictions_read_back_bit_for_bit(tmp_path_factory: Any, rows: Any) -> None:
    path = tmp_path_factory.mktemp("p") / "p.csv"
    written = predictions([y for y, _ in rows], np.array([p for _, p in rows]))
    written.write(path)
    read = Predictions.read(path, BINARY)
    assert (read.names, read.patients, read.folds) == (written.names, written.patients, written.folds)
    np.testing.assert_array_equal(read.answers, written.answers)
    np.testing.assert_array_equal(read.y, written.y)
    np.testing.assert_array_equal(read.event, written.event)


def test_a_file_that_is_no_predictions_is_said(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadFeaturesError, match="not the predictions of a run"):
        Predictions.read(tmp_path / "p.csv", BINARY)


def test_stacked_rows_keep_their_order() -> None:
    a, b = predictions([0, 1], [0.1, 0.9]), predictions([1], [0.4])
    both = stack([a, b])
    assert both.y.tolist() == [0, 1, 1]
    assert both.score.tolist() == [0.1, 0.9, 0.4]


def test_the_temperature_of_overconfident_logits_is_found() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (4000, 3))
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = np.array([rng.choice(3, p=p) for p in chance])
    assert fit_temperature(4 * logits, y) == pytest.approx(4, rel=0.1)
    assert fit_temperature(logits / 2, y) == pytest.approx(0.5, rel=0.1)
