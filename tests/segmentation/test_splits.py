"""Splits: no patient on two sides, every slide in one fold, kinds of slides dealt out evenly."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from segmentation.splits import split_slides
from wsi.errors import CohortError

PATIENTS = st.lists(st.sampled_from("abcdefghij"), min_size=6, max_size=30)


@given(PATIENTS, st.integers(2, 4), st.integers(0, 99))
def test_every_slide_is_in_one_fold_and_no_patient_is_on_two_sides(patients: list[str], folds: int, seed: int) -> None:
    assume(len(set(patients)) >= folds + 2)
    split = split_slides(patients, [{"t"}] * len(patients), folds=folds, validation=0.2, seed=seed)
    assert sorted(i for part in split.folds for i in part) == list(range(len(patients)))
    whose = [{patients[i] for i in part} for part in split.folds]
    assert sum(map(len, whose)) == len(set(patients))  # none in two
    held = {patients[i] for i in split.validation}
    assert set(split.validation) == {i for i, name in enumerate(patients) if name in held}
    assert len(held) == max(1, round(0.2 * len(set(patients))))


def test_slides_without_the_class_are_dealt_out_evenly() -> None:
    patients = [str(i) for i in range(20)]
    classes = [{"tumour"} if i < 10 else set() for i in range(20)]
    for seed in range(20):
        split = split_slides(patients, classes, folds=5, validation=0.2, seed=seed)
        for part in split.folds:
            assert Counter(bool(classes[i]) for i in part) == {True: 2, False: 2}
        assert Counter(bool(classes[i]) for i in split.validation) == {True: 2, False: 2}


def test_a_seed_repeats_and_another_deals_otherwise() -> None:
    patients = [str(i) for i in range(20)]
    dealt = [split_slides(patients, [set()] * 20, folds=3, validation=0.2, seed=seed) for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1]
    assert dealt[0].folds != dealt[2].folds
    assert dealt[0].validation != dealt[2].validation


def test_nothing_is_held_out_where_nothing_is_asked_for() -> None:
    assert split_slides(["a", "b"], [set()] * 2, folds=2, validation=0, seed=0).validation == ()


def test_fewer_patients_than_folds_are_refused() -> None:
    with pytest.raises(CohortError, match="3 folds need slides of as many patients; there are 2"):
        split_slides(["a", "b", "a"], [set()] * 3, folds=3, validation=0.2, seed=0)


@pytest.mark.parametrize(("n", "folds", "validation"), [(1, 1, 0.2), (3, 2, 0.2), (4, 2, 0.5)])
def test_a_cohort_that_leaves_nothing_to_learn_from_is_refused_by_that_name(
    n: int, folds: int, validation: float
) -> None:
    refused = 0
    for seed in range(40):
        try:
            split = split_slides([str(i) for i in range(n)], [set()] * n, folds=folds, validation=validation, seed=seed)
        except CohortError as error:
            refused += "nothing to learn from" in str(error)
        else:
            for part in split.folds:
                assert set(range(n)) - set(part) - set(split.validation)
    assert refused
