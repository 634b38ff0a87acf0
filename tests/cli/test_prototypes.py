"""Tests of wsi prototypes: what is said, what is written, and with which exit code."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from features.store import FeatureStore
from mil.prototypes import Embeddings, Prototypes
from tests.mil.made_up import stored_cohort, write_store


@pytest.fixture
def out(tmp_path: Path) -> Any:
    return stored_cohort(tmp_path, n=8)[0]


@pytest.fixture
def call(command: Any) -> Any:
    """Run ``wsi prototypes …``; returns exit code, stdout and stderr."""
    return partial(command, "wsi", "prototypes")


def test_prototypes_are_fitted_and_every_slide_gets_its_vector(call: Any, out: Path, tmp_path: Path) -> None:
    made = tmp_path / "p.zarr"
    code, said, _ = call("fit", out, "--encoder", "made-up", "--k", 3, "--seed", 4, "--out", made)
    assert code == 0
    assert f"wsi prototypes embed {out} --prototypes {made} uses them" in said
    fitted = Prototypes.load(made)
    assert (fitted.k, fitted.provenance["seed"], fitted.provenance["n_slides"]) == (3, 4, 8)
    code, said, _ = call("embed", out, "--prototypes", made)
    assert code == 0
    assert "panther-made-up: 8 slides embedded, 0 there already" in said
    assert Embeddings.from_store(out).part("importance").shape == (8, 3)
    code, said, _ = call("embed", out, "--prototypes", made)
    assert code == 0
    assert "panther-made-up: 0 slides embedded, 8 there already" in said


def test_only_slides_of_the_table_are_fitted_on(call: Any, out: Path, tmp_path: Path) -> None:
    table = tmp_path / "train.csv"
    table.write_text("slide\ns000.svs\ns003.svs\n")
    assert call("fit", out, "--slides", table, "--k", 2, "--out", tmp_path / "p.zarr")[0] == 0
    assert Prototypes.load(tmp_path / "p.zarr").provenance["n_slides"] == 2


def test_a_report_fits_nothing(call: Any, out: Path, tmp_path: Path) -> None:
    code, said, _ = call("fit", out, "--report", "2,3")
    assert code == 0
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
    call: Any, out: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(out.parent)
    code, _, err = call(*words)
    assert code == 2
    assert message in err


def test_slides_that_fail_are_named_and_counted(call: Any, out: Path, tmp_path: Path) -> None:
    made = tmp_path / "p.zarr"
    assert call("fit", out, "--k", 3, "--out", made)[0] == 0
    assert call("embed", out, "--prototypes", made)[0] == 0
    write_store(out, {"x/t.svs": np.ones((5, 6), np.float32)})
    code, said, _ = call("embed", out, "--prototypes", made, "--set", "tau=1")
    assert code == 3
    assert said.count("FAILED, ENCODER_CHANGED") == 8
    assert "panther-made-up: 1 slides embedded, 0 there already, 8 failed" in said
    assert call("embed", out, "--prototypes", made, "--set", "tau=2")[0] == 4
    assert call("embed", out, "--prototypes", made, "--set", "tau=2", "--replace")[0] == 0
    assert FeatureStore(out).slide("t.svs").embedding("panther-made-up").facts["hyper"]["tau"] == 2


def test_a_method_without_prototypes_needs_none(call: Any, out: Path) -> None:
    assert call("embed", out, "--method", "mean-variance", "--name", "moments")[0] == 0
    assert FeatureStore(out).slide("s002.svs").embeddings == ("moments",)


def test_info_says_which_vectors_a_store_holds(command: Any, call: Any, out: Path, tmp_path: Path) -> None:
    assert "embedding" not in command("wsi", "info", out)[1]
    assert call("fit", out, "--k", 3, "--out", tmp_path / "p.zarr")[0] == 0
    assert call("embed", out, "--prototypes", tmp_path / "p.zarr")[0] == 0
    write_store(out, {"x/t.svs": np.ones((5, 6), np.float32)})
    assert call("embed", out, "--method", "mean", "--name", "m")[0] == 0
    said = command("wsi", "info", out)[1].splitlines()
    head, *rows = said[said.index("") + 1 :]
    assert [column.strip() for column in head.split("  ") if column] == [
        "slide embedding", "made by", "of features of", "numbers", "slides"
    ]  # fmt: skip
    assert [row.split() for row in rows] == [
        ["m", "mean", "made-up", "6", "9"],
        ["panther-made-up", "panther", "made-up", str(3 * (1 + 2 * 6)), "8"],
    ]


def test_what_can_be_drawn_without_the_slides_is_drawn_and_the_outcome_is_told(
    call: Any, out: Path, tmp_path: Path
) -> None:
    made, table = tmp_path / "p.zarr", tmp_path / "cohort.csv"
    assert call("fit", out, "--k", 3, "--out", made)[0] == 0
    words = ["show", out, "--prototypes", made, "--labels", table]
    code, said, _ = call(*words, "--target", "subtype", "--out", tmp_path / "drawn")
    assert code == 4
    assert said.count("drawn without its pixels") == 8
    assert "subtype: Mann-Whitney, 6 patients; effect: chance that lusc has more" in said
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "prototypes.png", "sheets", "maps", "shares.csv", "shares.png", "cohort.png", "outcome.csv",
    }  # fmt: skip
    code, said, _ = call(*words, "--target", "months", "--event", "died", "--no-maps", "--out", tmp_path / "o")
    assert code == 4
    assert "months: Cox" in said
    assert call("show", out, "--prototypes", made, "--no-maps")[0] == 4
    assert (tmp_path / "p-pictures" / "prototypes.png").is_file()
    assert not (tmp_path / "o" / "maps").exists()


def test_only_slides_whose_pixels_are_gone_make_the_exit_code(call: Any, tmp_path: Path) -> None:
    Image.fromarray(np.full((160, 200, 3), 200, np.uint8)).save(tmp_path / "a.png")
    x = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    write_store(tmp_path / "OUT", {str(tmp_path / "a.png"): x, str(tmp_path / "b.png"): x + 1})
    assert call("fit", tmp_path / "OUT", "--k", 2, "--scale", "standard", "--out", tmp_path / "p")[0] == 0
    show = ["show", tmp_path / "OUT", "--prototypes", tmp_path / "p", "--out", tmp_path / "drawn"]
    code, said, _ = call(*show)
    assert code == 3
    assert "b.png" in next(line for line in said.splitlines() if "without its pixels" in line)
    (tmp_path / "s.csv").write_text(f"slide\n{tmp_path / 'a.png'}\n")
    code, said, _ = call(*show, "--slides", tmp_path / "s.csv")
    assert code == 0
    assert "2 prototypes in 1 slides, 12 tiles" in said


def test_help_says_what_prototypes_are_and_how_to_go_on(call: Any) -> None:
    code, said, _ = call("--help")
    assert code == 0
    assert "k kinds of tissue" in said
    assert "wsi prototypes embed OUT --prototypes prototypes.zarr" in said
