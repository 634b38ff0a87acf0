"""Predictions: what was answered for each case, beside what is true."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features.keys import safe_name
from mil.target import Target
from wsi._files import write_table
from wsi.errors import BadFeaturesError

__all__ = ["Predictions", "file_name", "stack"]

_FIXED = ("case", "patient", "fold", "true", "event")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Answers for n cases.

    Attributes:
        target: what was predicted.
        names: (n,) cases.
        patients: (n,) whose they are; what bootstrap intervals resample.
        y: (n,) class index, value or time; NaN where it is not known.
        event: (n,) whether the event was seen.
        answers: (n, P) probabilities of the classes; or (n, 1) the value; or (n, P) survival at the ends of the
            intervals, or (n, 1) log risk.
        folds: (n,) the fold that answered.
    """

    target: Target
    names: tuple[str, ...]
    patients: tuple[str, ...]
    y: NDArray[np.float64]
    event: NDArray[np.bool_]
    answers: NDArray[np.float64]
    folds: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(each) for each in (self.names, self.patients, self.y, self.event, self.answers, self.folds)}
        if len(lengths) != 1 or self.answers.ndim != 2:
            raise ValueError(f"predictions need one row a case in every column, got {sorted(lengths)} rows")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def score(self) -> NDArray[np.float64]:
        """(n,) one number a case: probability of the positive class; expected class index; value; or risk."""
        if self.target.kind == "binary":
            return self.answers[:, 1]
        if self.target.is_classes:
            return np.asarray(self.answers @ np.arange(self.answers.shape[1]))
        if self.target.kind == "survival" and self.answers.shape[1] > 1:
            return np.asarray(-self.answers.sum(axis=1))
        return self.answers[:, 0]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the answers."""
        if self.target.is_classes:
            return tuple(f"p({name})" for name in self.target.classes)
        if self.target.kind == "survival":
            n = self.answers.shape[1]
            return ("log risk",) if n == 1 else tuple(f"survival {i + 1}" for i in range(n))
        return ("value",)

    @property
    def known(self) -> "Predictions":
        """The rows whose truth is known."""
        return self.take(np.flatnonzero(~np.isnan(self.y)))

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Predictions":
        """Some of the rows, in the order given."""
        index = np.asarray(rows, np.int64)
        pick = index.tolist()
        return Predictions(
            self.target,
            tuple(self.names[i] for i in pick),
            tuple(self.patients[i] for i in pick),
            self.y[index],
            self.event[index],
            self.answers[index],
            tuple(self.folds[i] for i in pick),
        )

    def write(self, path: Path) -> None:
        """As CSV; what is read back is equal bit for bit."""
        rows = []
        for i, name in enumerate(self.names):
            row = (name, self.patients[i], self.folds[i], _true(self.target, self.y[i]), int(self.event[i]))
            rows.append((*row, *(repr(float(value)) for value in self.answers[i])))
        write_table(path, (*_FIXED, *self.columns), rows)

    @classmethod
    def read(cls, path: Path, target: Target) -> "Predictions":
        """Raises BadFeaturesError where the file is not one that ``write`` made."""
        try:
            rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
            if tuple(rows[0][: len(_FIXED)]) != _FIXED:
                raise ValueError("other columns")
            body = rows[1:]
            index = {name: float(i) for i, name in enumerate(target.classes)} | {"": float("nan")}
            return cls(
                target,
                tuple(row[0] for row in body),
                tuple(row[1] for row in body),
                np.array([index[row[3]] if row[3] in index else float(row[3]) for row in body]),
                np.array([row[4] == "1" for row in body], bool),
                np.array([[float(value) for value in row[5:]] for row in body]).reshape(len(body), -1),
                tuple(row[2] for row in body),
            )
        except (OSError, ValueError, IndexError) as error:
            raise BadFeaturesError(f"{path}: not the predictions of a run ({error}); train it again") from error


def file_name(target: Target, among: int) -> str:
    """What predictions of a target are called on disk: by its name where there are several."""
    return "predictions.csv" if among == 1 else f"predictions-{safe_name(target.name)}.csv"


def stack(parts: Sequence[Predictions]) -> Predictions:
    """The rows of several, one below the other."""
    return Predictions(
        parts[0].target,
        tuple(name for part in parts for name in part.names),
        tuple(patient for part in parts for patient in part.patients),
        np.concatenate([part.y for part in parts]),
        np.concatenate([part.event for part in parts]),
        np.concatenate([part.answers for part in parts]),
        tuple(fold for part in parts for fold in part.folds),
    )


def _true(target: Target, value: float) -> str:
    if np.isnan(value):
        return ""
    return target.classes[int(value)] if target.is_classes else repr(float(value))
