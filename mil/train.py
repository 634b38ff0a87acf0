"""Training: the loop, short enough to read at once, and cross-validation around it."""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from features.training import cosine_schedule, follow, half_precision, parameter_groups
from mil.bag import Bag, Batch, collate
from mil.calibration import fit_temperature
from mil.cohort import Cases, Cohort
from mil.config import TrainConfig
from mil.member import Member, Scaling
from mil.models import MILOutput
from mil.models.base import in_chunks
from mil.objective import fit_joint
from mil.predictions import Predictions
from mil.splits import Fold, validation_parts
from mil.target import Task
from wsi.errors import DeviceError, DivergedError

__all__ = [
    "Epoch",
    "Examples",
    "Observer",
    "Observers",
    "TrainedFold",
    "answer_cases",
    "fit_scaling",
    "pick_device",
    "train_fold",
    "train_member",
]


class Epoch(NamedTuple):
    """One line of a learning curve: ``epoch`` of ``planned``; ``stop_loss`` is of the validation part, NaN without one."""

    member: int
    epoch: int
    planned: int
    lr: float
    loss: float
    stop_loss: float
    kept: bool


class Observer(Protocol):
    """Is told how training goes."""

    def fold_started(self, fold: Fold, number: int, total: int) -> None: ...

    def epoch_done(self, fold: Fold, epoch: Epoch) -> None: ...

    def fold_finished(self, fold: Fold, metrics: dict[str, float], *, resumed: bool) -> None: ...


@dataclass(frozen=True)
class Observers:
    """Several observers as one, told in this order."""

    each: Sequence[Observer]

    def fold_started(self, fold: Fold, number: int, total: int) -> None:
        for one in self.each:
            one.fold_started(fold, number, total)

    def epoch_done(self, fold: Fold, epoch: Epoch) -> None:
        for one in self.each:
            one.epoch_done(fold, epoch)

    def fold_finished(self, fold: Fold, metrics: dict[str, float], *, resumed: bool) -> None:
        for one in self.each:
            one.fold_finished(fold, metrics, resumed=resumed)


@dataclass(frozen=True, eq=False)
class Examples:
    """Bags with labels, read when asked for."""

    cohort: Cohort
    cases: Cases

    def bag(self, index: int) -> Bag:
        return self.cohort.read(self.cases.bags[index])

    def labels(self, bags: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(B, T) labels float64, NaN where not known, and (B, T) events bool of these bags, a column a task."""
        tasks = [task.take(self.cases.owner[np.asarray(bags, np.int64)]) for task in self.cases.tasks]
        y, event = np.stack([task.y for task in tasks], 1), np.stack([task.event for task in tasks], 1)
        return torch.from_numpy(y), torch.from_numpy(event)


@dataclass(frozen=True, eq=False)
class _ScaledBags:
    """Bags as a member's model sees them, read when asked for."""

    member: Member
    examples: Examples
    bags: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int, /) -> Bag:
        bag = self.examples.bag(int(self.bags[index]))
        with torch.no_grad():
            scaled = self.member.scaling(collate([bag]).to(self.member.device))
        return Bag(scaled.features[0], None, bag.key)


@dataclass(frozen=True, eq=False)
class TrainedFold:
    """What a fold came to: its models, their curves, and for each task the answers for its test part."""

    fold: Fold
    members: tuple[Member, ...]
    curve: tuple[Epoch, ...]
    tasks: tuple[Predictions, ...]

    @property
    def predictions(self) -> Predictions:
        """The answers for its test part; of several tasks, the first's."""
        return self.tasks[0]

    def of_task(self, index: int) -> "TrainedFold":
        """The same, of one task alone."""
        predictions = self.tasks[index]
        members = tuple(member.speaking_for(predictions.target.name) for member in self.members)
        return TrainedFold(self.fold, members, self.curve, (predictions,))


