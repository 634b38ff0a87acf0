"""Losses: what a slide's logits are judged by. Pure functions of logits and truth, float32, each a scalar."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wsi.errors import UsageError

__all__ = [
    "binary_cross_entropy",
    "cox_loss",
    "cross_entropy",
    "discrete_hazard_loss",
    "discrete_risk",
    "focal_loss",
    "multi_task_loss",
    "ordinal_grade",
    "ordinal_loss",
    "ranking_loss",
    "smooth_top1_svm",
]

_SMALLEST = 1e-7  # below this a probability is taken as this before its logarithm, as in the PANTHER code


def cross_entropy(logits: Tensor, targets: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Softmax cross-entropy: logits (B, C), classes (B,), weights (C,); a mean weighted by the class weights."""
    return F.cross_entropy(logits.float(), targets, weight=class_weights)


def binary_cross_entropy(logits: Tensor, targets: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Logistic loss, mean over bags and classes: logits (B, C).

    ``targets`` are 0 or 1 for each class, (B, C), or class indices (B,). With one logit the indices 0 and 1 mean absent
    and present; with more they name the one class that is present.
    """
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, _one_hot(targets, logits), weight=class_weights)


def focal_loss(logits: Tensor, targets: Tensor, *, gamma: float = 2.0, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy times (1 − p)^γ, p the probability of the true class: logits (B, C), classes (B,).

    Lin, Goyal, Girshick, He, Dollár: Focal loss for dense object detection, ICCV 2017, equation 5 (α is
    ``class_weights``). Differs from the paper: softmax for any number of classes; the mean is weighted like that of
    ``cross_entropy``, so that γ = 0 is ``cross_entropy``.
    """
    log_p = logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)  # (B,)
    weights = torch.ones_like(log_p) if class_weights is None else class_weights[targets]
    return -(weights * (1 - log_p.exp()).pow(gamma) * log_p).sum() / weights.sum()


def ordinal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logistic loss of the questions "is it above grade k?": logits (B, G − 1), grades (B,) from 0 to G − 1.

    Cao, Mirjalili, Raschka: Rank consistent ordinal regression, Pattern Recognition Letters 2020, equation 4 with equal
    task weights. Differs from the paper: the thresholds' logits need not share their weights. ``ordinal_grade`` reads
    the logits.

    Raises:
        UsageError: a grade that G − 1 thresholds cannot tell.
    """
    if bool(((targets < 0) | (targets > logits.shape[1])).any()):
        raise UsageError(
            f"{logits.shape[1]} thresholds tell grades 0 to {logits.shape[1]}, not {sorted(set(targets.tolist()))}"
        )
    above = targets[:, None] > torch.arange(logits.shape[1], device=targets.device)  # (B, G − 1)
    return F.binary_cross_entropy_with_logits(logits.float(), above.float())


def ordinal_grade(logits: Tensor) -> Tensor:
    """The grade that ``ordinal_loss`` logits (B, G − 1) speak for: how many thresholds are passed, int64 (B,)."""
    return (logits > 0).sum(-1)


def smooth_top1_svm(logits: Tensor, targets: Tensor, *, alpha: float = 1.0, tau: float = 1.0) -> Tensor:
    """Smooth top-1 support-vector loss: logits (B, C), classes (B,); mean over bags.

    Berrada, Zisserman, Kumar: Smooth loss functions for deep top-k classification, ICLR 2018, k = 1: margin ``alpha``,
    temperature ``tau``. As in the authors' code a row whose two largest logits lie τ log 1000 or more apart takes the
    limit τ → 0.
    """
    logits = logits.float()
    others = F.one_hot(targets, logits.shape[1]).logical_not()  # (B, C)
    gaps = logits + alpha * others - logits.gather(1, targets[:, None])  # (B, C)
    hard = gaps.max(-1).values  # (B,)
    if logits.shape[1] == 1:
        return hard.mean()
    top = logits.detach().topk(2, -1).values
    smooth = top[:, 0] - top[:, 1] < tau * math.log(1000)  # (B,)
    return torch.where(smooth, tau * (gaps / tau).logsumexp(-1), hard).mean()


def cox_loss(log_risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative log partial likelihood per event: log-risk (B,) or (B, 1), times (B,), events (B,), 1 = it happened.

    Cox: Regression models and life-tables, JRSS B 1972; ties as in Breslow 1974. Zero, with gradients of zero, where
    nobody has an event. A bag alone says nothing: the batch is the set at risk. Differs from PANTHER's code, which
    takes tied times in the order that sorting happens to leave them in.
    """
    risk, time, event = log_risk.float().flatten(), time.flatten(), event.flatten().bool()
    order = time.argsort(descending=True)
    risk, time, event = risk[order], time[order], event[order]
    _, group, sizes = torch.unique_consecutive(time, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)[group] - 1  # everybody of a tie is at risk until all of the tie are counted
    at_risk = risk.logcumsumexp(0)[last]  # (B,)
    return -((risk - at_risk) * event).sum() / event.sum().clamp(min=1)


