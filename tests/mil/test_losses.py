"""Losses: golden numbers of the published implementations, and the laws that the formulas obey."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mil.losses import (
    binary_cross_entropy,
    cox_loss,
    cross_entropy,
    discrete_hazard_loss,
    discrete_risk,
    focal_loss,
    multi_task_loss,
    ordinal_grade,
    ordinal_loss,
    ranking_loss,
    smooth_top1_svm,
)
from tests.mil.golden import assert_near, number
from wsi.errors import UsageError

seeds = st.integers(0, 2**31)


def survival(seed: int, n: int = 9, ties: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Log-risks, times (few different ones if ``ties``), events."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.randint(1, 5, (n,), generator=generator).float() if ties else torch.rand(n, generator=generator)
    return torch.randn(n, generator=generator), time, torch.rand(n, generator=generator) < 0.6


def test_cox_is_that_of_panther() -> None:
    event = 1 - number("losses_metrics", "cox/censorship")
    log_risk, time = number("losses_metrics", "cox/logits"), number("losses_metrics", "cox/times")
    assert_near(cox_loss(log_risk, time, event), number("losses_metrics", "cox/loss"), atol=0)
    assert_near(cox_loss(log_risk, time, torch.zeros_like(event)), number("losses_metrics", "cox/loss_no_event"))


@given(seeds)
def test_cox_is_breslows_likelihood_whatever_the_order(seed: int) -> None:
    log_risk, time, event = survival(seed)
    terms = [log_risk[i] - torch.logsumexp(log_risk[time >= time[i]], 0) for i in range(len(time)) if event[i]]
    expected = -torch.stack(terms).mean() if terms else torch.zeros(())
    assert_near(cox_loss(log_risk, time, event), expected)
    order = torch.randperm(len(time), generator=torch.Generator().manual_seed(seed))
    assert_near(cox_loss(log_risk[order] + 7, time[order], event[order]), expected, atol=1e-4)


def test_survival_losses_without_information_are_zero_with_gradients_of_zero() -> None:
    log_risk = torch.randn(4, requires_grad=True)
    nobody = torch.zeros(4, dtype=torch.bool)
    time = torch.arange(4)
    torch.autograd.backward(cox_loss(log_risk, time, nobody) + ranking_loss(log_risk, time, nobody))
    assert log_risk.grad is not None
    assert not log_risk.grad.any()


@pytest.mark.parametrize("alpha", [0, 0.15, 0.5, 1])
def test_discrete_hazards_are_judged_as_in_panther(alpha: float) -> None:
    logits, bins = number("losses_metrics", "nll/logits"), number("losses_metrics", "nll/y")
    event = 1 - number("losses_metrics", "nll/censorship")
    loss = discrete_hazard_loss(logits, bins, event, alpha=alpha)
    assert_near(loss, number("losses_metrics", f"nll/loss_alpha{alpha:g}"), atol=0)
    assert_near(discrete_risk(logits), number("losses_metrics", "nll/risk"))


def test_discrete_hazards_are_probabilities_of_what_happened() -> None:
    logits = torch.tensor([[0.3, -1.2, 0.7]])
    h = logits.sigmoid()[0]
    struck = (1 - h[0]) * h[1]
    outlived = (1 - h[0]) * (1 - h[1])
    bins = torch.tensor([1])
    assert_near(discrete_hazard_loss(logits, bins, torch.tensor([1])), -struck.log())
    assert_near(discrete_hazard_loss(logits, bins, torch.tensor([0])), -outlived.log())


def test_ranking_is_that_of_panther() -> None:
    log_risk, time = number("losses_metrics", "cox/logits"), number("losses_metrics", "cox/times")
    event = 1 - number("losses_metrics", "cox/censorship")
    assert_near(ranking_loss(log_risk, time, event), number("losses_metrics", "rank/loss_sigmoid"), atol=0)
    relu = ranking_loss(log_risk, time, event, activation="relu")
    assert_near(relu, number("losses_metrics", "rank/loss_relu"), atol=0)


@given(seeds)
def test_ranking_is_the_mean_over_comparable_pairs(seed: int) -> None:
    log_risk, time, event = survival(seed)
    pairs = itertools.permutations(range(len(time)), 2)
    gaps = [log_risk[i] - log_risk[j] for i, j in pairs if event[i] and time[i] < time[j]]
    expected = -torch.stack(gaps).sigmoid().mean() if gaps else torch.zeros(())
    assert_near(ranking_loss(log_risk, time, event), expected)


@pytest.mark.parametrize("case", ["small_scale", "mixed", "hard"])
def test_smooth_top1_svm_is_that_of_the_authors_with_its_gradient(case: str) -> None:
    logits = number("smooth_top1_svm", f"{case}/logits").requires_grad_()
    loss = smooth_top1_svm(logits, number("smooth_top1_svm", f"{case}/y"))
    torch.autograd.backward(loss)
    assert logits.grad is not None
    assert_near(loss, number("smooth_top1_svm", f"{case}/loss"), atol=0)
    assert_near(logits.grad, number("smooth_top1_svm", f"{case}/grad"), atol=1e-7)


@given(seeds, st.integers(3, 6))
def test_smooth_top1_svm_without_smoothing_is_the_hinge(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, classes, generator=generator)
    targets = torch.randint(0, classes, (5,), generator=generator)
    hinge = torch.stack(
        [
            max(row[j] + (j != y) - row[y] for j in range(classes))
            for row, y in zip(logits, targets.tolist(), strict=True)
        ]
    ).mean()
    assert_near(smooth_top1_svm(logits, targets, tau=1e-6), hinge)
    assert bool(smooth_top1_svm(logits, targets) >= hinge)


def test_cross_entropy_weighs_classes() -> None:
    logits, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    losses = -logits.log_softmax(1)[torch.arange(2), targets]
    weights = torch.tensor([3.0, 1.0])
    assert_near(cross_entropy(logits, targets, class_weights=weights), (3 * losses[0] + losses[1]) / 4)
    assert_near(cross_entropy(logits, targets), losses.mean())


@given(seeds)
def test_focal_loss_without_focus_is_cross_entropy_and_with_it_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 3, generator=generator)
    targets = torch.randint(0, 3, (6,), generator=generator)
    weights = torch.rand(3, generator=generator) + 0.1
    plain = cross_entropy(logits, targets, class_weights=weights)
    assert_near(focal_loss(logits, targets, gamma=0, class_weights=weights), plain)
    assert bool(focal_loss(logits, targets, class_weights=weights) < plain)


def test_focal_loss_is_equation_5() -> None:
    p = 0.8
    logits = torch.tensor([[math.log(p), math.log(1 - p)]])
    assert_near(focal_loss(logits, torch.tensor([0])), torch.tensor(-((1 - p) ** 2) * math.log(p)))


def test_binary_cross_entropy_takes_indices_and_sets_of_classes() -> None:
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.3]])
    p = logits.sigmoid()
    expected = -(p[0, 1].log() + (1 - p[0, 0]).log() + p[1, 0].log() + (1 - p[1, 1]).log()) / 4
    assert_near(binary_cross_entropy(logits, torch.tensor([1, 0])), expected)
    assert_near(binary_cross_entropy(logits, torch.tensor([[0.0, 1.0], [1.0, 0.0]])), expected)
    one = torch.tensor([[0.5], [2.0]])
    expected = -((1 - p[0, 0]).log() + p[1, 0].log()) / 2
    assert_near(binary_cross_entropy(one, torch.tensor([0, 1])), expected)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_binary_cross_entropy_is_the_bernoulli_loss_of_amlab(kind: str) -> None:
    logits = number("abmil_ilse", f"{kind}/Y_prob").logit()
    for truth in (0, 1):
        loss = binary_cross_entropy(logits, torch.tensor([truth]))
        assert_near(loss, number("abmil_ilse", f"{kind}/nll_y{truth}"))


def test_ordinal_loss_asks_of_each_threshold_whether_the_grade_is_above_it() -> None:
    logits = torch.tensor([[1.0, -0.5, -2.0]])
    p = logits.sigmoid()[0]
    expected = -(p[0].log() + p[1].log() + (1 - p[2]).log()) / 3
    assert_near(ordinal_loss(logits, torch.tensor([2])), expected)
    assert ordinal_grade(logits).tolist() == [1]


@given(st.integers(0, 4), st.integers(0, 4))
def test_ordinal_loss_grows_with_the_distance_between_grades(grade: int, truth: int) -> None:
    sure = torch.where(torch.arange(4) < grade, 5.0, -5.0)[None]
    assert int(ordinal_grade(sure)) == grade
    loss = float(ordinal_loss(sure, torch.tensor([truth])))
    assert loss == pytest.approx(abs(grade - truth) * 5 / 4, abs=0.02)


def test_a_grade_beyond_the_thresholds_is_refused() -> None:
    with pytest.raises(UsageError, match="grades 0 to 2"):
        ordinal_loss(torch.zeros(1, 2), torch.tensor([3]))


def test_several_tasks_are_summed_with_their_weights() -> None:
    losses = {"grade": torch.tensor(2.0), "survival": torch.tensor(3.0)}
    assert float(multi_task_loss(losses)) == 5
    assert float(multi_task_loss(losses, {"survival": 0.5})) == 3.5
    with pytest.raises(UsageError, match="stage"):
        multi_task_loss(losses, {"stage": 1.0})
    with pytest.raises(UsageError):
        multi_task_loss({})