def train_fold(
    cohort: Cohort, cases: Cases, fold: Fold, number: int, config: TrainConfig, observer: Observer | None = None
) -> TrainedFold:
    """Train the members of one fold and let them answer for its test part.

    Whatever is fitted (scaling, prototypes, units, intervals, weights, temperature) sees the fold's training part alone.
    The same cohort, fold and configuration give the same bits on a CPU with the same number of threads.
    """
    examples = Examples(cohort, cases)
    device = pick_device(config.device)
    train = list(fold.train)
    joint = fit_joint([task.take(train) for task in cases.tasks], config)
    dim = cohort.source.dim
    all_bags = cases.bags_of(train)
    scaling = fit_scaling(examples, all_bags) if config.scale == "standard" else None
    strata = cohort.target.strata(cases.y, cases.event)
    seeds = np.random.SeedSequence([config.seed, number]).generate_state(config.members + 1)
    cuts: list[tuple[list[int], list[int]]] = [(train, [])] * config.members
    if config.inner > 1:
        cuts = validation_parts(strata, cases.patients, train, parts=config.inner, seed=int(seeds[-1]))
    facts = {"model": config.model, "hyper": dict(config.hyper), "dim": dim, "features": dict(cohort.source.facts)}
    members, curve = [], []
    for index in range(config.members):
        fit, stop = (cases.bags_of(part) for part in cuts[index])
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # whoever calls keeps his own luck
            torch.manual_seed(int(seeds[index]))
            member = Member(facts, joint, deepcopy(scaling)).to(device)
            member.model.prepare(_ScaledBags(member, examples, fit), int(seeds[index]))
            for epoch in train_member(member, examples, fit, stop, config, np.random.default_rng(seeds[index])):
                curve.append(epoch._replace(member=index))
                if observer is not None:
                    observer.epoch_done(fold, curve[-1])
        if config.calibrates and len(stop):
            _calibrate(member, examples, stop)
        members.append(member.cpu())
    answers = answer_cases(members, cohort, cases, fold.test, device)
    tasks = tuple(_predictions(task, cases, fold, answers[task.target.name]) for task in cases.tasks)
    return TrainedFold(fold, tuple(members), tuple(curve), tasks)


def train_member(
    member: Member,
    examples: Examples,
    fit: NDArray[np.int64],
    stop: NDArray[np.int64],
    config: TrainConfig,
    rng: np.random.Generator,
) -> Iterator[Epoch]:
    """Train in place, an epoch at a time; in the end the member has its best weights.

    Best is the lowest loss on ``stop``; without such bags, the last. Steps: AdamW on a cosine schedule with warm-up, a
    moving average of the weights, which is what is judged and kept.
    """
    device = member.device
    lr = member.model.learning_rate if config.lr is None else config.lr
    optimizer = torch.optim.AdamW(parameter_groups(member, config.weight_decay), lr=lr, fused=True)
    pace = config.pace(len(fit))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, cosine_schedule(config.warmup_epochs * pace.steps, pace.epochs * pace.steps)
    )
    average = deepcopy(member).eval()
    autocast, scaler = half_precision(config.precision, device)
    best, since, step = math.inf, 0, 0
    for number in range(pace.epochs):
        member.train()
        total, rate = 0.0, optimizer.param_groups[0]["lr"]
        for i, (batch, y, event) in enumerate(_batches(examples, fit, pace.batch_size, config, rng)):
            batch, y, event = batch.to(device), y.to(device), event.to(device)  # noqa: PLW2901 - the same, elsewhere
            scaled = member.scaling(batch)
            dropped = _dropped(scaled, config.feature_dropout)
            with autocast:
                output = member.model(dropped)
                loss = _with_auxiliary(member, dropped, output, y, event)
            if not torch.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss.item()} in epoch {number + 1}: training diverged; lower lr ({lr:g})"
                )
            in_step = min(config.accumulate, pace.passes - i // config.accumulate * config.accumulate)
            scaler.scale(loss / in_step).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach()) * len(y)
            if (i + 1) % config.accumulate == 0 or i + 1 == pace.passes:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
                step += 1
                # The first steps count for less the more follow: a plain average would keep the random start for long.
                follow(average, member, min(config.average, step / (step + 10)))
        judged = _loss(average, examples, stop) if len(stop) else math.nan
        kept = not judged >= best  # also where nobody judges
        if kept:
            best, since = judged if len(stop) else math.inf, 0
            kept_state = deepcopy(average.state_dict())
        else:
            since += 1
        yield Epoch(0, number + 1, pace.epochs, rate, total / len(fit), judged, kept)
        if since >= config.patience:
            break
    member.load_state_dict(kept_state)
    member.eval()


def _with_auxiliary(member: Member, batch: Batch, output: MILOutput, y: Tensor, event: Tensor) -> Tensor:
    """The loss of a batch; the model's own, auxiliary loss is part of that of the first task of classes."""
    losses = member.joint.losses(output.logits, y, event)
    if (task := member.joint.auxiliary) in losses:
        labels = y[:, list(member.joint.tasks).index(task)]
        known = ~labels.isnan()
        rows = slice(None) if known.all() else known  # a view, not a copy of the batch
        kept = Batch(batch.features[rows], batch.mask[rows], None if batch.xy is None else batch.xy[rows])
        of_task = MILOutput(*(each[rows] for each in member.speaking_for(task).narrow(output)))
        auxiliary = member.model.auxiliary_loss(kept, of_task, labels[rows].long())
        losses[task] = member.model.bag_weight * losses[task] + auxiliary
    return member.joint.total(losses)


