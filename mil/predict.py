"""Predictor: a trained run applied to a store: answers, doubt, and what they rest on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from features.keys import readable_part
from features.selection import selection_from_facts
from features.store import FeatureStore, SlideStore
from mil import explain
from mil.cohort import LeftOut, SlideNames
from mil.member import Member
from mil.predictions import Predictions
from mil.result import Result
from mil.sources import BagSource, StoreSource, pool_bags
from mil.table import SlideTable
from mil.train import pick_device
from mil.uncertainty import Conformal, Doubt, doubt
from wsi._files import write_table
from wsi.errors import NotExtractedError, RunMismatchError, SlideError
from wsi.heatmap import Heatmap
from wsi.slide import Overview, Slide

__all__ = ["Answers", "Predictor", "overview_of", "read_patients"]

_ALPHA = 0.1
_PICTURE_PX = 2048


@dataclass(frozen=True, eq=False)
class Answers:
    """What a run says of a store's slides.

    Attributes:
        predictions: a row a case; ``folds`` says whose models answered.
        doubt: of the ensemble, for classes; else None.
        sets: (n, C) prediction sets at 90%, for classes; else None.
        left_out: slides without an answer, and why.
    """

    predictions: Predictions
    doubt: Doubt | None
    sets: NDArray[np.bool_] | None
    left_out: tuple[LeftOut, ...]

    def write(self, path: Path) -> None:
        """As CSV: case, patient, models, answer, the numbers, and for classes doubt in bits and the set at 90%."""
        rows = self.predictions
        head = ["case", "patient", "models", "answer", *rows.columns]
        if self.doubt is not None:
            head += ["doubt", "disagreement", "set at 90%"]
        lines = []
        for i, name in enumerate(rows.names):
            numbers = [f"{value:.6g}" for value in rows.answers[i]]
            line = [name, rows.patients[i], rows.folds[i], self.answer(i), *numbers]
            if self.doubt is not None and self.sets is not None:
                held = [rows.target.classes[k] for k in np.flatnonzero(self.sets[i])]
                line += [f"{self.doubt.total[i]:.4f}", f"{self.doubt.disagreement[i]:.4f}", " | ".join(held)]
            lines.append(line)
        write_table(path, head, lines)

    def answer(self, index: int) -> str:
        """The likeliest class, or the value or risk."""
        rows = self.predictions
        if rows.target.is_classes:
            return rows.target.classes[int(rows.answers[index].argmax())]
        return f"{rows.score[index]:.6g}"


class Predictor:
    """The models of a finished run.

    A slide that took part in the training is answered only by the folds that tested it; any other by all of them. Of a
    run with several targets ``predict`` answers for the first and ``predict_tasks`` for all; ``tasks`` has a predictor for
    each.

    >>> answers = Predictor.load("runs/subtype").predict("OUT")
    """

    def __init__(self, result: Result, *, device: str = "auto", name: str = "the run") -> None:
        self.result = result
        self.name = name
        self.device = pick_device(device)
        self._folds = {each.fold.name: [member.to(self.device) for member in each.members] for each in result.folds}
        self._owner = {
            slide: int(owner) for bag, owner in zip(result.cases.bags, result.cases.owner, strict=True) for slide in bag
        }

    @classmethod
    def load(cls, run: str | Path, *, device: str = "auto") -> "Predictor":
        """A run from its folder.

        Raises:
            NotExtractedError: there is none, or it is not finished.
        """
        return cls(Result.load(run), device=device, name=str(run))

    @cached_property
    def tasks(self) -> Mapping[str, "Predictor"]:
        """The same for each target by its name."""
        return {
            name: Predictor(result, device=str(self.device), name=self.name)
            for name, result in self.result.tasks.items()
        }

    def source(self, store: FeatureStore) -> StoreSource:
        """The store's bags of the encoders that the run was trained on.

        Raises:
            RunMismatchError: the store's features are not what it was trained on.
        """
        trained = self.result.features
        if "encoder" not in trained or None in trained["encoder"]:
            raise RunMismatchError(
                f"{self.name}: was trained on arrays or files that name no encoder; it cannot read a store"
            )
        encoders = [str(name) for name in trained["encoder"]]
        there = sorted({name for slide in store for name in slide.encoders})
        lacking = [name for name in encoders if name not in there]
        if lacking:
            raise RunMismatchError(
                f"{store.root}: has features of {', '.join(there) or 'no encoder'}, but {self.name} was trained on "
                f"{', '.join(encoders)}; run wsi extract with --encoder {lacking[0]}"
            )
        chosen = trained.get("select")
        source = StoreSource(store, encoders, None if chosen is None else selection_from_facts(chosen))
        self.check(source, where=str(store.root))
        return source

    def check(self, source: BagSource, *, where: str) -> None:
        """Raises RunMismatchError where features differ from those the run was trained on."""
        trained, found = self.result.features, source.facts
        differ = [key for key in trained if key in found and found[key] != trained[key]]
        if differ:
            words = "; ".join(f"{key} {found[key]} here, {trained[key]} in training" for key in differ)
            raise RunMismatchError(
                f"{where}: other features than {self.name} was trained on ({words}); extract them likewise"
            )

    def members_for(self, slides: Sequence[str]) -> tuple[str, list[Member]]:
        """Whose models answer for these slides: the name of the folds, and the models."""
        everybody = [member for members in self._folds.values() for member in members]
        cases = {self._owner[slide] for slide in slides if slide in self._owner}
        if not cases:
            return "all", everybody
        tested_by = [each.fold.name for each in self.result.folds if cases <= set(each.fold.test)]
        if not tested_by:
            return "all, trained on it", everybody
        return "+".join(tested_by), [member for name in tested_by for member in self._folds[name]]

    def predict(
        self,
        root: str | Path,
        *,
        patients: Mapping[str, str] | None = None,
        done: Callable[[str], None] | None = None,
    ) -> Answers:
        """Answers for every slide of a store, or for every patient; of several targets, for the first.

        Args, Raises: as for ``predict_tasks``.
        """
        return self.predict_tasks(root, patients=patients, done=done)[self.result.target.name]

    def predict_tasks(
        self,
        root: str | Path,
        *,
        patients: Mapping[str, str] | None = None,
        done: Callable[[str], None] | None = None,
    ) -> dict[str, Answers]:
        """Answers for each target, for every slide of a store or for every patient. Each bag is read and run once.

        Args:
            patients: whose each slide is, by store key (``read_patients``); several are then fused as in training.
            done: is told each case that has been answered.

        Raises:
            RunMismatchError: the features are not what the run was trained on.
            NotExtractedError: no slide has any.
        """
        store = FeatureStore(root)
        source = self.source(store)
        left_out, cases = [], dict[str, list[str]]()
        for slide in store:
            if reason := source.lacks(slide.key):
                left_out.append(LeftOut(slide.key, reason))
            elif patients is not None and slide.key not in patients:
                left_out.append(LeftOut(slide.key, "no patient in the table"))
            else:
                cases.setdefault(patients[slide.key] if patients is not None else slide.key, []).append(slide.key)
        if not cases:
            raise NotExtractedError(
                f"{store.root}: no slide can be answered ({left_out[0].reason if left_out else 'it is empty'})"
            )
        early = self.result.fusion == "early"
        models = []
        answers: dict[str, list[NDArray[np.float64]]] = {name: [] for name in self.result.tasks}  # (M, P) of each case
        for name, slides in cases.items():
            used, members = self.members_for(slides)
            bags = (
                [pool_bags([source.read(each) for each in slides], name)]
                if early
                else [source.read(each) for each in slides]
            )
            said = [[member.answers(bag) for bag in bags] for member in members]
            for task, found in answers.items():
                found.append(np.stack([torch.stack([each[task] for each in of]).mean(0).numpy() for of in said]))
            models.append(used)
            if done is not None:
                done(name)
        return {
            task: self._answers(result, tuple(cases), tuple(models), answers[task], tuple(left_out))
            for task, result in self.result.tasks.items()
        }

    @staticmethod
    def _answers(
        result: Result, names: tuple[str, ...], models: tuple[str, ...], answers: Sequence[NDArray[np.float64]],
        left_out: tuple[LeftOut, ...],
    ) -> Answers:  # fmt: skip
        n = len(names)
        rows = np.stack([each.mean(axis=0) for each in answers])
        predictions = Predictions(result.target, names, names, np.full(n, np.nan), np.ones(n, bool), rows, models)
        if not result.target.is_classes:
            return Answers(predictions, None, None, left_out)
        sets = Conformal.fit(result.predictions, _ALPHA).sets(predictions.answers)
        doubts = [doubt(each[:, None]) for each in answers]
        together = Doubt(*(np.concatenate([each[k] for each in doubts]) for k in range(3)))
        return Answers(predictions, together, sets, left_out)

    def heatmap(self, source: StoreSource, slide: str, *, kind: str = "attention") -> Heatmap:
        """What the answering models rest on, one number a tile; ``kind`` as for ``mil.explain.heatmap``."""
        return explain.heatmap(self.members_for([slide])[1], source, slide, kind=kind)


def read_patients(
    table: Path, store: FeatureStore, *, slide: str | None = None, patient: str | None = None
) -> dict[str, str]:
    """Whose each slide of a store is, by store key, from a CSV with columns of slides and patients.

    Raises:
        CohortError: the table cannot be used.
    """
    read = SlideTable.read(table)
    names = SlideNames({key: readable_part(key) for key in store.keys})
    found: dict[str, str] = {}
    slide, patient = read.column("slide", slide), read.column("patient", patient)
    for row in read.rows:
        key = names.find(row[slide])
        if key is not None:
            found[key] = row[patient]
    return found


def overview_of(slide: SlideStore) -> Overview | None:
    """The overview of a stored slide's file; None where the file is gone or cannot be read."""
    about = slide.manifest["slide"]
    try:
        with Slide.open(about["location"], mpp=tuple(about["mpp"])) as opened:
            return opened.overview(max_px=_PICTURE_PX)
    except SlideError:  # a picture is drawn all the same, on white
        return None
