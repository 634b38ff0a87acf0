"""Uncertainty: doubt adds up, and prediction sets keep their promise."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from mil.target import Target
from mil.uncertainty import Conformal, cross_coverage, doubt
from tests.mil.test_metrics import predictions
from wsi.errors import UsageError

THREE = Target("t", "multiclass", ("a", "b", "c"))


def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels that follow others: a model that is wrong about itself."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet([1, 1, 1], n)
    y = np.array([rng.choice(3, p=p) for p in true])
    said = true**3 / (true**3).sum(1, keepdims=True)
    return y, said


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_sets_hold_the_truth_as_often_as_promised_even_of_a_model_that_is_overconfident(alpha: float) -> None:
    found = []
    for seed in range(20):
        y, said = drawn(400, seed)
        conformal = Conformal.fit(predictions(y[:200], said[:200], THREE), alpha)
        found.append(conformal.coverage(predictions(y[200:], said[200:], THREE)).found)
    assert np.mean(found) == pytest.approx(1 - alpha, abs=0.015)


def test_coverage_across_folds_is_measured_with_its_interval() -> None:
    y, said = drawn(600, 0)
    made = predictions(y, said, THREE)
    folds = tuple(str(i % 5) for i in range(600))
    spread = type(made)(THREE, made.names, made.patients, made.y, made.event, made.answers, folds)
    found = cross_coverage(spread, 0.1)
    assert found.low < 0.9 < found.high
    assert found.n == 600
    assert 1 < found.mean_size < 3
    assert "90% promised" in str(found)
    with pytest.raises(UsageError, match="two or more"):
        cross_coverage(made, 0.1)


def test_cases_without_truth_do_not_count_for_coverage() -> None:
    y, said = drawn(100, 0)
    folds = np.array([str(i % 4) for i in range(100)])
    y = y.astype(float)
    y[:40] = np.nan
    made = replace(predictions(y, said, THREE), folds=tuple(folds))
    assert cross_coverage(made, 0.2) == cross_coverage(made.take(range(40, 100)), 0.2)


def test_too_few_cases_leave_no_class_out() -> None:
    y, said = drawn(5, 0)
    assert Conformal.fit(predictions(y, said, THREE), 0.1).sets(said).all()


def test_sets_are_for_classes() -> None:
    with pytest.raises(UsageError, match="prediction sets are for classes"):
        Conformal.fit(predictions([1.0], [[1.0]], Target("t", "regression")))
    with pytest.raises(UsageError, match="alpha"):
        Conformal.fit(predictions([1], [0.5]), 1.0)


@given(numpy_arrays(np.float64, (3, 4, 2), elements=st.floats(1e-3, 1)))
def test_doubt_is_noise_and_disagreement(raw: np.ndarray) -> None:
    answers = raw / raw.sum(-1, keepdims=True)
    found = doubt(answers)
    np.testing.assert_allclose(found.total, found.noise + found.disagreement, atol=1e-12)
    assert (found.disagreement >= 0).all()
    assert (found.total <= 1 + 1e-12).all()
    alike = doubt(np.repeat(answers[:1], 3, axis=0))
    np.testing.assert_allclose(alike.disagreement, 0, atol=1e-12)


def test_members_that_contradict_each_other_disagree_by_a_bit() -> None:
    found = doubt(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert (found.total[0], found.noise[0], found.disagreement[0]) == (1.0, 0.0, 1.0)
