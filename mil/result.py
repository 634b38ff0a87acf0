"""Result: what a cross-validation came to: metrics, pictures, heatmaps, models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features.keys import slide_path
from mil.cohort import Cases, Cohort, Fusion, SlideNames
from mil.config import TrainConfig
from mil.metrics import PRIMARY, Interval, intervals, measure
from mil.predictions import Predictions, stack
from mil.target import Target
from mil.train import TrainedFold
from wsi.errors import NotExtractedError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mil.uncertainty import Conformal
    from wsi.heatmap import Heatmap

__all__ = ["Result"]


@dataclass(frozen=True, eq=False)
class Result:
    """A finished cross-validation. Every prediction in it comes from models that never saw the patient.

    Of a run with several targets it is the result of the first; ``tasks`` has one for each.

    Attributes:
        config: how it was trained.
        features: facts of the features.
        folds: models, curves and test predictions of each fold.
        cases: who took part.
        cohort: where the bags are; None for a run that was read back from disk.
    """

    config: TrainConfig
    features: Mapping[str, Any]
    folds: tuple[TrainedFold, ...]
    cases: Cases
    cohort: Cohort | None = None

    @classmethod
    def load(cls, run: str | Path, cohort: Cohort | None = None) -> "Result":
        """A run from its folder.

        Args:
            cohort: the cohort it was trained on, for heatmaps.
        """
        from mil.run import RunFolder

        return replace(RunFolder(Path(run)).read_all(), cohort=cohort)

    @property
    def target(self) -> Target:
        """What was predicted."""
        return self.cases.tasks[0].target

    @cached_property
    def tasks(self) -> Mapping[str, "Result"]:
        """The result of each target by its name; its heatmaps show what the models rest that answer on."""
        return {
            task.target.name: replace(
                self,
                folds=tuple(each.of_task(index) for each in self.folds),
                cases=replace(self.cases, tasks=(task,)),
            )
            for index, task in enumerate(self.cases.tasks)
        }

    @cached_property
    def predictions(self) -> Predictions:
        """Every fold's test part, a row a case."""
        return stack([each.predictions for each in self.folds])

    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of each fold."""
        return {each.fold.name: measure(each.predictions) for each in self.folds}

    def intervals(self, *, level: float = 0.95, draws: int | None = None, seed: int = 0) -> dict[str, Interval]:
        """Metrics of all folds' answers together, each with its bootstrap interval over patients."""
        return intervals(self.predictions, level=level, draws=draws or self.config.draws, seed=seed)

    def summary(self, *, draws: int | None = None) -> str:
        """A table for people: each metric as mean ± deviation over folds, and pooled with its 95% interval.

        Of several targets, one table below the other.
        """
        if len(self.cases.tasks) > 1:
            return "\n\n".join(result.summary(draws=draws) for result in self.tasks.values())
        by_fold = self.metrics()
        first = PRIMARY[self.target.kind]
        pooled = self.intervals(draws=draws)
        what = f"{self.target.name} ({self.target.kind})"
        n = len(self.predictions.known)
        lines = [
            f"{self.config.model} for {what}: {len(self.folds)} folds, {n} cases",
            f"{'':18}{'mean ± sd of folds':>20}   pooled [95% over patients]",
        ]
        for name in sorted(pooled, key=lambda each: each != first):
            values = np.array([metrics[name] for metrics in by_fold.values()])
            values = values[~np.isnan(values)]
            spread = f"{values.mean():.3f} ± {values.std():.3f}" if len(values) else "not defined"
            lines.append(f"{name:18}{spread:>20}   {pooled[name]}")
        if self.target.is_classes:
            lines.append(self._calibration())
        if self.target.horizons:
            times = ", ".join(f"{time:.4g}" for time in self.target.quartiles)
            lines.append(f"auc_q1 to auc_q3 are at {self.target.name} {times}, the quartiles of the event times")
        return "\n".join(lines)

    def _calibration(self) -> str:
        """Whether the probabilities were corrected, and on whom."""
        temperatures = [member.temperature for each in self.folds for member in each.members]
        if any(value != 1.0 for value in temperatures):
            low, high = min(temperatures), max(temperatures)
            words = f"temperature {low:.2f} to {high:.2f}, each fitted on the part that its model was stopped by"
            return f"probabilities are calibrated ({words})"
        if not all(member.objective.is_classes for each in self.folds for member in each.members):
            why = "a temperature is for classes learned by cross-entropy or focal loss"
        elif self.config.inner == 1:
            why = "no part was kept from training to do it on: inner is 1"
        else:
            why = "calibrate is false"
        return f"probabilities are not calibrated ({why})"

    def fold_of(self, case: str) -> TrainedFold:
        """The fold that tested this case."""
        for each in self.folds:
            if case in each.predictions.names:
                return each
        raise NotExtractedError(f"no fold tested {case!r}; it is only among the training cases, or not in the cohort")

    def heatmap(self, slide: str, *, kind: str = "attention") -> "Heatmap":
        """What the models that never saw this slide's patient looked at, as one number a tile.

        Args:
            slide: key, relative path, file name or stem.
            kind: ``"attention"``, ``"importance"`` (what leaving a tile out takes from the answer) or ``"gradients"``.
        """
        from mil import explain

        cohort = self.cohort
        if cohort is None:
            raise UsageError("heatmaps need the slides: Result.load(run, cohort), or wsi predict")
        key = SlideNames({name: slide_path(name) for name in cohort.slides}).find(slide)
        if key is None:
            raise NotExtractedError(f"{cohort.name}: no slide {slide!r} took part")
        owner = next(int(self.cases.owner[i]) for i, bag in enumerate(self.cases.bags) if key in bag)
        members = self.fold_of(self.cases.names[owner]).members
        return explain.heatmap(members, cohort.source, key, kind=kind)

    def conformal(self, alpha: float = 0.1) -> "Conformal":
        """Prediction sets that hold the true class with probability 1 − alpha, calibrated on all folds' answers."""
        from mil.uncertainty import Conformal

        return Conformal.fit(self.predictions, alpha)

    def plot_roc(self) -> "Figure":
        """ROC curves of all folds' answers; one a class."""
        from mil import plots

        return plots.roc(self.predictions)

    def plot_pr(self) -> "Figure":
        """Precision against recall."""
        from mil import plots

        return plots.precision_recall(self.predictions)

    def plot_confusion(self) -> "Figure":
        """How often each class was taken for each."""
        from mil import plots

        return plots.confusion(self.predictions)

    def plot_calibration(self) -> "Figure":
        """Confidence against how often it was right."""
        from mil import plots

        return plots.calibration(self.predictions)

    def plot_survival(self) -> "Figure":
        """Kaplan-Meier curves of those of lower and of higher risk, with the log-rank test."""
        from mil import plots

        return plots.kaplan_meier(self.predictions)

    def plot_curves(self) -> "Figure":
        """Training and validation loss of every model."""
        from mil import plots

        return plots.learning_curves([each.curve for each in self.folds])

    @property
    def fusion(self) -> Fusion:
        return self.config.fusion

    def __repr__(self) -> str:
        name = PRIMARY[self.target.kind]
        values: Sequence[float] = [metrics[name] for metrics in self.metrics().values()]
        return (
            f"<Result {self.target.name}: {name} {np.mean(values):.3f} ± {np.std(values):.3f} over {len(values)} folds>"
        )
