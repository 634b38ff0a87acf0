"""Losses: soft Dice as H2G-Net has it, cross-entropy, and both over the heads of a deeply supervised network.

Pedersen et al.: H2G-Net, Frontiers in Medicine 2022: Dice of the foreground, picture by picture, squares in the denominator
and 1 added above and below. The epithelium model takes the sums over the batch instead and the mean over classes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.models.base import SegmentationOutput
from wsi.errors import UsageError

__all__ = ["IGNORE", "SegmentationLoss", "cross_entropy", "one_hot", "soft_dice"]

IGNORE = 255  # label of pixels that count for nothing
_SMOOTH = 1.0
_LEAST = 1e-9


def one_hot(targets: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Labels (B, H, W) as shares (B, K, H, W) float32, and which pixels count (B, 1, H, W): 1, or 0 at ``IGNORE``.

    Raises:
        UsageError: a label that is neither a class nor ``IGNORE``.
    """
    counts = targets != IGNORE
    labels = torch.where(counts, targets, 0).long()
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise UsageError(
            f"labels are classes 0 to {n_classes - 1} or {IGNORE}, not {int(labels.min())} to {int(labels.max())}"
        )
    return F.one_hot(labels, n_classes).movedim(-1, 1).float(), counts[:, None].float()


def soft_dice(probabilities: Tensor, shares: Tensor, counts: Tensor, *, over_batch: bool = False) -> Tensor:
    """1 − (2 Σpt + 1) / (Σp² + Σt² + 1), the mean over pictures and over all classes but the first: a scalar.

    Args:
        probabilities, shares: (B, K, H, W) of prediction and truth.
        counts: (B, 1, H, W) which pixels count, from 0 to 1.
        over_batch: sums go over all pictures of the batch.
    """
    p, t = probabilities[:, 1:], shares[:, 1:]
    over = (0, 2, 3) if over_batch else (2, 3)
    both = (p * t * counts).sum(over)  # (B, K − 1), or (K − 1)
    apart = ((p.square() + t.square()) * counts).sum(over)
    return (1 - (2 * both + _SMOOTH) / (apart + _SMOOTH)).mean()


def cross_entropy(logits: Tensor, shares: Tensor, counts: Tensor) -> Tensor:
    """Mean over the pixels that count of −Σ t log p: a scalar, 0 where none counts."""
    each = -(shares * logits.log_softmax(1)).sum(1, keepdim=True) * counts  # (B, 1, H, W)
    return each.sum() / counts.sum().clamp(min=_LEAST)


@dataclass(frozen=True)
class SegmentationLoss:
    """A weighted sum of Dice and cross-entropy, over all heads.

    Attributes:
        dice, cross_entropy: their weights.
        over_batch: Dice of the batch as a whole and not picture by picture.
        deep: the weight of a head by that of the next finer one; the sum of all heads' weights is 1. Coarser heads see the
            share of each class in the pixels they speak of.
    """

    dice: float = 1.0
    cross_entropy: float = 0.0
    over_batch: bool = False
    deep: float = 0.5

    def __post_init__(self) -> None:
        for name in ("dice", "cross_entropy", "deep"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a number from 0, got {getattr(self, name)}")
        if not self.dice + self.cross_entropy > 0:
            raise ValueError("a loss needs dice or cross_entropy above 0")

    def __call__(self, output: SegmentationOutput, targets: Tensor) -> Tensor:
        """The loss of what a network says, for labels (B, H, W): a scalar.

        Raises:
            UsageError: a label that is neither a class nor ``IGNORE``.
        """
        shares, counts = one_hot(targets, output.logits.shape[1])
        total = self._of_head(output.logits, shares, counts)
        weight = weights = 1.0
        for level, head in enumerate(output.deep, start=1):
            weight *= self.deep
            weights += weight
            total = total + weight * self._of_head(head, *_coarser(shares, counts, 2**level))
        return total / weights

    def _of_head(self, logits: Tensor, shares: Tensor, counts: Tensor) -> Tensor:
        logits = logits.float()
        loss = logits.new_zeros(())
        if self.dice:
            loss = loss + self.dice * soft_dice(logits.softmax(1), shares, counts, over_batch=self.over_batch)
        if self.cross_entropy:
            loss = loss + self.cross_entropy * cross_entropy(logits, shares, counts)
        return loss


def _coarser(shares: Tensor, counts: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Shares of the classes in blocks of pixels that count, and how much of each block does."""
    height, width = shares.shape[2:]
    beyond = (0, -width % factor, 0, -height % factor)
    counted = F.avg_pool2d(F.pad(counts, beyond), factor)
    mixed = F.avg_pool2d(F.pad(shares * counts, beyond), factor)
    return mixed / torch.clamp(counted, min=_LEAST), counted
