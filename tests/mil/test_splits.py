"""Folds: a patient is never in two parts, everybody is tested once, and the seed decides."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mil.splits import check_no_leak, column_folds, k_folds, make_folds, site_folds, validation_parts
from mil.target import Labels
from tests.mil.made_up import cohort
from wsi.errors import CohortError, UsageError


@st.composite
def patients_and_strata(draw: Any) -> Any:
    n = draw(st.integers(6, 60))
    of_patient = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    owner = draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    return np.array([of_patient[i] for i in owner]), [f"p{i}" for i in owner]


@given(patients_and_strata(), st.integers(2, 5), st.integers(0, 2**31 - 1))
def test_no_patient_is_in_two_folds_and_everybody_is_tested_once(made: Any, folds: int, seed: int) -> None:
    strata, patients = made
    assume(len(set(patients)) >= folds)
    try:
        found = k_folds(strata, patients, folds=folds, seed=seed)
    except CohortError:  # a patient with most of the slides leaves a fold empty
        return
    check_no_leak(found, patients)
    tested = [i for fold in found for i in fold.test]
    assert sorted(tested) == list(range(len(patients)))
    for fold in found:
        assert {patients[i] for i in fold.train}.isdisjoint(patients[i] for i in fold.test)
        assert sorted(fold.train + fold.test) == list(range(len(patients)))
    assert found == k_folds(strata, patients, folds=folds, seed=seed)


@given(patients_and_strata(), st.integers(2, 4), st.integers(0, 1000))
def test_who_decides_when_to_stop_is_never_trained_on(made: Any, parts: int, seed: int) -> None:
    strata, patients = made
    train = list(range(0, len(patients), 2))
    assume(len({patients[i] for i in train}) >= parts)
    try:
        cuts = validation_parts(strata, patients, train, parts=parts, seed=seed)
    except CohortError:
        return
    for fit, stop in cuts:
        assert sorted(fit + stop) == train
        assert {patients[i] for i in fit}.isdisjoint(patients[i] for i in stop)
    assert sorted(i for _, stop in cuts for i in stop) == train


def test_classes_are_spread_evenly_and_another_seed_gives_other_folds() -> None:
    strata = np.repeat([0, 1], [80, 20])
    patients = [str(i) for i in range(100)]
    found = k_folds(strata, patients, folds=5, seed=1)
    assert [int(strata[list(fold.test)].sum()) for fold in found] == [4] * 5
    assert found != k_folds(strata, patients, folds=5, seed=2)


def test_each_site_is_left_out_once() -> None:
    assert [(fold.name, fold.test) for fold in site_folds(["b", "a", "b", "c"])] == [
        ("a", (1,)),
        ("b", (0, 2)),
        ("c", (3,)),
    ]
    with pytest.raises(CohortError, match="only one site"):
        site_folds(["a", "a"])


def test_own_folds_are_numbers_or_train_and_test() -> None:
    (fold,) = column_folds(["Train", "test", "train"])
    assert (fold.train, fold.test) == ((0, 2), (1,))
    assert [fold.test for fold in column_folds(["1", "2", "1"])] == [(0, 2), (1,)]
    with pytest.raises(CohortError, match="write train and test"):
        column_folds(["train", "2"])
    with pytest.raises(CohortError, match="write train and test"):
        column_folds(["train", "train"])


def test_what_a_cohort_cannot_give_is_said() -> None:
    small = cohort(8)
    cases = small.cases()
    with pytest.raises(CohortError, match="class '0' of target has 3 patients, too few for 5 folds"):
        make_folds(cases, small.target, by="random", folds=5, seed=0)
    with pytest.raises(CohortError, match="--site-column"):
        make_folds(cases, small.target, by="site", folds=5, seed=0)
    with pytest.raises(CohortError, match="--split-column"):
        make_folds(cases, small.target, by="column", folds=5, seed=0)
    with pytest.raises(UsageError, match="random, site or column"):
        make_folds(cases, small.target, by="luck", folds=5, seed=0)
    assert Labels("target").kind == "auto"
