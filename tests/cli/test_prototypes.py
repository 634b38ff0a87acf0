"""Tests of wsi prototypes: what is said, what is written, and with which exit code."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli.main import wsi
from cli.run import _run
from features.store import FeatureStore
from mil.prototypes import Embeddings, Prototypes
from tests.mil.made_up import stored_cohort, write_store


@pytest.fixture
def out(tmp_path: Path) -> Any:
    return stored_cohort(tmp_path, n=8)[0]


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["wsi", "prototypes", *map(str, words)])
    return _run(wsi, "wsi")


def test_prototypes_are_fitted_and_every_slide_gets_its_vector(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "p.zarr"
    assert call(monkeypatch, "fit", out, "--encoder", "made-up", "--k", 3, "--seed", 4, "--out", made) == 0
    assert f"wsi prototypes embed {out} --prototypes {made} uses them" in capsys.readouterr().out
    fitted = Prototypes.load(made)
    assert (fitted.k, fitted.provenance["seed"], fitted.provenance["n_slides"]) == (3, 4, 8)
    assert call(monkeypatch, "embed", out, "--prototypes", made) == 0
    assert "panther: 8 slides embedded, 0 there already" in capsys.readouterr().out
    assert Embeddings.from_store(out).part("importance").shape == (8, 3)
    assert call(monkeypatch, "embed", out, "--prototypes", made) == 0
    assert "panther: 0 slides embedded, 8 there already" in capsys.readouterr().out


def test_only_slides_of_the_table_are_fitted_on(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "train.csv"
    table.write_text("slide\ns000.svs\ns003.svs\n")
    assert call(monkeypatch, "fit", out, "--slides", table, "--k", 2, "--out", tmp_path / "p.zarr") == 0
    assert Prototypes.load(tmp_path / "p.zarr").provenance["n_slides"] == 2


def test_a_report_fits_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "fit", out, "--report", "2,3") == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:4]] == ["k", "2", "3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT", "cohort.csv"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "OUT", "--k", "2"], "--out prototypes.zarr"),
        (["fit", "OUT", "--k", "2", "--out", "cohort.csv"], "is there already"),
        (["fit", "OUT", "--k", "500", "--out", "p.zarr"], "too few, or too alike, for 500"),
        (["fit", "OUT", "--report", "8,x"], "whole numbers with commas"),
        (["fit", "nowhere", "--out", "p.zarr"], "no feature store here"),
        (["embed", "OUT", "--prototypes", "p.zarr"], "make them with wsi prototypes fit"),
        (["embed", "OUT", "--method", "h2t"], "h2t needs prototypes"),
        (["embed", "OUT", "--set", "tau"], "write KEY=VALUE"),
        (["embed", "OUT", "--set", "tou=1"], "did you mean tau"),
        (["show", "OUT", "--prototypes", "p.zarr", "--out", "o", "--target", "x"], "--labels and --target go together"),
        (["show", "OUT", "--prototypes", "p.zarr", "--out", "o"], "make them with wsi prototypes fit"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line_with_exit_code_2(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(out.parent)
    assert call(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err


def test_slides_that_fail_are_named_and_counted(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "p.zarr"
    assert call(monkeypatch, "fit", out, "--k", 3, "--out", made) == 0
    assert call(monkeypatch, "embed", out, "--prototypes", made) == 0
    write_store(out, {"x/t.svs": np.ones((5, 6), np.float32)})
    assert call(monkeypatch, "embed", out, "--prototypes", made, "--set", "tau=1") == 3
    said = capsys.readouterr().out
    assert said.count("FAILED, ENCODER_CHANGED") == 8
    assert "panther: 1 slides embedded, 0 there already, 8 failed" in said
    assert call(monkeypatch, "embed", out, "--prototypes", made, "--set", "tau=2") == 4
    assert call(monkeypatch, "embed", out, "--prototypes", made, "--set", "tau=2", "--replace") == 0
    assert FeatureStore(out).slide("t.svs").embedding("panther").facts["hyper"]["tau"] == 2


def test_a_method_without_prototypes_needs_none(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "embed", out, "--method", "mean-variance", "--name", "moments") == 0
    assert FeatureStore(out).slide("s002.svs").embeddings == ("moments",)


def test_what_can_be_drawn_without_the_slides_is_drawn_and_the_outcome_is_told(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, table = tmp_path / "p.zarr", tmp_path / "cohort.csv"
    assert call(monkeypatch, "fit", out, "--k", 3, "--out", made) == 0
    words = ["show", out, "--prototypes", made, "--labels", table]
    assert call(monkeypatch, *words, "--target", "subtype", "--out", tmp_path / "drawn") == 4
    said = capsys.readouterr().out
    assert said.count("drawn without its pixels") == 8
    assert "subtype: Mann-Whitney, 6 patients; effect: chance that lusc has more" in said
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "prototypes.png", "sheets", "maps", "shares.csv", "shares.png", "cohort.png", "outcome.csv",
    }  # fmt: skip
    assert call(monkeypatch, *words, "--target", "months", "--event", "died", "--no-maps", "--out", tmp_path / "o") == 4
    assert "months: Cox" in capsys.readouterr().out
    assert not (tmp_path / "o" / "maps").exists()


def test_only_slides_whose_pixels_are_gone_make_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((160, 200, 3), 200, np.uint8)).save(tmp_path / "a.png")
    x = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    write_store(tmp_path / "OUT", {str(tmp_path / "a.png"): x, str(tmp_path / "b.png"): x + 1})
    assert call(monkeypatch, "fit", tmp_path / "OUT", "--k", 2, "--scale", "standard", "--out", tmp_path / "p") == 0
    show = ["show", tmp_path / "OUT", "--prototypes", tmp_path / "p", "--out", tmp_path / "drawn"]
    assert call(monkeypatch, *show) == 3
    assert "b.png" in next(line for line in capsys.readouterr().out.splitlines() if "without its pixels" in line)
    (tmp_path / "s.csv").write_text(f"slide\n{tmp_path / 'a.png'}\n")
    assert call(monkeypatch, *show, "--slides", tmp_path / "s.csv") == 0
    assert "2 prototypes in 1 slides, 12 tiles" in capsys.readouterr().out


def test_help_says_what_prototypes_are_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert "k kinds of tissue" in said
    assert "wsi prototypes embed OUT --prototypes prototypes.zarr" in said
