"""Tests of wsi search: what is said, and with which exit code."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mil.prototypes import embed_slides
from tests.mil.made_up import stored_cohort


@pytest.fixture
def out(tmp_path: Path) -> Any:
    out, _ = stored_cohort(tmp_path, n=12)
    embed_slides(out, None, "mean")
    return out


@pytest.fixture
def call(command: Any) -> Any:
    """Run ``wsi search …``; returns exit code, stdout and stderr."""
    return partial(command, "wsi", "search")


def test_the_slides_most_alike_are_named_with_their_labels(call: Any, out: Path, tmp_path: Path) -> None:
    words = [out, "--embedding", "mean-made-up", "--query", "s003", "--top", 3, "--labels", tmp_path / "cohort.csv"]
    code, said, _ = call(*words, "--target", "subtype")
    assert code == 0
    head, *lines = said.splitlines()
    assert head == "s003.svs  luad, mean-made-up, cosine, exact among 12 slides:"
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert all(line.endswith(("luad", "lusc")) for line in lines)
    assert sorted((float(line.split()[2]) for line in lines), reverse=True) == [
        float(line.split()[2]) for line in lines
    ]


def test_the_only_embedding_needs_no_name_and_of_several_one_is_to_be_named(call: Any, out: Path) -> None:
    code, said, _ = call(out, "--query", "s003")
    assert code == 0
    assert said.startswith("s003.svs, mean-made-up, cosine, exact among 12 slides:")
    embed_slides(out, None, "mean-variance")
    code, _, err = call(out, "--query", "s003")
    assert code == 2
    assert "mean-made-up, mean-variance-made-up; say which (wsi search: --embedding)" in err


def test_a_search_is_judged_by_what_is_known(call: Any, out: Path, tmp_path: Path) -> None:
    labels = ["--labels", tmp_path / "cohort.csv", "--target", "subtype"]
    code, said, _ = call(out, "--embedding", "mean-made-up", "--metric", "centred", *labels)
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()[1:5]] == ["precision@1", "precision@3", "precision@5", "mAP"]
    assert "12 slides of 9 patients asked" in said


def test_a_sheet_of_slides_that_are_gone_is_drawn_and_told(call: Any, out: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "alike.png"
    code, said, _ = call(out, "--embedding", "mean-made-up", "--query", "s003", "--top", 2, "--sheet", sheet)
    assert code == 4
    assert said.count("drawn without its pixels") == 3
    assert sheet.stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["OUT"], "--query SLIDE"),
        (["OUT", "--embedding", "panther", "--query", "s003"], "make it with wsi prototypes embed"),
        (["OUT", "--embedding", "mean-made-up", "--query", "slide-7"], "no slide 'slide-7'"),
        (["OUT", "--embedding", "mean-made-up", "--query", "s003", "--target", "subtype"], "go together"),
        (
            ["OUT", "--embedding", "mean-made-up", "--query", "s003", "--metric", "prototypes"],
            "needs importance and mean",
        ),
        (
            ["OUT", "--embedding", "mean-made-up", "--labels", "cohort.csv", "--target", "subtype", "--sheet", "a.png"],
            "--sheet draws",
        ),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line_with_exit_code_2(
    call: Any, out: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(out.parent)
    code, _, err = call(*words)
    assert code == 2
    assert message in err
