"""Fold: who is trained on and who is tested. A patient is never in both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mil.cohort import Cases
from mil.target import Target
from wsi.errors import CohortError, UsageError

__all__ = ["Fold", "check_no_leak", "column_folds", "k_folds", "make_folds", "site_folds", "validation_parts"]

_TRAIN_WORDS = frozenset(("train", "training"))
_TEST_WORDS = frozenset(("test", "testing", "holdout"))


@dataclass(frozen=True)
class Fold:
    """Indices of cases, sorted: what a model learns from and what it is judged by."""

    name: str
    train: tuple[int, ...]
    test: tuple[int, ...]


def make_folds(cases: Cases, target: Target, *, by: str, folds: int, seed: int) -> tuple[Fold, ...]:
    """Folds of a cohort.

    Args:
        by: ``"random"`` for ``folds`` stratified folds from ``seed``; ``"site"`` to leave out each centre once; ``"column"`` for
            the table's own.

    Raises:
        CohortError: the cohort does not allow it.
    """
    strata = target.strata(cases.y, cases.event)
    if by == "random":
        if target.is_classes:
            _check_counts(cases, target, folds)
        made = k_folds(strata, cases.patients, folds=folds, seed=seed)
    elif by == "site":
        if cases.sites is None:
            raise CohortError("leave-one-site-out needs the column of sites; name it with --site-column (Labels.site)")
        made = site_folds(cases.sites)
    elif by == "column":
        if cases.splits is None:
            raise CohortError("your own folds need their column; name it with --split-column (Labels.split)")
        made = column_folds(cases.splits)
    else:
        raise UsageError(f"folds are by random, site or column, not {by!r}")
    check_no_leak(made, cases.patients)
    for fold in made:
        if target.is_classes and len(set(cases.y[list(fold.train)])) < len(target.classes):
            raise CohortError(f"fold {fold.name}: its training part lacks a class; take other folds")
    return made


def k_folds(strata: NDArray[np.int64], patients: Sequence[str], *, folds: int, seed: int) -> tuple[Fold, ...]:
    """Folds of about equal size and mix, patients whole; the same from the same seed.

    Raises:
        CohortError: there are not as many patients as folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2:
        raise UsageError(f"at least two folds are needed, got {folds}")
    n_patients = len(set(patients))
    if n_patients < folds:
        raise CohortError(f"{n_patients} patients cannot make {folds} folds; take fewer folds")
    merged = _merged(np.asarray(strata), folds)
    groups = np.unique(np.asarray(patients), return_inverse=True)[1]
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    tests = [test for _, test in splitter.split(merged, merged, groups)]
    if any(len(test) == 0 for test in tests):
        raise CohortError(f"a fold of {folds} would be empty: a few patients have most of the slides; take fewer folds")
    everybody = np.arange(len(merged))
    return tuple(
        Fold(str(i), tuple(np.setdiff1d(everybody, test).tolist()), tuple(sorted(test.tolist())))
        for i, test in enumerate(tests)
    )


def site_folds(sites: Sequence[str]) -> tuple[Fold, ...]:
    """One fold a centre, which is its test part."""
    return _one_out(sites, "site")


def column_folds(splits: Sequence[str]) -> tuple[Fold, ...]:
    """The table's own folds: one fold where the words are train and test, else each word's rows are tested once."""
    words = {word.casefold() for word in splits}
    if words & _TRAIN_WORDS or words & _TEST_WORDS:
        known = _TRAIN_WORDS | _TEST_WORDS
        if not (words <= known and words & _TRAIN_WORDS and words & _TEST_WORDS):
            raise CohortError(
                f"the column of folds holds {', '.join(sorted(words))}; write train and test, or fold numbers"
            )
        test = tuple(i for i, word in enumerate(splits) if word.casefold() in _TEST_WORDS)
        train = tuple(i for i, word in enumerate(splits) if word.casefold() in _TRAIN_WORDS)
        return (Fold("test", train, test),)
    return _one_out(splits, "fold")


def validation_parts(
    strata: NDArray[np.int64], patients: Sequence[str], train: Sequence[int], *, parts: int, seed: int
) -> list[tuple[list[int], list[int]]]:
    """Cut a training part ``parts`` times into what is fitted on and what decides when to stop; patients whole.

    Each patient decides in one of the cuts, so models trained on all of them have together seen everybody.
    """
    train = list(train)
    inner = k_folds(strata[train], [patients[i] for i in train], folds=parts, seed=seed)
    return [([train[i] for i in fold.train], [train[i] for i in fold.test]) for fold in inner]


def check_no_leak(folds: Sequence[Fold], patients: Sequence[str]) -> None:
    """Raises CohortError where a patient is in both parts of a fold."""
    for fold in folds:
        both = {patients[i] for i in fold.train} & {patients[i] for i in fold.test}
        if both:
            raise CohortError(f"fold {fold.name}: patient {min(both)} is trained on and tested; correct the column")


def _one_out(words: Sequence[str], what: str) -> tuple[Fold, ...]:
    names = sorted(set(words))
    if len(names) < 2:
        raise CohortError(f"there is only one {what}, {names[0]!r}; leaving it out leaves nothing to learn from")
    return tuple(
        Fold(
            name,
            tuple(i for i, word in enumerate(words) if word != name),
            tuple(i for i, word in enumerate(words) if word == name),
        )
        for name in names
    )


def _check_counts(cases: Cases, target: Target, folds: int) -> None:
    for index, name in enumerate(target.classes):
        patients = {cases.patients[i] for i in np.flatnonzero(cases.y == index)}
        if len(patients) < folds:
            raise CohortError(
                f"class {name!r} of {target.name} has {len(patients)} patients, too few for {folds} folds; take fewer folds, or "
                f"leave the class out"
            )


def _merged(strata: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """Strata of fewer rows than folds become one, for they cannot be spread."""
    values, index, counts = np.unique(strata, return_inverse=True, return_counts=True)
    small = counts < folds
    if not small.any():
        return index
    merged = np.where(small[index], len(values), index)
    return np.zeros_like(merged) if (merged == len(values)).sum() < folds else merged
