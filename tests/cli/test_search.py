"""Tests of wsi search: what is said, and with which exit code."""

from pathlib import Path
from typing import Any

import pytest

from cli.main import wsi
from cli.run import _run
from mil.prototypes import embed_slides
from tests.mil.made_up import stored_cohort


@pytest.fixture
def out(tmp_path: Path) -> Any:
    out, _ = stored_cohort(tmp_path, n=12)
    embed_slides(out, None, "mean")
    return out


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["wsi", "search", *map(str, words)])
    return _run(wsi, "wsi")


def test_the_slides_most_alike_are_named_with_their_labels(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [out, "--embedding", "mean", "--query", "s003", "--top", 3, "--labels", tmp_path / "cohort.csv"]
    assert call(monkeypatch, *words, "--target", "subtype") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "s003.svs  luad, mean, cosine, exact among 12 slides:"
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert all(line.endswith(("luad", "lusc")) for line in lines)
    assert sorted((float(line.split()[2]) for line in lines), reverse=True) == [
        float(line.split()[2]) for line in lines
    ]


def test_a_search_is_judged_by_what_is_known(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["--labels", tmp_path / "cohort.csv", "--target", "subtype"]
    assert call(monkeypatch, out, "--embedding", "mean", "--metric", "centred", *labels) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:5]] == ["precision@1", "precision@3", "precision@5", "mAP"]
    assert "12 slides of 9 patients asked" in said


def test_a_sheet_of_slides_that_are_gone_is_drawn_and_told(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "alike.png"
    assert call(monkeypatch, out, "--embedding", "mean", "--query", "s003", "--top", 2, "--sheet", sheet) == 4
    assert capsys.readouterr().out.count("drawn without its pixels") == 3
    assert sheet.stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["OUT"], "--query SLIDE"),
        (["OUT", "--query", "s003"], "make it with wsi prototypes embed"),
        (["OUT", "--embedding", "mean", "--query", "slide-7"], "no slide 'slide-7'"),
        (["OUT", "--embedding", "mean", "--query", "s003", "--target", "subtype"], "go together"),
        (["OUT", "--embedding", "mean", "--query", "s003", "--metric", "prototypes"], "needs importance and mean"),
        (
            ["OUT", "--embedding", "mean", "--labels", "cohort.csv", "--target", "subtype", "--sheet", "a.png"],
            "--sheet draws",
        ),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line_with_exit_code_2(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(out.parent)
    assert call(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err
