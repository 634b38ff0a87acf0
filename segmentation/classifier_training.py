"""Training of a patch classifier: the loop, short enough to read at once."""

import math
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from features.encoder import resolve_device
from features.extract import prefetch
from features.training import cosine_schedule, half_precision, parameter_groups
from segmentation.augment import Augmentation, augment
from segmentation.classifier import PatchClassifier
from segmentation.sampling import Draw, PatchBatch, PatchIndex, read_patches, weigh_hard, weigh_regions
from wsi.errors import DivergedError, RunMismatchError, UsageError

__all__ = ["ClassifierEpoch", "ClassifierTraining", "balanced_loss", "train_classifier"]

_BATCHES_AHEAD = 2  # augmented


@dataclass(frozen=True)
class ClassifierTraining:
    """How a patch classifier is trained; saved beside it. Rate, batch and epochs are H2G-Net's.

    Attributes:
        levels: the hierarchy that patches are drawn from, from the top: ``slide``, ``class``, ``cluster``, facts of slides.
        loss: ``"mean"`` over the patches of a batch; ``"clusters"``: the mean over its cells of class and cluster of the
            mean within each, H2G-Net's cluster-guided variant.
        region_share: of what is drawn, to come from regions that somebody chose; None for no matter where.
        mine_hard: whether patches whose loss was high come more often.
        augmentation: what patches go through.
        epochs: at most.
        patches: drawn in each epoch.
        validation_patches: drawn once of the validation slides, by the same hierarchy.
        batch_size: patches a step.
        lr: of Adam, at its highest: it rises for an epoch and falls with half a cosine.
        weight_decay: of weights, not of biases and norms.
        patience: epochs without a lower validation loss after which training ends.
        precision: ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: as ``features.encoder.EncoderRequest``.
        seed: of everything that is drawn.
    """

    levels: tuple[str, ...] = ("slide", "class")
    loss: Literal["mean", "clusters"] = "mean"
    region_share: float | None = None
    mine_hard: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    epochs: int = 200
    patches: int = 6400
    validation_patches: int = 3200
    batch_size: int = 64
    lr: float = 1e-4
    weight_decay: float = 0.0
    patience: int = 40
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.loss not in ("mean", "clusters") or self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise UsageError(f"there is no loss {self.loss!r}, or no precision {self.precision!r}")
        for name in ("epochs", "patches", "validation_patches", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf or self.seed < 0:
            raise UsageError(
                f"lr is above 0, weight_decay and seed are from 0; got {self.lr}, {self.weight_decay}, {self.seed}"
            )


class ClassifierEpoch(NamedTuple):
    """One line of a learning curve; the last two are of the validation patches, NaN without any.

    ``balanced_accuracy`` is the mean over the classes of the share of patches told right.
    """

    epoch: int
    lr: float
    loss: float
    validation_loss: float
    balanced_accuracy: float
    kept: bool


def train_classifier(
    classifier: PatchClassifier,
    index: PatchIndex,
    options: ClassifierTraining,
    validation: PatchIndex | None = None,
    *,
    threads: int | None = None,
) -> Iterator[ClassifierEpoch]:
    """Train in place, an epoch at a time; in the end the classifier has its best weights.

    Best is the lowest loss on the validation patches; without any, the last. The same seed gives the same bits on a CPU
    with the same number of PyTorch's threads, whatever the number of ``threads`` that read.

    Raises:
        RunMismatchError: the patches are not those the classifier is for.
        DivergedError: the loss is no longer a number.
    """
    for part in (index, *([] if validation is None else [validation])):
        _check(classifier, part)
    device = resolve_device(options.device)
    classifier.to(device)
    trained = classifier.head if classifier.options.frozen else classifier
    optimizer = torch.optim.AdamW(parameter_groups(trained, options.weight_decay), lr=options.lr)
    steps = math.ceil(options.patches / options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(steps, options.epochs * steps))
    autocast, scaler = half_precision(options.precision, device)
    clusters = torch.from_numpy(index.clusters.astype(np.int64))
    losses = np.full(len(index), np.nan, np.float32)
    kept_state, best, since = deepcopy(classifier.state_dict()), math.inf, 0
    for epoch in range(options.epochs):
        rate, total, count = optimizer.param_groups[0]["lr"], 0.0, 0
        classifier.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # whoever calls keeps his own luck
            torch.manual_seed(int(np.random.SeedSequence([options.seed, epoch]).generate_state(1)[0]))
            for batch in _augmented(index, _drawn(index, options, epoch, losses), options, epoch, threads):
                labels = torch.from_numpy(batch.labels).to(device)
                with autocast:
                    logits = classifier(torch.from_numpy(batch.pixels).to(device, non_blocking=True))
                each = F.cross_entropy(logits, labels, reduction="none")  # (B,)
                loss = (
                    balanced_loss(each, labels, clusters[batch.rows].to(device))
                    if options.loss == "clusters"
                    else each.mean()
                )
                if not torch.isfinite(loss):
                    raise DivergedError(
                        f"the loss is {loss.item()} in epoch {epoch + 1}: training diverged; lower lr ({options.lr:g})"
                    )
                optimizer.zero_grad()
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                losses[batch.rows] = each.detach().float().cpu().numpy()
                total, count = total + float(loss.detach()) * len(each), count + len(each)
        judged, accuracy = (
            (math.nan, math.nan) if validation is None else _judge(classifier, validation, options, threads)
        )
        kept = not judged >= best  # also where nobody judges
        if kept:
            best, since, kept_state = (math.inf if validation is None else judged), 0, deepcopy(classifier.state_dict())
        else:
            since += 1
        yield ClassifierEpoch(epoch + 1, rate, total / max(1, count), judged, accuracy, kept)
        if since >= options.patience:
            break
    classifier.load_state_dict(kept_state)
    classifier.eval()


def _check(classifier: PatchClassifier, index: PatchIndex) -> None:
    if index.names != classifier.facts.classes:
        raise RunMismatchError(
            f"patches are of {', '.join(index.names)}; this classifier tells {', '.join(classifier.facts.classes)} apart"
        )
    for patches in index.slides:
        classifier.facts.check(patches.grid)


def balanced_loss(losses: Tensor, labels: Tensor, clusters: Tensor) -> Tensor:
    """Of (B,) losses the mean over the cells of class and cluster that occur of the mean within each."""
    cells = labels * (clusters.max() + 1) + clusters
    cell = torch.unique(cells, return_inverse=True)[1]  # (B,)
    sums = losses.new_zeros(int(cell.max()) + 1).index_add(0, cell, losses)
    return (sums / torch.bincount(cell)).mean()


def _drawn(
    index: PatchIndex, options: ClassifierTraining, epoch: int, losses: NDArray[np.float32]
) -> NDArray[np.int64]:
    weights = np.ones(len(index))
    if options.region_share is not None:
        weights = weights * weigh_regions(index, options.region_share, options.levels)
    if options.mine_hard:
        weights = weights * weigh_hard(losses)
    draw = Draw(index, options.levels, weights)
    return draw.rows(options.patches, np.random.default_rng([options.seed, epoch]))


def _augmented(
    index: PatchIndex, rows: NDArray[np.int64], options: ClassifierTraining, epoch: int, threads: int | None
) -> Iterator[PatchBatch]:
    """Batches, read and augmented while the network works on those before."""

    def batches() -> Iterator[PatchBatch]:
        with closing(read_patches(index, rows, batch_size=options.batch_size, threads=threads)) as read:
            for number, batch in enumerate(read):
                rng = np.random.default_rng([options.seed, epoch, number])
                if len(batch.rows):  # of a batch nothing may be readable
                    yield batch._replace(pixels=augment(batch.pixels, options.augmentation, rng))

    with closing(prefetch(batches, _BATCHES_AHEAD)) as ready:
        yield from ready


@torch.no_grad()
def _judge(
    classifier: PatchClassifier, index: PatchIndex, options: ClassifierTraining, threads: int | None
) -> tuple[float, float]:
    """Mean loss and balanced accuracy; the same patches each time."""
    classifier.eval()
    device = classifier.device
    rows = Draw(index, options.levels).rows(options.validation_patches, np.random.default_rng(options.seed))
    logits, labels = [], []
    autocast: Any = half_precision(options.precision, device)[0]
    for batch in read_patches(index, rows, batch_size=options.batch_size, threads=threads):
        if len(batch.rows):
            with autocast:
                logits.append(classifier(torch.from_numpy(batch.pixels).to(device)).cpu())
            labels.append(torch.from_numpy(batch.labels))
    answers, truth = torch.cat(logits), torch.cat(labels)
    right = (answers.argmax(1) == truth).double()
    shares = [right[truth == label].mean() for label in set(truth.tolist())]
    return float(F.cross_entropy(answers, truth)), float(torch.stack(shares).mean())
