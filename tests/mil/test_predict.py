"""Predicting for a store: only with its own features, honest about slides seen in training, sure only where it may be."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.keys import slide_key
from features.store import FeatureStore
from mil import Predictor, cross_validate
from mil.cohort import Cohort
from mil.predict import overview_of, read_patients
from mil.target import Labels
from tests.mil.made_up import DIM, QUICK, bag_of, cohort, stored_cohort, write_store
from wsi.errors import CohortError, NotExtractedError, RunMismatchError


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Any:
    """A finished run, its store and its table."""
    folder = tmp_path_factory.mktemp("run")
    store, table = stored_cohort(folder, 36)
    made = Cohort.from_store(store, table, "subtype")
    cross_validate(made, replace(QUICK, inner=1, epochs=60), out=folder / "run")
    return folder / "run", store, table


def test_slides_of_the_training_are_answered_by_the_fold_that_tested_them(run: Any) -> None:
    predictor = Predictor.load(run[0])
    answers = predictor.predict(run[1], patients=read_patients(run[2], FeatureStore(run[1])))
    tested = predictor.result.predictions
    assert sorted(answers.predictions.names) == sorted(tested.names)
    for name, fold, answer in zip(
        answers.predictions.names, answers.predictions.folds, answers.predictions.answers, strict=True
    ):
        i = tested.names.index(name)
        assert fold == tested.folds[i]
        np.testing.assert_allclose(answer, tested.answers[i], rtol=1e-12)


def test_new_slides_are_answered_by_all_and_the_rest_is_named(run: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    slides = {f"new-{label}.svs": bag_of(label, rng, n=40) for label in (0, 1)}
    store = write_store(tmp_path / "OUT", slides | {"empty.svs": np.empty((0, DIM), np.float32)})
    write_store(tmp_path / "OUT", {"other.svs": slides["new-0.svs"]}, encoder="another")
    told: list[str] = []
    answers = Predictor.load(run[0]).predict(store.root, done=told.append)
    assert answers.predictions.names == (slide_key("new-0.svs"), slide_key("new-1.svs")) == tuple(told)
    assert answers.predictions.folds == ("all", "all")
    assert [answers.answer(i) for i in range(2)] == ["luad", "lusc"]
    assert {each.reason for each in answers.left_out} == {"no tiles", "no features of made-up"}
    answers.write(tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [row["answer"] for row in rows] == ["luad", "lusc"]
    assert rows[1]["set at 90%"] == "lusc"
    assert float(rows[0]["p(luad)"]) + float(rows[0]["p(lusc)"]) == pytest.approx(1, abs=1e-5)


def test_features_of_another_kind_are_refused_with_what_differs(run: Any, tmp_path: Path) -> None:
    x = np.zeros((3, DIM), np.float32)
    write_store(tmp_path / "a", {"a.svs": x}, encoder="another")
    with pytest.raises(
        RunMismatchError,
        match=r"features of another, but .* was trained on made-up; run wsi extract with --encoder made-up",
    ):
        Predictor.load(run[0]).predict(tmp_path / "a")
    write_store(tmp_path / "b", {"a.svs": x}, weights="b")
    with pytest.raises(RunMismatchError, match=r"weights_sha256 \['b'\] here, \['a'\] in training"):
        Predictor.load(run[0]).predict(tmp_path / "b")
    plain = Predictor(cross_validate(cohort(24), replace(QUICK, epochs=1)))
    with pytest.raises(RunMismatchError, match="name no encoder"):
        plain.predict(tmp_path / "a")


def test_a_store_without_usable_slides_is_said(run: Any, tmp_path: Path) -> None:
    write_store(tmp_path, {"a.svs": np.empty((0, DIM), np.float32)})
    with pytest.raises(NotExtractedError, match="no slide can be answered"):
        Predictor.load(run[0]).predict(tmp_path)


def test_a_survival_run_gives_risks_without_sets(run: Any, tmp_path: Path) -> None:
    made = Cohort.from_store(run[1], run[2], Labels("months", event="died"))
    predictor = Predictor(cross_validate(made, replace(QUICK, epochs=2)))
    answers = predictor.predict(run[1])
    assert answers.sets is None
    assert answers.predictions.answers.shape == (36, 4)
    assert (np.diff(answers.predictions.answers, axis=1) <= 0).all()  # nobody comes back to life
    answers.write(tmp_path / "p.csv")


def test_heatmaps_come_from_the_models_that_answer(run: Any) -> None:
    predictor = Predictor.load(run[0])
    source = predictor.source(FeatureStore(run[1]))
    key = slide_key("x/s004.svs")
    heat = predictor.heatmap(source, key)
    _, members = predictor.members_for([key])
    assert len(members) == QUICK.members
    bag = source.read(key)
    expected = np.mean([member.attention(bag)[0].numpy() for member in members], axis=0) * len(bag)
    np.testing.assert_allclose(heat.values, expected, rtol=1e-6)
    assert overview_of(FeatureStore(run[1]).slide("s004")) is None  # its file was never there


def test_a_table_without_patients_is_said(run: Any, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("slide,who\ns000,a\n")
    with pytest.raises(CohortError, match="no column of patients"):
        read_patients(tmp_path / "t.csv", FeatureStore(run[1]))
