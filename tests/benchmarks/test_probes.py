"""Probes of the benchmarks: as slower, well-known programs have them, and blind to what is tested on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index
from numpy.typing import NDArray
from probes import (
    PENALTIES,
    STRENGTHS,
    Survivors,
    aurocs,
    by_patient,
    comparable,
    concordance,
    cox,
    difference,
    interval,
    logistic,
    probe,
    resamples,
    rotated,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mil.cohort import Cohort
from mil.metrics import compare, intervals
from mil.predictions import Predictions
from mil.splits import make_folds
from mil.target import Target
from tests.mil.made_up import arrays

BINARY = Target("y", "binary", ("a", "b"))


def followed(n: int, d: int, *, seed: int = 0, strata: int = 1) -> tuple[NDArray[np.float64], Survivors]:
    """Patients whose risk rises with the first number, each at another time; two in three are seen to die."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    months = rng.exponential(np.exp(-x[:, 0])) + np.arange(n) * 1e-6
    return x, Survivors(months, rng.uniform(size=n) < 0.66, rng.integers(0, strata, n))


def answered(y: Any, scores: Any) -> Predictions:
    names = tuple(f"p{i}" for i in range(len(y)))
    answers = np.stack([1 - np.asarray(scores), scores], 1)
    return Predictions(BINARY, names, names, np.asarray(y, float), np.ones(len(y), bool), answers, ("0",) * len(y))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("strata", [1, 3])
def test_cox_has_the_coefficients_of_lifelines(penalty: float, strata: int) -> None:
    x, patients = followed(90, 4, strata=strata)
    train = np.arange(60)
    x = (x - x[train].mean(0)) / x[train].std(0, ddof=1)  # so that lifelines' own standardising changes nothing
    table = pd.DataFrame(x[train], columns=list("abcd"))
    table["months"], table["died"], table["stratum"] = (column[train] for column in vars(patients).values())
    fitter = CoxPHFitter(penalizer=penalty, strata=["stratum"])
    fitter.fit(table, "months", "died", fit_options={"precision": 1e-10})
    np.testing.assert_allclose(cox(x, patients, train, penalty), x @ fitter.params_.to_numpy(), atol=1e-5)


def test_cox_of_tied_deaths_is_the_best_under_breslows_likelihood() -> None:
    x, patients = followed(80, 3, strata=2)
    patients = replace(patients, months=np.ceil(patients.months * 4))
    dead = np.flatnonzero(patients.event)
    assert len(np.unique(patients.months[dead])) < len(dead) / 2

    def objective(beta: NDArray[np.float64]) -> float:
        risk = x @ beta
        likelihood = sum(
            risk[i]
            - np.log(
                np.exp(risk)[(patients.months >= patients.months[i]) & (patients.stratum == patients.stratum[i])].sum()
            )
            for i in dead
        )
        return float(likelihood / len(x) - 0.1 / 2 * beta @ beta)

    risk = cox(x, patients, np.arange(len(x)), 0.1)
    beta = np.asarray(np.linalg.lstsq(x, risk, rcond=None)[0], np.float64)
    for step in 1e-3 * np.vstack([np.eye(3), -np.eye(3)]).astype(np.float64):
        assert objective(beta + step) < objective(beta)


def test_cox_sees_the_training_part_alone() -> None:
    x, patients = followed(60, 3)
    train, test = np.arange(40), np.arange(40, 60)
    other = replace(patients, months=patients.months.copy(), event=patients.event.copy())
    other.months[test], other.event[test] = 1.0, True
    np.testing.assert_array_equal(cox(x, patients, train, 0.1), cox(x, other, train, 0.1))


@given(st.integers(0, 10_000))
def test_concordance_is_that_of_lifelines_ties_and_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 25))
    months, risk = rng.integers(1, 6, n).astype(float), rng.integers(0, 4, n).astype(float)
    patients = Survivors(months, rng.uniform(size=n) < 0.5, np.zeros(n, np.int64))
    pairs = comparable(patients, np.zeros(n, np.int64))
    assume(pairs.any())
    assert concordance(pairs, risk)[0] == pytest.approx(concordance_index(months, -risk, patients.event))


def test_patients_of_two_strata_or_two_models_are_not_compared() -> None:
    _, patients = followed(40, 1, strata=2)
    folds = np.arange(40) % 3
    pairs = comparable(patients, folds)
    first, second = np.nonzero(pairs)
    assert len(first) > 50
    assert (patients.stratum[first] == patients.stratum[second]).all()
    assert (folds[first] == folds[second]).all()
    one = replace(patients, stratum=np.zeros(40, np.int64))
    assert comparable(one, np.zeros(40, np.int64)).sum() > 4 * pairs.sum()


@given(st.integers(0, 10_000))
def test_a_weight_is_how_often_a_patient_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 20))
    months, event, risk = rng.uniform(size=n), rng.uniform(size=n) < 0.7, rng.integers(0, 5, n).astype(float)
    weights = resamples(n, 3, seed)
    assert (weights.sum(1) == n).all()
    pairs = comparable(Survivors(months, event, np.zeros(n, np.int64)), np.zeros(n, np.int64))
    assume((((weights @ pairs) * weights).sum(1) > 0).all())
    for found, of in zip(concordance(pairs, risk, weights), weights.astype(int), strict=True):
        drawn = np.repeat(np.arange(n), of)
        assert found == pytest.approx(concordance_index(months[drawn], -risk[drawn], event[drawn]))


