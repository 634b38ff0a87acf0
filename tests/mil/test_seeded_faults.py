"""Seeded faults: the golden numbers, the laws and the test of learning notice what they are there to notice.

A fault is put into the library, and the very checks of the other files, which pass without it, are called again.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mil.models.abmil
import mil.models.clam
from mil import MODELS, cross_validate
from mil.bag import Batch
from mil.models import MILModel, MILOutput
from mil.models.abmil import ABMIL, GatedABMIL, GatedAttentionScore
from mil.models.clam import CLAMMB, CLAMSB
from mil.train import Examples
from tests.mil.made_up import QUICK, cohort
from tests.mil.models import test_golden, test_laws
from tests.mil.models.test_golden import CASES, Case
from tests.mil.test_train import test_what_is_there_is_learned as check_learning

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION = [case for case in CASES if case.model in (ABMIL, GatedABMIL, CLAMSB, CLAMMB)]
GATED = [case for case in ATTENTION if case.model is GatedABMIL or (case.file == "clam" and "gated" in case.tag)]


def notices(check: Callable[..., None], *arguments: Any) -> bool:
    """Whether a check fails."""
    try:
        check(*arguments)
    except AssertionError:
        return True
    return False


def attend_to_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        alike = torch.zeros_like(scores).masked_fill(~mask[:, None], -torch.inf)
        return alike, alike.softmax(-1)

    for module in (mil.models.abmil, mil.models.clam):
        monkeypatch.setattr(module, "masked_softmax", mean)


def take_the_gate_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ungated(self: GatedAttentionScore, h: Tensor) -> Tensor:
        scores: Tensor = self.score(self.dropout(torch.tanh(self.content(h))))
        return scores

    monkeypatch.setattr(GatedAttentionScore, "forward", ungated)


def ignore_the_mask(monkeypatch: pytest.MonkeyPatch, model: type[MILModel]) -> None:
    forward = model.forward

    def unmasked(self: MILModel, batch: Batch) -> MILOutput:
        return forward(self, Batch(batch.features, torch.ones_like(batch.mask), batch.xy))

    monkeypatch.setattr(model, "forward", unmasked)


def misplace_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Examples.labels

    def labels(self: Examples, bags: Any) -> tuple[Tensor, Tensor]:
        order = np.random.default_rng(0).permutation(len(self.cases.bags))
        return right(self, order[np.asarray(bags, np.int64)])

    monkeypatch.setattr(Examples, "labels", labels)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_the_golden_numbers_notice_attention_replaced_by_the_mean(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert not notices(case.check)
        attend_to_all_alike(monkeypatch)
        assert notices(case.check)


@pytest.mark.parametrize("name", ["abmil", "abmil-gated", "clam-sb", "clam-mb"])
def test_the_laws_notice_attention_replaced_by_the_mean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notices(test_laws.test_gradients_reach_every_parameter, name)
    attend_to_all_alike(monkeypatch)
    assert notices(test_laws.test_gradients_reach_every_parameter, name)


@pytest.mark.parametrize("case", GATED, ids=str)
def test_the_golden_numbers_notice_a_gate_that_is_missing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        take_the_gate_out(monkeypatch)
        assert notices(case.check)


@pytest.mark.parametrize("name", ["abmil-gated", "clam-sb", "clam-mb"])
def test_the_laws_notice_a_gate_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_the_gate_out(monkeypatch)
    assert notices(test_laws.test_gradients_reach_every_parameter, name)


@pytest.mark.parametrize("name", MODELS)
def test_the_laws_notice_a_mask_that_is_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notices(test_laws.test_padding_changes_nothing, name)
    ignore_the_mask(monkeypatch, MODELS[name])
    assert notices(test_laws.test_padding_changes_nothing, name)


def test_the_golden_numbers_notice_a_mask_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert not notices(test_golden.test_abmil_masks_as_millab_does)
        ignore_the_mask(monkeypatch, ABMIL)
        assert notices(test_golden.test_abmil_masks_as_millab_does)


def test_labels_that_are_misplaced_are_noticed_and_leave_nothing_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cohort(60)
    assert cross_validate(made, QUICK).intervals(draws=100)["auroc"].low > 0.8
    misplace_labels(monkeypatch)
    blind = cross_validate(made, QUICK).intervals(draws=100)["auroc"]
    assert blind.low < 0.5 < blind.high
    assert notices(check_learning)