def discrete_hazard_loss(logits: Tensor, bins: Tensor, event: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Negative log-likelihood of discrete-time survival: logits (B, T), bins (B,), events (B,), 1 = it happened.

    Zadeh, Schmid: Bias in cross-entropy-based training of deep survival networks, TPAMI 2021. σ(logit k) is the
    probability of the event in interval k for those who lived to see it. ``alpha`` takes weight from the censored.
    """
    bins, event = bins.flatten(), event.flatten().float()
    hazard = logits.float().sigmoid()  # (B, T)
    alive = F.pad((1 - hazard).cumprod(1), (1, 0), value=1.0)  # (B, T + 1), alive[k]: before interval k
    before, after = (alive.gather(1, k[:, None]).squeeze(1).clamp(min=_SMALLEST) for k in (bins, bins + 1))
    struck = hazard.gather(1, bins[:, None]).squeeze(1).clamp(min=_SMALLEST)
    uncensored = -event * (before.log() + struck.log())  # (B,)
    censored = -(1 - event) * after.log()  # (B,)
    return ((1 - alpha) * (uncensored + censored) + alpha * uncensored).mean()


def discrete_risk(logits: Tensor) -> Tensor:
    """One number that is larger for earlier events, −Σ of the survival curve: logits (B, T) → (B,)."""
    return -(1 - logits.float().sigmoid()).cumprod(1).sum(1)


def ranking_loss(
    log_risk: Tensor, time: Tensor, event: Tensor, *, activation: Literal["sigmoid", "relu"] = "sigmoid"
) -> Tensor:
    """Minus the smoothed concordance over comparable pairs: log-risk (B,) or (B, 1), times (B,), events (B,).

    A pair is comparable if the earlier of the two times is an event. Form of the PANTHER code. Differs from it: without
    a comparable pair the loss is zero, with gradients of zero.
    """
    risk, time, event = log_risk.float().flatten(), time.flatten(), event.flatten().bool()
    comparable = (time[:, None] < time[None, :]) & event[:, None]  # (B, B): row strikes before column's time
    gaps = (risk[:, None] - risk[None, :])[comparable]
    lifted = gaps.sigmoid() if activation == "sigmoid" else gaps.relu()
    return -lifted.sum() / max(len(gaps), 1)


def multi_task_loss(losses: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
    """Weighted sum of the losses of several tasks; a task without a weight has weight one.

    Raises:
        UsageError: no tasks, or a weight for a task that is not there.
    """
    weights = weights or {}
    if not losses or not weights.keys() <= losses.keys():
        raise UsageError(f"weights for {sorted(weights)}, but the tasks are {sorted(losses)}")
    return torch.stack([weights.get(task, 1.0) * loss for task, loss in losses.items()]).sum()


def _one_hot(targets: Tensor, logits: Tensor) -> Tensor:
    if targets.shape == logits.shape:
        return targets.float()
    if logits.shape[1] == 1:
        return targets.float()[:, None]
    return F.one_hot(targets, logits.shape[1]).float()
