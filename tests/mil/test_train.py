"""Training: it learns what is there and nothing that is not, sees no test case, repeats to the bit, and goes on after a kill."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mil import MODELS, Result, cross_validate, explain
from mil.bag import Bag
from mil.cohort import Cohort
from mil.config import TrainConfig
from mil.member import Member
from mil.predictions import Predictions
from mil.splits import make_folds
from mil.target import Labels
from mil.train import Examples, TrainedFold, answer_cases, fit_scaling, pick_device, train_fold
from tests.mil.made_up import DIM, QUICK, arrays, bag_of, cohort, stored_cohort
from wsi.errors import (
    CohortError,
    DeviceError,
    DivergedError,
    ModelMismatchError,
    NotExtractedError,
    RunMismatchError,
    StoreFormatError,
    UsageError,
)

ROOT = Path(__file__).parents[2]


class Stop:
    """An observer that stops everything at an epoch of a fold."""

    def __init__(self, fold: str = "", epoch: int = 0, how: Any = None) -> None:
        self.at, self.how = (fold, epoch), how
        self.events: list[Any] = []

    def fold_started(self, fold: Any, number: int, total: int) -> None:
        self.events.append(("started", fold.name))

    def epoch_done(self, fold: Any, epoch: Any) -> None:
        if (fold.name, epoch.epoch) == self.at:
            self.how()

    def fold_finished(self, fold: Any, metrics: Any, *, resumed: bool) -> None:
        self.events.append(("resumed" if resumed else "trained", fold.name))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(trained: TrainedFold) -> list[Any]:
    return [tensor for member in trained.members for tensor in member.state_dict().values()]


def equal(a: TrainedFold, b: TrainedFold) -> bool:
    same = all(x.equal(y) for x, y in zip(weights(a), weights(b), strict=True))
    return same and [m.temperature for m in a.members] == [m.temperature for m in b.members]


def first_fold(made: Cohort, config: TrainConfig = QUICK) -> TrainedFold:
    cases = made.cases(config.fusion)
    fold = make_folds(cases, made.target, by="random", folds=config.folds, seed=config.seed)[0]
    return train_fold(made, cases, fold, 0, config)


def test_what_is_there_is_learned() -> None:
    result = cross_validate(cohort(60), QUICK)
    assert np.mean([m["auroc"] for m in result.metrics().values()]) > 0.95
    assert "auroc" in result.summary(draws=20).splitlines()[2]
    assert result.predictions.names == tuple(dict.fromkeys(result.predictions.names))
    np.testing.assert_allclose(result.predictions.answers.sum(1), 1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"inner": 3}, r"probabilities are calibrated \(temperature \d+\.\d\d to \d+\.\d\d, each fitted on the part"),
        ({"inner": 3, "calibrate": True}, r"probabilities are calibrated"),
        ({"inner": 3, "calibrate": False}, r"not calibrated \(calibrate is false"),
        ({"inner": 1}, r"not calibrated \(no part was kept from training to do it on: inner is 1"),
    ],
)
def test_a_summary_says_whether_and_on_whom_answers_were_calibrated(changed: Any, words: str) -> None:
    result = cross_validate(cohort(24), replace(QUICK, epochs=3, **changed))
    head, titles, *figures, about = result.summary(draws=5).splitlines()
    assert re.search(words, about)
    assert all(re.search(r"\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]$", line) for line in figures), head + titles
    temperatures = [member.temperature for each in result.folds for member in each.members]
    assert (set(temperatures) == {1.0}) == ("not calibrated" in words)


def test_an_ordinal_target_has_no_temperature_and_the_summary_says_so() -> None:
    bags, labels, _ = arrays(24)
    grade = Labels("grade", kind="ordinal", classes=("low", "high"))
    made = Cohort.from_arrays(bags, [grade.classes[i] for i in labels], labels=grade)
    words = cross_validate(made, replace(QUICK, epochs=1)).summary(draws=5)
    assert "not calibrated (a temperature is for classes learned by cross-entropy or focal loss)" in words


def test_shuffled_labels_give_chance_within_its_interval() -> None:
    rng = np.random.default_rng(0)
    bags, labels, _ = arrays(120)
    result = cross_validate(Cohort.from_arrays(bags, rng.permutation(labels)), replace(QUICK, epochs=8))
    found = result.intervals(draws=100)["auroc"]
    assert found.low < 0.5 < found.high


def test_a_model_never_sees_the_test_part() -> None:
    bags, labels, patients = arrays(36)
    made = Cohort.from_arrays(bags, labels, patients)
    trained = first_fold(made)
    tested = {made.cases().names[i] for i in trained.fold.test}
    spoilt = [x * 1000 + 7 if str(p) in tested else x for x, p in zip(bags, patients, strict=True)]
    assert spoilt[0] is not bags[0] or spoilt[1] is not bags[1] or len(tested) > 0
    again = first_fold(Cohort.from_arrays(spoilt, labels, patients))
    assert equal(trained, again)
    assert not np.array_equal(trained.predictions.answers, again.predictions.answers)
    # The check itself would notice: one training bag, and the scaling is another.
    index = next(i for i, p in enumerate(patients) if str(p) not in tested)
    leaky = [x + 1 if i == index else x for i, x in enumerate(bags)]
    assert not equal(trained, first_fold(Cohort.from_arrays(leaky, labels, patients)))


def test_scaling_is_that_of_all_training_tiles() -> None:
    rng = np.random.default_rng(0)
    bags = [(rng.normal(5, 3, (n, 4)) * [1, 10, 0.1, 0]).astype(np.float32) for n in (1, 7, 40)]
    made = Cohort.from_arrays(bags, [0, 1, 0])
    found = fit_scaling(Examples(made, made.cases()), np.array([0, 2]))
    tiles = np.concatenate([bags[0], bags[2]]).astype(np.float64)
    np.testing.assert_allclose(found.mean, tiles.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.deviation[:3], tiles.std(0)[:3], rtol=1e-6)
    assert found.deviation[3] == 1


def test_the_seed_decides_every_bit_and_the_callers_luck_is_left_alone() -> None:
    noisy = replace(QUICK, epochs=3, tile_dropout=0.3, feature_dropout=0.3, max_tiles=6)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = first_fold(cohort(24), noisy)
    assert torch.rand(3).equal(expected)
    assert equal(a, first_fold(cohort(24), noisy))
    assert not equal(a, first_fold(cohort(24), replace(noisy, seed=1)))


def test_the_best_weights_by_validation_are_kept_and_training_stops_when_they_do_not_improve() -> None:
    trained = first_fold(cohort(36, shift=0.3), replace(QUICK, epochs=60, patience=4, lr=0.05))
    curve = trained.curve
    assert len(curve) < 60
    best = min(curve, key=lambda epoch: epoch.stop_loss)
    assert [epoch.epoch for epoch in curve if epoch.kept][-1] == best.epoch == len(curve) - 4
    made = cohort(36, shift=0.3)
    member, cases = trained.members[0], made.cases()
    member.temperature = 1.0
    losses = []
    for case in range(len(cases)):
        p = answer_cases([member], made, cases, [case])[made.target.name][0]
        losses.append(-np.log(p[int(cases.y[case])]))
    assert np.mean(losses) < 2  # it is a model of the run, not of its last, overfitted epoch


def test_passes_that_are_added_up_make_the_step_of_one_large_pass() -> None:
    bags, labels, _ = arrays(36)
    made = Cohort.from_arrays(bags, labels)  # two thirds of them are three batches of eight
    plain = replace(QUICK, epochs=3, inner=1, average=0.0, lr=1e-3)
    large = first_fold(made, replace(plain, batch_size=8))
    added = first_fold(made, replace(plain, batch_size=2, accumulate=4))
    untrained = first_fold(made, replace(plain, lr=1e-9))
    np.testing.assert_allclose(large.predictions.answers, added.predictions.answers, atol=1e-4)
    assert np.abs(large.predictions.answers - untrained.predictions.answers).max() > 1e-3


def test_answers_of_a_patient_are_the_mean_over_slides_and_members() -> None:
    made = cohort(12)
    cases = made.cases()
    trained = first_fold(made, replace(QUICK, folds=2, members=2, epochs=2, inner=2))
    case = next(i for i in range(len(cases)) if len(cases.bags_of([i])) == 2)
    each = [
        member.answer(member.logits(made.read(cases.bags[bag]))[None])[0].numpy()
        for member in trained.members
        for bag in cases.bags_of([case])
    ]
    (answers,) = answer_cases(trained.members, made, cases, [case]).values()
    np.testing.assert_allclose(answers[0], np.mean(each, axis=0))


@pytest.mark.parametrize(
    ("kind", "loss", "metric", "least"),
    [
        ("regression", "auto", "r2", 0.4),
        ("survival", "nll", "c_index", 0.7),
        ("survival", "cox", "c_index", 0.7),
        ("ordinal", "auto", "kappa", 0.5),
        ("multiclass", "focal", "auroc", 0.8),
    ],
)
def test_every_kind_of_target_is_learned(kind: Any, loss: Any, metric: Any, least: Any) -> None:
    rng = np.random.default_rng(0)
    level = rng.permutation(np.arange(60) % 3)
    bags = [bag_of(value, rng, n=16) for value in level / 2]
    if kind == "survival":
        targets: Any = np.stack([30 - 10 * level + rng.uniform(0, 5, 60), rng.uniform(size=60) < 0.8], axis=1)
    else:
        targets = level * 1.5 + 0.25 if kind == "regression" else level
    labels = Labels("t", kind=kind, event="e" if kind == "survival" else None)
    result = cross_validate(
        Cohort.from_arrays(bags, targets, labels=labels),
        replace(QUICK, loss=loss, class_weights="balanced", inner=1, epochs=60),
    )
    assert np.mean([m[metric] for m in result.metrics().values()]) > least


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_repeats_reads_back_and_explains(tmp_path: Path, name: str) -> None:
    config = replace(QUICK, folds=2, inner=2, epochs=1, model=name, hyper={}, lr=1e-4)
    places = np.stack([np.arange(12) % 4, np.arange(12) // 4], axis=1).astype(np.int64) * 512
    made = Cohort.from_arrays([Bag(x, places, f"b{i}") for i, x in enumerate(arrays(12)[0])], arrays(12)[1])
    trained = first_fold(made, config)
    assert np.isfinite(trained.predictions.answers).all()
    if name == "abmil":
        assert equal(trained, first_fold(made, config))
    member = trained.members[0]
    member.save(tmp_path / "m.safetensors")
    read = Member.load(tmp_path / "m.safetensors")
    bag = made.source.read("b1")
    assert read.logits(bag).equal(member.logits(bag))
    assert np.isfinite(explain.attention([member], bag)).all()
    if name in ("dtfd", "protocounts"):
        with pytest.raises(UsageError, match=f"{name} passes no gradients"):
            explain.integrated_gradients([member], bag)
    else:
        assert np.isfinite(explain.integrated_gradients([member], bag, steps=2)).all()


def test_a_run_is_whole_on_disk_and_reads_back_equal(tmp_path: Path) -> None:
    store, table = stored_cohort(tmp_path)
    made = Cohort.from_store(store, table, Labels("subtype", site="site"))
    result = cross_validate(made, replace(QUICK, epochs=2, members=2), out=tmp_path / "run")
    expected = {
        "run.json",
        "cohort.csv",
        "left_out.csv",
        "splits.json",
        "environment.json",
        "predictions.csv",
        "metrics.json",
    }
    assert expected <= set(files(tmp_path / "run"))
    assert (
        json.loads((tmp_path / "run" / "environment.json").read_bytes())["packages"]["torch"]
        == torch.__version__.split("+")[0]
    )
    read = Result.load(tmp_path / "run", made)
    assert all(equal(a, b) for a, b in zip(result.folds, read.folds, strict=True))
    assert read.metrics() == result.metrics()
    assert [each.fold for each in read.folds] == [each.fold for each in result.folds]
    assert [each.curve for each in read.folds] == [each.curve for each in result.folds]
    assert read.config == result.config
    np.testing.assert_array_equal(read.heatmap("s003").values, result.heatmap("x/s003.svs").values)
    with pytest.raises(UsageError, match="need the slides"):
        Result.load(tmp_path / "run").heatmap("s003")
    with pytest.raises(NotExtractedError, match="no slide 'zzz' took part"):
        read.heatmap("zzz")
    whole = Predictions.read(tmp_path / "run" / "predictions.csv", made.target)
    np.testing.assert_array_equal(whole.answers, result.predictions.answers)


def test_after_an_interruption_only_what_is_missing_is_trained_and_every_byte_is_the_same(tmp_path: Path) -> None:
    config = replace(QUICK, epochs=4, tile_dropout=0.2, feature_dropout=0.2)
    made = cohort(24)
    cross_validate(made, config, out=tmp_path / "straight")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cross_validate(made, config, out=tmp_path / "run", observer=Stop("1", 3, interrupt))
    assert [p.name for p in (tmp_path / "run" / "folds").iterdir()] == ["0"]
    seen = Stop()
    cross_validate(made, config, out=tmp_path / "run", observer=seen)
    assert [event for event in seen.events if event[0] != "started"] == [
        ("resumed", "0"),
        ("trained", "1"),
        ("trained", "2"),
    ]
    assert files(tmp_path / "run") == files(tmp_path / "straight")


def test_after_a_kill_in_the_middle_every_byte_is_the_same(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, torch
from dataclasses import replace
from pathlib import Path
torch.set_num_threads(1)
import mil.run
from mil import cross_validate
from tests.mil.made_up import QUICK, cohort
from tests.mil.test_train import Stop
if sys.argv[1] == "kill":  # between the files of a finished fold
    original = mil.run.fsync_tree
    def kill(folder):
        if len(list(folder.parent.iterdir())) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        original(folder)
    mil.run.fsync_tree = kill
cross_validate(cohort(24), replace(QUICK, epochs=3), out={str(tmp_path / "run")!r})
"""
    killed = subprocess.run([sys.executable, "-c", code, "kill"], cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = [p.name for p in (tmp_path / "run" / "folds").iterdir()]
    assert "0" in left
    assert len(left) == 2
    cross_validate(cohort(24), replace(QUICK, epochs=3), out=tmp_path / "run")
    cross_validate(cohort(24), replace(QUICK, epochs=3), out=tmp_path / "straight")
    a, b = files(tmp_path / "run"), files(tmp_path / "straight")
    a.pop("environment.json"), b.pop("environment.json")
    assert a == b


def test_another_cohort_or_configuration_does_not_mix_with_a_run(tmp_path: Path) -> None:
    config = replace(QUICK, epochs=1)
    cross_validate(cohort(24), config, out=tmp_path)
    with pytest.raises(RunMismatchError, match=r"lr: 0\.01 there, 0\.5 asked"):
        cross_validate(cohort(24), replace(config, lr=0.5), out=tmp_path)
    with pytest.raises(RunMismatchError, match="another cohort"):
        cross_validate(cohort(20), config, out=tmp_path)


def test_a_run_that_is_damaged_or_not_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotExtractedError, match=r"run\.json is missing\); make one with wsi train"):
        Result.load(tmp_path)
    cross_validate(cohort(24), replace(QUICK, epochs=1), out=tmp_path / "run")
    (tmp_path / "run" / "folds" / "1" / "member-0.safetensors").write_bytes(b"no model")
    with pytest.raises(ModelMismatchError, match=r"member-0\.safetensors: cannot be used as a model"):
        Result.load(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "folds" / "1")
    with pytest.raises(NotExtractedError, match="fold 1 is not finished"):
        Result.load(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(StoreFormatError, match=r"run\.json is damaged"):
        Result.load(tmp_path / "run")


def test_what_cannot_be_trained_is_said_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="abmill"):
        cross_validate(cohort(24), replace(QUICK, model="abmill"))
    with pytest.raises(UsageError, match="the loss cox is not for a binary target"):
        cross_validate(cohort(24), replace(QUICK, loss="cox"))
    with pytest.raises(DivergedError, match="training diverged; lower lr"):
        cross_validate(cohort(24), replace(QUICK, lr=1e30))
    with pytest.raises(CohortError, match="no event in a training part"):
        bags = arrays(12)[0]
        cross_validate(Cohort.from_arrays(bags, [[i + 1.0, i == 0] for i in range(12)]), replace(QUICK, folds=3))
    with pytest.raises(DeviceError, match="cannot be used"):
        pick_device("cuda:99")


def test_leaving_out_a_site_tests_each_site_once() -> None:
    bags, labels, patients = arrays(24)
    plain = Cohort.from_arrays([Bag(x) for x in bags], labels, patients)
    sites = tuple("ABC"[int(patient) % 3] for patient in plain.patients)
    made = replace(plain, sites=sites)
    result = cross_validate(made, replace(QUICK, split_by="site", epochs=1))
    assert [each.fold.name for each in result.folds] == ["A", "B", "C"]
    for each in result.folds:
        assert {sites[plain.patients.index(p)] for p in each.predictions.patients} == {each.fold.name}


def test_a_member_says_what_it_is_and_answers_as_before(tmp_path: Path) -> None:
    trained = first_fold(cohort(24), replace(QUICK, epochs=2))
    member = trained.members[0]
    member.save(tmp_path / "m.safetensors")
    read = Member.load(tmp_path / "m.safetensors")
    bag = Bag(bag_of(1, np.random.default_rng(0)))
    assert read.logits(bag).equal(member.logits(bag))
    assert (read.facts, read.objective, read.temperature) == (member.facts, member.objective, member.temperature)
    assert read.facts["dim"] == DIM
    assert member.attention(bag).sum(-1).tolist() == pytest.approx([1.0])
