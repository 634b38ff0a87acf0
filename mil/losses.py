"""Losses of a slide's label."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cox", "cross_entropy", "discrete_time_nll", "focal", "ordinal"]


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    return F.cross_entropy(logits, targets, weight=weights)


def focal(logits: Tensor, targets: Tensor, gamma: float = 2.0, weights: Tensor | None = None) -> Tensor:
    log_p = F.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    return (loss if weights is None else loss * weights[targets]).mean()


def ordinal(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, C - 1): whether the class lies above each threshold."""
    above = (targets[:, None] > torch.arange(logits.shape[1], device=logits.device)).float()
    return F.binary_cross_entropy_with_logits(logits, above)


def cox(log_risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    order = torch.argsort(time, descending=True, stable=True)
    risk, event = log_risk.reshape(-1)[order], event[order].float()
    return -((risk - risk.logcumsumexp(0)) * event).sum() / event.sum().clamp(min=1)


def discrete_time_nll(logits: Tensor, bins: Tensor, event: Tensor, alpha: float = 0.0) -> Tensor:
    hazard = torch.sigmoid(logits)
    survival = torch.cat([torch.ones_like(hazard[:, :1]), (1 - hazard).cumprod(1)], 1)
    at, eps = bins[:, None], 1e-7
    seen = event.float()
    uncensored = -seen * (
        survival.gather(1, at).clamp(min=eps).log() + hazard.gather(1, at).clamp(min=eps).log()
    ).squeeze(1)
    censored = -(1 - seen) * survival.gather(1, at + 1).clamp(min=eps).log().squeeze(1)
    return ((1 - alpha) * (uncensored + censored) + alpha * uncensored).mean()
