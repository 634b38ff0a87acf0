"""Objective: how a kind of target is learned, and how logits become answers; Joint: several side by side.

Fitted on the training part alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mil.config import TrainConfig
from mil.losses import cox_loss, cross_entropy, discrete_hazard_loss, focal_loss, multi_task_loss, ordinal_loss
from mil.target import Target, Task
from wsi.errors import CohortError, UsageError

__all__ = ["Joint", "Objective", "fit_joint", "fit_objective"]

_LOSSES = {
    "binary": ("cross_entropy", "focal"),
    "multiclass": ("cross_entropy", "focal"),
    "ordinal": ("ordinal", "cross_entropy", "focal"),
    "regression": ("mse",),
    "survival": ("nll", "cox"),
}


@dataclass(frozen=True)
class Objective:
    """A loss with what was fitted for it.

    Attributes:
        loss: cross_entropy, focal, ordinal, mse, nll or cox.
        n_outputs: logits a model needs.
        class_weights: of the loss, or empty.
        edges: survival: the times at which one interval ends and the next begins.
        centre, spread: regression: mean and deviation of the training values; models answer in these units.
    """

    loss: str
    n_outputs: int
    class_weights: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    centre: float = 0.0
    spread: float = 1.0

    def __call__(self, logits: Tensor, y: Tensor, event: Tensor) -> Tensor:
        """The loss of logits (B, n_outputs) for labels (B,) float64 and events (B,) bool: a scalar."""
        match self.loss:
            case "cross_entropy":
                return cross_entropy(logits, y.long(), class_weights=self._weights(logits))
            case "focal":
                return focal_loss(logits, y.long(), class_weights=self._weights(logits))
            case "ordinal":
                return ordinal_loss(logits, y.long())
            case "nll":
                return discrete_hazard_loss(logits, self.bins(y), event)
            case "cox":
                return cox_loss(logits, y, event)
            case _:
                return F.mse_loss(logits.float().squeeze(1), ((y - self.centre) / self.spread).float())

    @property
    def is_classes(self) -> bool:
        """Whether logits are those of classes, so that a model's own, auxiliary loss makes sense."""
        return self.loss in ("cross_entropy", "focal")

    def bins(self, time: Tensor) -> Tensor:
        """(B,) the interval a time lies in; one exactly at an edge belongs to the earlier."""
        edges = torch.tensor(self.edges, dtype=torch.float64, device=time.device)
        return torch.bucketize(time.double(), edges, right=False)

    def answer(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """(B, n_outputs) logits as float64 answers: probabilities, a value, the survival curve, or log risk."""
        logits = logits.double() / temperature
        match self.loss:
            case "cross_entropy" | "focal":
                return logits.softmax(-1)
            case "ordinal":
                above = logits.sigmoid().cummin(-1).values  # thresholds need not agree: no later one is likelier
                one, none = torch.ones_like(above[:, :1]), torch.zeros_like(above[:, :1])
                return torch.cat([one, above], -1) - torch.cat([above, none], -1)
            case "nll":
                return (1 - logits.sigmoid()).cumprod(-1)
            case "cox":
                return logits
            case _:
                return logits * self.spread + self.centre

    def _weights(self, logits: Tensor) -> Tensor | None:
        return torch.tensor(self.class_weights, device=logits.device) if self.class_weights else None

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Objective":
        """An objective from its fields as JSON keeps them."""
        lists = {key: tuple(facts[key]) for key in ("class_weights", "edges")}
        return cls(**{**facts, **lists})


@dataclass(frozen=True)
class Joint:
    """The objectives of a model's tasks, usually one: each has logits to itself, side by side, and a weight in the loss.

    Attributes:
        tasks: the objectives by the names of their targets, in the order of the logits.
        weights: of the tasks' losses; they sum to one.
    """

    tasks: Mapping[str, Objective]
    weights: Mapping[str, float]

    @property
    def n_outputs(self) -> int:
        """Logits a model needs."""
        return sum(objective.n_outputs for objective in self.tasks.values())

    def columns(self, task: str) -> slice:
        """The logits of a task."""
        ends = dict(zip(self.tasks, accumulate(each.n_outputs for each in self.tasks.values()), strict=True))
        return slice(ends[task] - self.tasks[task].n_outputs, ends[task])

    @property
    def auxiliary(self) -> str | None:
        """The task that a model's own, auxiliary loss belongs to: the first of classes."""
        return next((name for name, objective in self.tasks.items() if objective.is_classes), None)

    def losses(self, logits: Tensor, y: Tensor, event: Tensor) -> dict[str, Tensor]:
        """The loss of each task over the cases whose label is known; a task without any is not among them.

        Args:
            logits: (B, n_outputs).
            y: (B, T) labels float64, NaN where not known.
            event: (B, T) bool.
        """
        found = {}
        for i, (name, objective) in enumerate(self.tasks.items()):
            known = ~y[:, i].isnan()
            if known.any():
                found[name] = objective(logits[known, self.columns(name)], y[known, i], event[known, i])
        return found

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the tasks' losses: a scalar."""
        return multi_task_loss(losses, {name: self.weights[name] for name in losses})

    def __call__(self, logits: Tensor, y: Tensor, event: Tensor) -> Tensor:
        """The loss of logits (B, n_outputs) for labels and events (B, T): a scalar."""
        return self.total(self.losses(logits, y, event))

    def to_facts(self) -> dict[str, Any]:
        """As JSON keeps it; a list, as the order counts."""
        tasks = [[name, asdict(objective)] for name, objective in self.tasks.items()]
        return {"tasks": tasks, "weights": dict(self.weights)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Joint":
        """What ``to_facts`` made."""
        return cls({name: Objective.from_facts(each) for name, each in facts["tasks"]}, dict(facts["weights"]))


def fit_joint(tasks: Sequence[Task], config: TrainConfig) -> Joint:
    """The objectives for a training part, each fitted where its label is known.

    A loss that is named is taken for the tasks it is for; others have the first of their kind.

    Raises:
        UsageError: a loss that is for none of them, or the weight of a task that is not there.
        CohortError: nothing can be learned from the labels of one.
    """
    names = [task.target.name for task in tasks]
    if unknown := config.task_weights.keys() - set(names):
        raise UsageError(f"task_weights has {min(unknown)!r}, but the targets are {', '.join(names)}")
    if len(tasks) > 1 and not any(config.loss in ("auto", *_LOSSES[task.target.kind]) for task in tasks):
        raise UsageError(f"the loss {config.loss} is for none of the targets {', '.join(names)}; take auto")
    total = sum(config.task_weights.get(name, 1.0) for name in names)
    found = {}
    for task in tasks:
        fits = len(tasks) == 1 or config.loss in _LOSSES[task.target.kind]
        known = task.take(np.flatnonzero(task.known))
        found[task.target.name] = fit_objective(
            task.target, config if fits else replace(config, loss="auto"), known.y, known.event
        )
    return Joint(found, {name: config.task_weights.get(name, 1.0) / total for name in names})


def fit_objective(target: Target, config: TrainConfig, y: NDArray[np.float64], event: NDArray[np.bool_]) -> Objective:
    """The objective for a training part.

    Raises:
        UsageError: a loss of another kind of target.
        CohortError: nothing can be learned from these labels.
    """
    allowed = _LOSSES[target.kind]
    loss = allowed[0] if config.loss == "auto" else config.loss
    if loss not in allowed:
        raise UsageError(f"the loss {loss} is not for a {target.kind} target; take auto, {' or '.join(allowed)}")
    if not len(y):
        raise CohortError(f"{target.name}: nobody in a training part has a label; take fewer folds or inner parts")
    if target.is_classes:
        n = len(target.classes)
        counts = np.bincount(y.astype(int), minlength=n)
        if not counts.all():
            name = target.classes[int(counts.argmin())]
            raise CohortError(
                f"{target.name}: nobody in a training part is of class {name!r}; take fewer folds or inner parts"
            )
        balanced = config.class_weights == "balanced" and loss != "ordinal"
        weights = tuple((len(y) / (n * counts)).tolist()) if balanced else ()
        return Objective(loss, n - 1 if loss == "ordinal" else n, class_weights=weights)
    if target.kind == "regression":
        spread = float(y.std())
        if spread == 0:
            raise CohortError(f"{target.name}: all values of a training part are equal; there is nothing to learn")
        return Objective(loss, 1, centre=float(y.mean()), spread=spread)
    if not event.any():
        raise CohortError(f"{target.name}: no event in a training part; check the column of events")
    if loss == "cox":
        return Objective(loss, 1)
    # Quantiles of the times of those whose event was seen, as in the PANTHER code (methods.md 2.1).
    # Edges may coincide; then an interval stays empty and the number of outputs is the same in every fold.
    edges = np.quantile(y[event], np.linspace(0, 1, config.bins + 1)[1:-1])
    return Objective(loss, len(edges) + 1, edges=tuple(edges.tolist()))
