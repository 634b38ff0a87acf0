"""Tuning: the search finds what is better, never sees a test case, repeats, and goes on after an interruption."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from mil import Cohort, Result, TrainConfig, cross_validate
from mil.splits import make_folds
from mil.train import train_fold
from mil.tune import DEFAULT_SPACE, Between, Trial, read_space, search, tune
from tests.mil.made_up import QUICK, arrays, cohort
from wsi.errors import EnvironmentFaultError, RunMismatchError, StoreFormatError, UsageError

SMALL = replace(QUICK, inner=1, epochs=2, folds=2, batch_size=64)
SPACE: Any = {"lr": Between(1e-4, 0.1, log=True), "epochs": (1, 4)}


def test_the_search_finds_the_setting_that_learns() -> None:
    seen: list[Trial] = []
    found = search(
        cohort(24), replace(SMALL, epochs=6), trials=8, space={"lr": (1e-7, 0.05)}, told=seen.append
    )  # with the first a model stays as it was drawn
    assert found.lr == 0.05
    assert found == replace(SMALL, epochs=6, lr=0.05)  # all else is as it was, members too
    assert {trial.settings["lr"] for trial in seen} == {1e-7, 0.05}
    best = max(trial.score for trial in seen if trial.settings["lr"] == 0.05)
    assert best > max(trial.score for trial in seen if trial.settings["lr"] == 1e-7)
    assert [trial.number for trial in seen] == list(range(8))
    assert min(trial.parts for trial in seen) < 3 == max(trial.parts for trial in seen)  # the poor are stopped early


def test_no_search_sees_the_fold_it_is_tested_on() -> None:
    bags, labels, patients = arrays(24)
    made = Cohort.from_arrays(bags, labels, patients)
    cases = made.cases()
    fold = make_folds(cases, made.target, by="random", folds=2, seed=0)[0]
    tested = {cases.names[i] for i in fold.test}
    spoilt = [x * 100 + 7 if str(p) in tested else x for x, p in zip(bags, patients, strict=True)]
    assert any(a is not b for a, b in zip(bags, spoilt, strict=True))
    told: tuple[list[Trial], list[Trial]] = ([], [])
    plain, other = (
        tune(Cohort.from_arrays(each, labels, patients), SMALL, trials=2, space=SPACE, told=heard.append)
        for each, heard in zip((bags, spoilt), told, strict=True)
    )
    mine, theirs = ([trial for trial in heard if trial.search == fold.name] for heard in told)
    assert mine == theirs  # score by score
    a, b = (each.result.folds[0].members[0].state_dict() for each in (plain, other))
    assert all(tensor.equal(b[name]) for name, tensor in a.items())
    # The check itself would notice: the other fold is trained on the spoilt cases, and is another model.
    c, d = (each.result.folds[1].members[0].state_dict() for each in (plain, other))
    assert not all(tensor.equal(d[name]) for name, tensor in c.items())
    assert {trial.search for trial in plain.trials} == {"0", "1", "everybody"}


def test_each_fold_is_tested_by_a_model_of_the_settings_found_in_it() -> None:
    made = cohort(24)
    found = tune(made, SMALL, trials=3, space=SPACE)
    for number, trained in enumerate(found.result.folds):
        of_fold = [trial for trial in found.trials if trial.search == trained.fold.name and trial.parts == 3]
        best = max(of_fold, key=lambda trial: trial.score)
        assert len(trained.curve) == best.settings["epochs"] * SMALL.members
        plain = cross_validate(made, replace(SMALL, **best.settings))
        np.testing.assert_array_equal(plain.folds[number].predictions.answers, trained.predictions.answers)
    everybody = [trial for trial in found.trials if trial.search == "everybody" and trial.parts == 3]
    assert found.config == replace(SMALL, **max(everybody, key=lambda trial: trial.score).settings)


def test_an_interrupted_search_goes_on_and_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cohort(24)
    straight = tune(made, SMALL, trials=2, space=SPACE, out=tmp_path / "straight")
    heard: list[Trial] = []

    def stop(*args: Any) -> Any:
        if len(heard) == 3:  # in the middle of the fourth trial, the second of fold 1
            raise KeyboardInterrupt
        return train_fold(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("mil.tune.train_fold", stop)
        tune(made, SMALL, trials=2, space=SPACE, out=tmp_path / "run", told=heard.append)
    again: list[Trial] = []
    resumed = tune(made, SMALL, trials=2, space=SPACE, out=tmp_path / "run", told=again.append)
    assert len(again) == 6 - 3
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "run" / "trials.log")))
    states = [trial.state.name for trial in optuna.load_study(study_name="1", storage=storage).trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]
    assert (resumed.trials, resumed.config) == (straight.trials, straight.config)
    in_memory: list[Trial] = []
    search(made, SMALL, trials=2, space=SPACE, told=in_memory.append)
    assert in_memory == [trial for trial in straight.trials if trial.search == "everybody"]
    for name in ("config.json", "trials.csv", "tune.json", "nested/predictions.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert TrainConfig.read(tmp_path / "run" / "config.json") == straight.config
    assert len(list(csv.DictReader((tmp_path / "run" / "trials.csv").read_text().splitlines()))) == 6
    read = Result.load(tmp_path / "run" / "nested")
    np.testing.assert_array_equal(read.predictions.answers, straight.result.predictions.answers)
    with pytest.raises(RunMismatchError, match=r"holds a search that differs \(space\)"):
        tune(made, SMALL, trials=2, space={"lr": (0.1, 0.2)}, out=tmp_path / "run")
    (tmp_path / "run" / "tune.json").write_text("{")
    with pytest.raises(StoreFormatError, match="is damaged"):
        tune(made, SMALL, trials=2, space=SPACE, out=tmp_path / "run")


def test_another_seed_tries_others_and_a_trial_that_diverges_counts_for_nothing() -> None:
    made, seen = cohort(24), dict[int, list[Trial]]()
    for seed in (0, 1):
        seen[seed] = []
        search(made, replace(SMALL, seed=seed), trials=1, space=SPACE, told=seen[seed].append)
    assert [trial.settings for trial in seen[0]] != [trial.settings for trial in seen[1]]
    heard: list[Trial] = []
    assert search(made, SMALL, trials=4, space={"lr": (1e30, 0.01)}, told=heard.append).lr == 0.01
    assert all(np.isnan(trial.score) for trial in heard if trial.settings["lr"] == 1e30)
    with pytest.raises(UsageError, match="no trial could be judged"):
        search(made, SMALL, trials=1, space={"lr": (1e30,)})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "the space is empty"),
        ({"lrr": (1, 2)}, "'lrr' cannot be searched; take of model"),
        ({"seed": (1, 2)}, "'seed' cannot be searched"),
        ({"folds": (2, 5)}, "'folds' cannot be searched"),
        ({"lr": ()}, "lr: give a list of choices, or a range"),
        ({"model": "abmil"}, "model: give a list of choices"),
        ({"tile_dropout": Between(0.5, 1.5)}, "tile_dropout is a number from 0 to below 1"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_before_anything_is_trained(space: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search(cohort(24), SMALL, trials=1, space=space)
    with pytest.raises(UsageError, match="at least one trial"):
        search(cohort(24), SMALL, trials=0)


def test_ranges_and_choices_are_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    path.write_text(json.dumps({"lr": {"low": 1e-4, "high": 0.01, "log": True}, "hyper.attention_dim": [4, 8]}))
    space = read_space(path)
    assert space == {"lr": Between(1e-4, 0.01, log=True), "hyper.attention_dim": (4, 8)}
    found = search(cohort(24), SMALL, trials=1, space=space)
    assert found.hyper["attention_dim"] in (4, 8)
    assert found.hyper["embed_dim"] == 8
    for text, message in (
        ("{", "not a space"),
        ("[1]", "not a space"),
        ('{"lr": {"low": 1, "high": 0}}', "from a lower"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_space(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_space(tmp_path / "none.json")
    assert set(DEFAULT_SPACE) >= {"lr", "weight_decay"}


def test_without_optuna_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(EnvironmentFaultError, match=r"pip install 'wsi-engine\[tune\]'"):
        search(cohort(24), SMALL, trials=1)
