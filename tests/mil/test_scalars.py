"""Scalars for TensorBoard: what was measured, where it belongs, once."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mil import cross_validate
from mil.scalars import Scalars
from mil.train import Observers
from tests.mil.made_up import QUICK, cohort
from wsi.errors import EnvironmentFaultError


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Stop:
    """Stops everything at the second epoch of the second fold."""

    def fold_started(self, fold: Any, number: int, total: int) -> None:
        self.number = number

    def epoch_done(self, fold: Any, epoch: Any) -> None:
        if (self.number, epoch.member, epoch.epoch) == (1, 0, 2):
            raise KeyboardInterrupt

    def fold_finished(self, fold: Any, metrics: Any, *, resumed: bool) -> None: ...


def test_curves_of_each_fold_and_member_are_those_of_the_result_once_also_after_an_interruption(tmp_path: Path) -> None:
    config, made = replace(QUICK, epochs=3, members=2, folds=2), cohort(24)
    with pytest.raises(KeyboardInterrupt), Scalars(tmp_path / "tb") as scalars:
        cross_validate(made, config, out=tmp_path / "run", observer=Observers([scalars, Stop()]))
    with Scalars(tmp_path / "tb") as scalars:
        result = cross_validate(made, config, out=tmp_path / "run", observer=scalars)
    assert {path.name for path in (tmp_path / "tb").iterdir()} == {"fold-0", "fold-1"}
    for trained in result.folds:
        folder = tmp_path / "tb" / f"fold-{trained.fold.name}"
        for member in range(2):
            curve = [epoch for epoch in trained.curve if epoch.member == member]
            found = written(folder / f"member-{member}")
            assert set(found) == {"lr", "loss/training", "loss/validation"}
            for tag, field in (("lr", "lr"), ("loss/training", "loss"), ("loss/validation", "stop_loss")):
                assert [step for step, _ in found[tag]] == [1, 2, 3]
                expected = [getattr(epoch, field) for epoch in curve]
                assert [value for _, value in found[tag]] == pytest.approx(expected, rel=1e-6)
        assert written(folder)["test/auroc"][0][1] == pytest.approx(result.metrics()[trained.fold.name]["auroc"])


def test_without_a_validation_part_there_is_no_curve_of_it(tmp_path: Path) -> None:
    with Scalars(tmp_path) as scalars:
        cross_validate(cohort(24), replace(QUICK, epochs=1, inner=1, folds=2), observer=scalars)
    assert set(written(tmp_path / "fold-0" / "member-0")) == {"lr", "loss/training"}


def test_without_tensorboard_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EnvironmentFaultError, match=r"pip install 'wsi-engine\[tensorboard\]'"):
        Scalars(tmp_path)
