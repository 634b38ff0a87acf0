"""Losses: values worked out by hand, and what must not change them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segmentation.losses import IGNORE, SegmentationLoss, cross_entropy, one_hot, soft_dice
from segmentation.models import SegmentationOutput
from wsi.errors import UsageError


def logits_of(foreground: Tensor) -> Tensor:
    """(B, H, W) probabilities of class 1 as logits of two classes."""
    return torch.stack([torch.zeros_like(foreground), foreground.logit()], dim=1)


def test_soft_dice_is_the_formula_of_the_paper_picture_by_picture() -> None:
    p = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.0], [0.0, 0.0]]])
    targets = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]]])
    shares, counts = one_hot(targets, 2)
    probabilities = torch.stack([1 - p, p], dim=1)
    first = 1 - (2 * 1.5 + 1) / (1.5 + 2 + 1)  # Σpt = 1.5, Σp² = 0.25 + 0.25 + 1, Σt² = 2
    second = 1 - 1 / (0.0625 + 1)
    assert soft_dice(probabilities, shares, counts).item() == pytest.approx((first + second) / 2)
    together = 1 - (2 * 1.5 + 1) / (1.5625 + 2 + 1)
    assert soft_dice(probabilities, shares, counts, over_batch=True).item() == pytest.approx(together)


def test_dice_of_several_classes_is_their_mean_without_the_background() -> None:
    p = torch.tensor([0.0, 1.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2)
    targets = torch.tensor([[[1, 1], [2, 1]]])
    shares, counts = one_hot(targets, 3)
    one, two = 1 - 7 / (4 + 3 + 1), 1 - 1 / (0 + 1 + 1)
    assert soft_dice(p, shares, counts).item() == pytest.approx((one + two) / 2)


def test_cross_entropy_is_the_mean_over_the_pixels_that_count() -> None:
    logits = logits_of(torch.tensor([[[0.25, 0.5, 0.9]]]))
    shares, counts = one_hot(torch.tensor([[[1, 0, IGNORE]]]), 2)
    assert cross_entropy(logits, shares, counts).item() == pytest.approx((math.log(4) + math.log(2)) / 2)


@given(seed=st.integers(0, 1 << 30), n_classes=st.integers(2, 4))
def test_ignored_pixels_change_nothing_whatever_is_said_of_them(seed: int, n_classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(n_classes, (2, 5, 6), generator=generator)
    targets[torch.rand(2, 5, 6, generator=generator) < 0.4] = IGNORE
    logits = torch.randn(2, n_classes, 5, 6, generator=generator)
    other = torch.where((targets == IGNORE)[:, None], torch.randn(logits.shape, generator=generator) * 5, logits)
    loss = SegmentationLoss(dice=1, cross_entropy=0.7)
    coarse = torch.randn(2, n_classes, 3, 3, generator=generator)
    before = loss(SegmentationOutput(logits, (coarse,)), targets)
    assert loss(SegmentationOutput(other, (coarse,)), targets).item() == pytest.approx(before.item(), abs=1e-6)


def test_where_nothing_counts_the_loss_is_zero_and_so_is_its_gradient() -> None:
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = SegmentationLoss(dice=1, cross_entropy=1)(SegmentationOutput(logits), torch.full((1, 3, 3), IGNORE))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_coarser_heads_see_the_shares_of_their_blocks_and_weigh_half_of_the_finer_ones() -> None:
    targets = torch.tensor([[[1, 1, 0, 0], [1, IGNORE, 0, 1]]])
    fine = logits_of(torch.full((1, 2, 4), 0.5))
    coarse = logits_of(torch.tensor([[[0.8, 0.5]]]))
    loss = SegmentationLoss(dice=0, cross_entropy=1)
    of_fine = math.log(2)
    first = -math.log(0.8)  # all that counts of the left block is class 1: weight 3 of 4 pixels
    second = math.log(2)  # a quarter class 1 in the right block, at even odds
    of_coarse = (0.75 * first + second) / 1.75
    got = loss(SegmentationOutput(fine, (coarse,)), targets).item()
    assert got == pytest.approx((of_fine + 0.5 * of_coarse) / 1.5, rel=1e-5)


def test_each_head_weighs_half_of_the_next_finer_one() -> None:
    targets = torch.ones((1, 4, 4), dtype=torch.int64)
    said = (0.9, 0.6, 0.2)
    heads = [logits_of(torch.full((1, side, side), p)) for side, p in zip((4, 2, 1), said, strict=True)]
    loss = SegmentationLoss(dice=0, cross_entropy=1)(SegmentationOutput(heads[0], tuple(heads[1:])), targets)
    first, second, third = (-math.log(p) for p in said)
    assert loss.item() == pytest.approx((first + second / 2 + third / 4) / 1.75, rel=1e-5)


def test_deep_heads_of_weight_nothing_do_not_count() -> None:
    targets = torch.tensor([[[1, 0], [0, 0]]])
    fine, coarse = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 1, 1)
    alone = SegmentationLoss()(SegmentationOutput(fine), targets)
    assert SegmentationLoss(deep=0)(SegmentationOutput(fine, (coarse,)), targets) == alone


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="classes 0 to 1 or 255, not 0 to 2"):
        one_hot(torch.tensor([[[0, 2]]]), 2)
    with pytest.raises(ValueError, match="dice or cross_entropy"):
        SegmentationLoss(dice=0)
    with pytest.raises(ValueError, match="deep is a number from 0"):
        SegmentationLoss(deep=-1)
