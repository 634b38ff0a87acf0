"""Target: what is to be predicted, and how the words of a table become numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from wsi.errors import CohortError

__all__ = [
    "MISSING",
    "Kind",
    "Labels",
    "Target",
    "Task",
    "infer_target",
    "is_missing",
    "parse_event",
    "parse_value",
    "with_horizons",
]

Kind = Literal["binary", "multiclass", "ordinal", "regression", "survival"]
MISSING = frozenset(("", "na", "n/a", "nan", "none", "null", "?"))

_MOST_CLASSES = 20
_EVENT_WORDS: Mapping[str, bool] = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), True),
    **dict.fromkeys(("0", "0.0", "false", "no"), False),
}


@dataclass(frozen=True)
class Labels:
    """Which columns of a table say what. A column that is None is looked for under its usual names.

    Attributes:
        target: the column to predict; for survival the time.
        kind: what it is; ``"auto"`` decides by its values, but never for ordinal, which has to be said.
        classes: the classes in order, the last of two being the positive one; by default as sorted.
        event: for survival, the column that says whether the event was seen (1) or not (0).
        censored: the same the other way round: 1 = not seen.
        slide: usually slide, slide_id, filename or file.
        patient: usually patient, patient_id, case or case_id; without one, each slide is a patient.
        site: the column of centres, for leave-one-site-out.
        split: the column of your own folds.
    """

    target: str
    kind: Kind | Literal["auto"] = "auto"
    classes: tuple[str, ...] = ()
    event: str | None = None
    censored: str | None = None
    slide: str | None = None
    patient: str | None = None
    site: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.kind not in ("auto", *get_args(Kind)):
            raise CohortError(f"kind {self.kind!r} is none of auto, {', '.join(get_args(Kind))}")
        if self.event is not None and self.censored is not None:
            raise CohortError("give the column of events or that of censoring, not both")
        timed = self.event is not None or self.censored is not None
        if self.kind == "survival" and not timed:
            raise CohortError(f"{self.target}: survival needs a column of events (event) or of censoring (censored)")
        if timed and self.kind not in ("auto", "survival"):
            raise CohortError(f"{self.target}: a column of events makes it survival, not {self.kind}")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a label is made of."""
        return tuple(column for column in (self.target, self.event, self.censored) if column is not None)


