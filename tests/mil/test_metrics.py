"""Metrics: the numbers of scikit-learn and scikit-survival, intervals over patients, and fair comparisons."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mil.calibration import fit_temperature
from mil.metrics import c_index, compare, expected_calibration_error, intervals, measure
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
