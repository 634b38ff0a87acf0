"""wsi train and wsi predict, as a user runs them."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mil.predictions import Predictions
from mil.target import Target
from tests.mil.made_up import DIM, stored_cohort, write_store
from wsi import read_geojson

FAST = [
    "--folds",
    3,
    "--members",
    1,
    "--epochs",
    3,
    "--set",
    "hyper.embed_dim=8",
    "--set",
    "hyper.attention_dim=4",
    "--device",
    "cpu",
    "--set",
    "draws=20",
]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    return stored_cohort(tmp_path)


def test_the_main_job(command: Any, tmp_path: Path, store: Any) -> None:
    run, words = tmp_path / "run", ["--labels", store[1], "--target", "subtype", *FAST]
    code, out, err = command("wsi", "train", store[0], *words, "--out", run, "--set", "lr=0.01", "--encoder", "made-up")
    assert (code, err) == (0, "")
    assert "24 slides of 18 patients: 12 luad, 12 lusc" in out
    assert "[3/3] fold 2: auroc" in out
    assert "pooled [95% over patients]" in out
    config = json.loads((run / "run.json").read_bytes())["config"]
    assert (config["lr"], config["hyper"], config["folds"]) == (0.01, {"embed_dim": 8, "attention_dim": 4}, 3)
    assert len(Predictions.read(run / "predictions.csv", Target("subtype", "binary", ("luad", "lusc")))) == 18
    code, out, _ = command("wsi", "train", store[0], *words, "--out", run, "--set", "lr=0.01", "--encoder", "made-up")
    assert code == 0
    assert out.count("there already") == 3
    code, out, err = command("wsi", "predict", run, store[0], "--out", tmp_path / "p")
    assert (code, err) == (0, "")
    assert out.count("p(lusc)") == 24
    maps = sorted((tmp_path / "p" / "heatmaps").glob("*.geojson"))
    assert len(maps) == 24
    contents = read_geojson(maps[0])
    assert contents.origin == (3, 5)
    assert sum(a.object_type == "tile" for a in contents.annotations) == 12
    picture: Any = cv2.imread(str(maps[0].with_suffix(".png")))
    assert picture.shape == (160, 200, 3)
    code, out, _ = command(
        "wsi", "predict", run, store[0], "--out", tmp_path / "q", "--patients", store[1], "--explain", "none"
    )
    assert code == 0
    assert out.count("p(lusc)") == 18
    assert not (tmp_path / "q" / "heatmaps").exists()


def test_several_targets_are_one_run_with_answers_for_each(command: Any, tmp_path: Path, store: Any) -> None:
    run, words = tmp_path / "run", ["--target", "subtype", "--target", "months", "--event-column", "died"]
    code, out, err = command(
        "wsi",
        "train",
        store[0],
        "--labels",
        store[1],
        *words,
        "--kind",
        "auto",
        "--kind",
        "survival",
        "--out",
        run,
        *FAST,
    )
    assert (code, err) == (0, "")
    assert "24 slides of 18 patients: subtype 12 luad, 12 lusc; months 12 events" in out
    assert "fold 2: subtype auroc" in out
    assert "abmil-gated for months (survival)" in out
    assert "auc_q1 to auc_q3 are at months" in out
    code, out, err = command("wsi", "predict", run, store[0], "--out", tmp_path / "p")
    assert (code, err) == (0, "")
    assert (out.count("p(lusc)"), out.count("survival 4")) == (24, 24)
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        "heatmaps", "predictions-subtype.csv", "predictions-months.csv",
    }  # fmt: skip
    assert len(list((tmp_path / "p" / "heatmaps" / "months").glob("*.geojson"))) == 24


def test_curves_for_tensorboard_are_written_beside_the_run(command: Any, tmp_path: Path, store: Any) -> None:
    words = ["--labels", store[1], "--target", "subtype", "--out", tmp_path / "run", "--tensorboard", *FAST]
    assert command("wsi", "train", store[0], *words)[::2] == (0, "")
    folders = {path.parent.name for path in (tmp_path / "run" / "tensorboard").rglob("events.*")}
    assert folders == {"fold-0", "fold-1", "fold-2", "member-0"}


def test_settings_are_searched_and_go_into_train(command: Any, tmp_path: Path, store: Any) -> None:
    (tmp_path / "space.json").write_text('{"lr": {"low": 1e-3, "high": 1e-2, "log": true}, "epochs": [1, 2]}')
    words = ["--labels", store[1], "--target", "subtype"]
    tuned = [
        *words,
        *FAST[2:],
        "--folds",
        2,
        "--trials",
        2,
        "--space",
        tmp_path / "space.json",
        "--out",
        tmp_path / "tuned",
    ]
    code, out, err = command("wsi", "tune", store[0], *tuned)
    assert (code, err) == (0, "")
    assert "0: trial 1/2: " in out
    assert "everybody: trial 2/2: " in out
    assert "tested on patients that neither search nor models saw" in out
    assert "pooled [95% over patients]" in out
    found = json.loads((tmp_path / "tuned" / "config.json").read_bytes())
    assert 1e-3 <= found["lr"] <= 1e-2
    code, out, _ = command("wsi", "tune", store[0], *tuned)
    assert code == 0
    assert ": trial " not in out  # all were there
    code, out, err = command(
        "wsi", "train", store[0], *words, "--config", tmp_path / "tuned" / "config.json", "--out", tmp_path / "run"
    )
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "run" / "run.json").read_bytes())["config"] == found
    code, out, err = command("wsi", "tune", store[0], *tuned[:-1], tmp_path / "only", "--search-only")
    assert (code, err) == (0, "")
    assert "test them on other patients" in out
    assert json.loads((tmp_path / "only" / "config.json").read_bytes()) == found
    assert not (tmp_path / "only" / "nested").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "subtype", "--target", "months", "--kind", "binary"], "--kind is given 1 times for 2 targets"),
        (
            ["--target", "subtype", "--target", "months", "--event-column", "died"],
            "say which of the targets the events",
        ),
        (["--target", "subtype", "--target", "subtype"], "BAD_COHORT: .*names that differ"),
        (["--target", "grade"], "BAD_COHORT: .*cohort.csv: has no column 'grade'; it has slide, patient, site"),
        (["--target", "subtype", "--labels", "none.csv"], "BAD_COHORT: none.csv: there is no such table"),
        (["--target", "subtype", "--encoder", "uni2-h"], "NOT_EXTRACTED: .*no slide has features of uni2-h"),
        (["--target", "subtype", "--model", "abmill"], "abmill"),
        (["--target", "subtype", "--folds", "12"], "BAD_COHORT: .*too few for 12 folds"),
        (["--target", "subtype", "--set", "lrr=1"], "unknown setting 'lrr'; did you mean 'lr'"),
        (["--target", "subtype", "--set", "lr"], "write KEY=VALUE"),
        (["--target", "subtype", "--split-by", "site"], "BAD_COHORT: .*--site-column"),
        (["--target", "months", "--kind", "survival"], "BAD_COHORT: .*column of events"),
        (["--target", "subtype", "--classes", "luad,acc"], "BAD_COHORT: .*'lusc', which is none of the classes"),
        (["--target", "subtype", "--config", "none.json"], "none.json: cannot be read"),
        (["--target", "subtype", "--device", "cuda:99"], "DEVICE: .*cuda:99"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_exit_code_2_or_5(
    command: Any, tmp_path: Path, store: Any, words: Any, message: str
) -> None:
    import re

    base = [] if "--labels" in words else ["--labels", store[1]]
    code, out, err = command("wsi", "train", store[0], *base, "--out", tmp_path / "run", *words)
    assert code == (5 if "--device" in words else 2)
    assert re.search(message, err)
    assert "Traceback" not in out + err


def test_a_store_of_other_features_is_refused_by_predict(command: Any, tmp_path: Path, store: Any) -> None:
    run = tmp_path / "run"
    assert command("wsi", "train", store[0], "--labels", store[1], "--target", "subtype", "--out", run, *FAST)[0] == 0
    write_store(tmp_path / "other", {"a.svs": np.zeros((3, DIM), np.float32)}, encoder="another")
    code, _, err = command("wsi", "predict", run, tmp_path / "other", "--out", tmp_path / "p")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("RUN_MISMATCH")
    code, _, err = command("wsi", "predict", tmp_path, store[0], "--out", tmp_path / "p")
    assert code == 2
    assert "make one with wsi train" in err


def test_vectors_that_are_not_finite_are_one_line(command: Any, tmp_path: Path, store: Any, monkeypatch: Any) -> None:
    from features.store import Features

    original = Features.numpy
    monkeypatch.setattr(Features, "numpy", lambda self, **options: original(self, **options) * np.nan)
    code, _, err = command(
        "wsi", "train", store[0], "--labels", store[1], "--target", "subtype", "--out", tmp_path / "r", *FAST
    )
    assert code == 2
    assert err.startswith("BAD_FEATURES")
    assert "12 of 12 vectors are not finite" in err