def _calibrate(member: Member, examples: Examples, stop: NDArray[np.int64]) -> None:
    """Fit the temperature of each task of classes on bags the member was not trained on."""
    logits = torch.stack([member.every_logit(examples.bag(int(index))) for index in stop]).double()
    labels = examples.labels(stop)[0]
    for i, (name, objective) in enumerate(member.joint.tasks.items()):
        known = ~labels[:, i].isnan()
        if objective.is_classes and known.any():
            of_task = logits[known, member.joint.columns(name)].numpy()
            member.temperatures[name] = fit_temperature(of_task, labels[known, i].long().numpy())


def answer_cases(
    members: Sequence[Member], cohort: Cohort, cases: Cases, which: Sequence[int], device: torch.device | str = "cpu"
) -> dict[str, NDArray[np.float64]]:
    """For each task (len(which), P) answers: the mean over the members and over the bags of a case."""
    members = [member.to(device).eval() for member in members]
    rows: dict[str, list[NDArray[np.float64]]] = {name: [] for name in members[0].joint.tasks}
    for case in which:
        of_bags = []
        for index in cases.bags_of([case]):
            bag = cohort.read(cases.bags[index])
            of_bags += [member.answers(bag) for member in members]
        for name, of_task in rows.items():
            of_task.append(torch.stack([each[name] for each in of_bags]).mean(0).numpy())
    return {name: np.stack(of_task) for name, of_task in rows.items()}


def fit_scaling(examples: Examples, bags: NDArray[np.int64]) -> Scaling:
    """Mean and deviation of each feature over all tiles of these bags; a feature that never varies is left as it is."""
    n, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for index in bags:
        x = examples.bag(int(index)).features.double()  # (N, D)
        there = x.mean(0)
        delta = there - mean
        squares = squares + x.sub(there).square().sum(0) + delta.square() * (n * len(x) / (n + len(x)))
        mean = mean + delta * (len(x) / (n + len(x)))
        n += len(x)
    deviation = (squares / n).sqrt()
    return Scaling(mean, torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, torch.ones_like(deviation)))


def pick_device(name: str) -> torch.device:
    """The device of this name; ``"auto"`` is a GPU where there is one.

    Raises:
        DeviceError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); take cpu or auto") from error
    return device


def _batches(
    examples: Examples, bags: NDArray[np.int64], batch_size: int, config: TrainConfig, rng: np.random.Generator
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    order = rng.permutation(bags)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        drawn = [_drawn(examples.bag(int(index)), config, rng) for index in chosen]
        yield collate(drawn), *examples.labels(chosen)


def _drawn(bag: Bag, config: TrainConfig, rng: np.random.Generator) -> Bag:
    """A bag with some of its tiles left out by chance, at most ``max_tiles`` left, in their order."""
    keep = np.flatnonzero(rng.random(len(bag)) >= config.tile_dropout)
    if not len(keep):
        keep = rng.integers(0, len(bag), 1)
    if len(keep) > config.max_tiles:
        keep = np.sort(rng.choice(keep, config.max_tiles, replace=False))
    if len(keep) == len(bag):
        return bag
    index = torch.from_numpy(keep)
    return Bag(bag.features[index], None if bag.xy is None else bag.xy[index], bag.key)


def _dropped(batch: Batch, share: float) -> Batch:
    """A batch with a share of its values set to 0, their mean, and the others made larger to make up for them."""
    if not share:
        return batch
    features = in_chunks(lambda x: F.dropout(x, share), batch.features, mask=batch.mask)
    return Batch(features, batch.mask, batch.xy)


@torch.no_grad()
def _loss(member: Member, examples: Examples, bags: NDArray[np.int64]) -> float:
    """The objective over bags taken together, each with all of its tiles."""
    logits = torch.stack([member.every_logit(examples.bag(int(index))) for index in bags])
    return float(member.joint(logits, *examples.labels(bags)))


def _predictions(task: Task, cases: Cases, fold: Fold, answers: NDArray[np.float64]) -> Predictions:
    test = list(fold.test)
    return Predictions(
        task.target,
        tuple(cases.names[i] for i in test),
        tuple(cases.patients[i] for i in test),
        task.y[test],
        task.event[test],
        answers,
        (fold.name,) * len(test),
    )