@given(st.integers(0, 10_000))
def test_aurocs_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, scores = np.arange(20) % 2, rng.integers(0, 6, 20) / 6
    weights = resamples(20, 4, seed)
    assume(all(0 < of[y == 1].sum() < of.sum() for of in weights))
    predictions = answered(y, scores)
    assert aurocs(predictions)[0] == pytest.approx(roc_auc_score(y, scores))
    np.testing.assert_allclose(
        aurocs(predictions, weights), [roc_auc_score(y, scores, sample_weight=of) for of in weights]
    )


def test_intervals_and_differences_are_those_of_the_package_to_within_the_draws() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    one, other = (answered(y, np.clip(0.5 + far * (y - 0.5) + rng.normal(size=60) / 4, 0, 1)) for far in (0.5, 0.35))
    weights = resamples(60, 4000)
    values = [aurocs(each, weights) for each in (one, other)]
    theirs = intervals(one, draws=300)["auroc"]
    ours = interval(float(aurocs(one)[0]), values[0])
    assert ours.value == theirs.value
    np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), atol=0.02)
    found = difference(float(aurocs(one)[0] - aurocs(other)[0]), values[0] - values[1])
    expected = compare(one, other, metric="auroc", draws=300)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert 0 < found.p < 1


@pytest.mark.parametrize(("n", "size"), [(40, 12), (40, 300)])
@pytest.mark.parametrize("strength", [STRENGTHS[0], STRENGTHS[-1]])
def test_a_ridge_learns_the_same_in_rotated_axes(n: int, size: int, strength: float) -> None:
    rng = np.random.default_rng(n + size)
    x, train, y = rng.normal(size=(n, size)), np.arange(0, n, 2), (np.arange(n) // 2 % 2).astype(float)
    x[:, 0] += 2 * y
    x[:, 1] = 7  # never varies
    x[:, 2] *= 1000
    z = rotated(x, train)
    assert z.shape[1] < min(n, size)
    varying = np.delete(x, 1, axis=1)
    plain = (varying - varying[train].mean(0)) / (varying[train].std(0) * np.sqrt(size - 1))
    model = LogisticRegression(C=strength, max_iter=10_000, tol=1e-8).fit(plain[train], y[train])
    np.testing.assert_allclose(logistic(z, train, y, strength), model.predict_proba(plain), atol=1e-3)


def cohort_and_vectors() -> tuple[Cohort, NDArray[np.float64]]:
    bags, labels, patients = arrays(48, shift=2.0)
    return Cohort.from_arrays(bags, labels, patients), np.stack([bag.mean(0) for bag in bags])


def test_a_patients_answer_is_the_mean_over_its_slides() -> None:
    made, _ = cohort_and_vectors()
    cases, fold = made.cases(), make_folds(made.cases(), made.target, by="random", folds=3, seed=0)[0]
    answers = np.random.default_rng(0).uniform(size=(len(made), 2))
    found = by_patient(cases, made.target, fold, answers)
    assert found.names == tuple(cases.names[i] for i in fold.test)
    for row, name in enumerate(found.names):
        own = [i for i, patient in enumerate(made.patients) if patient == name]
        np.testing.assert_allclose(found.answers[row], answers[own].mean(0))


def test_a_probe_learns_what_is_there_and_sees_no_test_label() -> None:
    made, vectors = cohort_and_vectors()
    cases = made.cases()
    fold = make_folds(cases, made.target, by="random", folds=3, seed=0)[0]
    found = probe(cases, made.target, fold, vectors)
    assert found.strength in STRENGTHS
    assert found.inner > 0.8
    assert aurocs(found.predictions)[0] > 0.8
    (task,) = cases.tasks
    y = task.y.copy()
    y[list(fold.test)] = 1 - y[list(fold.test)]
    blind = probe(replace(cases, tasks=(replace(task, y=y),)), made.target, fold, vectors)
    assert (blind.strength, blind.inner) == (found.strength, found.inner)
    np.testing.assert_array_equal(blind.predictions.answers, found.predictions.answers)
    changed = vectors.copy()
    changed[cases.bags_of(fold.test)] += 100
    assert probe(cases, made.target, fold, changed).strength == found.strength
    assert probe(cases, made.target, fold, vectors, strength=3.0).strength == 3.0


def test_the_strength_is_the_one_that_was_best_within_the_training_part(monkeypatch: pytest.MonkeyPatch) -> None:
    import probes

    made, vectors = cohort_and_vectors()
    cases = made.cases()
    fold = make_folds(cases, made.target, by="random", folds=3, seed=0)[0]
    inner = {each: probe(cases, made.target, fold, vectors, strength=each).inner for each in STRENGTHS}
    found = probe(cases, made.target, fold, vectors)
    assert inner[found.strength] == max(inner.values()) == found.inner
    told: list[Any] = []

    def telling(z: Any, train: Any, y: Any, strength: float) -> Any:
        told.append(train)
        return logistic(z, train, y, strength)

    monkeypatch.setattr(probes, "logistic", telling)
    probe(cases, made.target, fold, vectors, strength=1.0)
    *parts, last = told
    assert set(last) == set(cases.bags_of(fold.train))
    assert all(set(part) < set(last) for part in parts)