@dataclass(frozen=True)
class Target:
    """What is to be predicted.

    Attributes:
        name: the column it came from.
        kind: binary, multiclass, ordinal, regression or survival.
        classes: for the first three, in order; a label is an index into it.
        horizons: for survival, the octiles of the cohort's event times, at which answers are judged; the same for every
            fold, whatever its cases.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    horizons: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "horizons", tuple(self.horizons))
        if len(self.horizons) not in (0, 7) or list(self.horizons) != sorted(self.horizons):
            raise CohortError(f"{self.name}: seven octiles, rising, are needed, not {self.horizons}")
        if self.is_classes and len(set(self.classes)) != len(self.classes):
            raise CohortError(f"{self.name}: a class is named twice in {', '.join(self.classes)}")
        if self.is_classes and len(self.classes) < 2:
            there = f"only {self.classes[0]!r}" if self.classes else "none"
            raise CohortError(f"{self.name}: at least two classes are needed, and there is {there}; check the column")
        if self.kind == "binary" and len(self.classes) != 2:
            raise CohortError(f"{self.name}: binary means two classes, not {', '.join(self.classes)}")

    @property
    def is_classes(self) -> bool:
        return self.kind in ("binary", "multiclass", "ordinal")

    @property
    def quartiles(self) -> tuple[float, ...]:
        """For survival, the quartiles of the cohort's event times."""
        return self.horizons[1::2]

    def strata(self, y: NDArray[np.float64], event: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(n,) groups to be spread evenly over folds: classes; quarters of the values; quarters of the times by event.

        Those whose y is NaN are a group of their own, −1.
        """
        known = ~np.isnan(y)
        if not known.all():
            groups = np.full(len(y), -1, np.int64)
            groups[known] = self.strata(y[known], event[known])
            return groups
        if self.is_classes:
            return y.astype(np.int64)
        ranks = np.argsort(np.argsort(y, kind="stable"), kind="stable")
        quarter = ranks * 4 // max(1, len(y))
        return np.asarray(quarter + 4 * event if self.kind == "survival" else quarter, np.int64)


@dataclass(frozen=True, eq=False)
class Task:
    """A target, and what is known of it.

    Attributes:
        target: what is to be predicted.
        y: (n,) class index, value or time of each slide or case; NaN where it is not known.
        event: (n,) whether the event was seen; True for all but survival.
    """

    target: Target
    y: NDArray[np.float64]
    event: NDArray[np.bool_]

    def __post_init__(self) -> None:
        object.__setattr__(self, "y", np.asarray(self.y, np.float64))
        object.__setattr__(self, "event", np.asarray(self.event, np.bool_))

    @property
    def known(self) -> NDArray[np.bool_]:
        """(n,) where there is a label."""
        return np.asarray(~np.isnan(self.y))

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Task":
        """Some of the rows, in the order given."""
        index = np.asarray(rows, np.int64)
        return Task(self.target, self.y[index], self.event[index])

    def word(self, row: int) -> str:
        """A label as a table holds it: empty where it is not known."""
        if not self.known[row]:
            return ""
        return self.target.classes[int(self.y[row])] if self.target.is_classes else repr(float(self.y[row]))


def infer_target(labels: Labels, values: Sequence[str], *, where: str) -> Target:
    """The target that a column's words make; ``where`` names the table in errors."""
    kind = labels.kind
    if labels.event is not None or labels.censored is not None:
        kind = "survival"
    distinct = sorted(set(values), key=_order)
    if kind == "auto":
        fractions = sum(_number(value) is not None and not float(value).is_integer() for value in distinct)
        numbers = all(_number(value) is not None for value in distinct)
        if len(distinct) > 2 and numbers and (fractions or len(distinct) > _MOST_CLASSES):
            kind = "regression"
        else:
            kind = "multiclass" if len(distinct) > 2 else "binary"
    if kind in ("regression", "survival"):
        return Target(labels.target, kind)
    if labels.classes:
        unknown = [value for value in distinct if value not in labels.classes]
        if unknown:
            raise CohortError(
                f"{where}: column {labels.target!r} holds {unknown[0]!r}, which is none of the classes "
                f"{', '.join(labels.classes)}; leave its label empty, or name it"
            )
        absent = [name for name in labels.classes if name not in distinct]
        if absent:
            raise CohortError(f"{where}: no slide with features is of class {absent[0]!r} in column {labels.target!r}")
    elif len(distinct) > _MOST_CLASSES:
        raise CohortError(
            f"{where}: column {labels.target!r} has {len(distinct)} different values; name the classes, or another column"
        )
    try:
        return Target(labels.target, kind, labels.classes or tuple(distinct))
    except CohortError as error:
        raise CohortError(f"{where}: {error}") from None


def with_horizons(task: Task, patients: Sequence[str]) -> Task:
    """The task with ``horizons``, where it is survival, has none, and there are events; a patient counts once."""
    known = np.flatnonzero(task.known)
    once = known[np.unique(np.asarray(patients)[known], return_index=True)[1]]
    times = task.y[once][task.event[once]]
    if task.target.kind != "survival" or task.target.horizons or not len(times):
        return task
    octiles = tuple(np.quantile(times, np.arange(1, 8) / 8).tolist())
    return replace(task, target=replace(task.target, horizons=octiles))


def parse_value(target: Target, word: str, *, where: str) -> float:
    """A label as a number: the index of its class, or the value itself."""
    if target.is_classes:
        return float(target.classes.index(word))
    value = _number(word)
    if value is None or (target.kind == "survival" and value < 0):
        what = "a time from 0" if target.kind == "survival" else "a number"
        raise CohortError(f"{where}: {target.name} is {word!r}, not {what}; correct it, or leave it empty")
    return value


def parse_event(labels: Labels, row: Mapping[str, Any], *, where: str) -> bool:
    """Whether the event was seen."""
    column = labels.event or labels.censored
    if column is None:
        return True
    word = str(row[column]).strip().casefold()
    if word not in _EVENT_WORDS:
        raise CohortError(f"{where}: {column} is {row[column]!r}; write 1 or 0")
    return _EVENT_WORDS[word] != (labels.censored is not None)


def is_missing(word: str | None) -> bool:
    """Whether a cell of a table says nothing."""
    return word is None or word.strip().casefold() in MISSING


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _order(word: str) -> tuple[float, str]:
    value = _number(word)
    return (math.inf if value is None else value, word)
