"""The method dense, as a user runs it: glands that touch become objects of their own, in every file that is written."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile

from tests.segmentation.trained import save_glands
from wsi.geojson import Frame, read_geojson, write_geojson

SEEDS = range(4)
FRAME = Frame("a", (192, 192), (2.0, 2.0))
FAST = [
    "--classes", "gland", "--method", "dense", "--slide-mpp", 2.0, "--mpp", 2.0, "--patch", 32, "--steps", 60,
    "--device", "cpu", "--set", "dense.overlap_px=16",
    "--set", "fit.batch_size=6", "--set", "fit.learning_rate=0.02", "--set", "fit.validate_every=30",
    "--set", "look.turns=true", "--set", "look.tile_px=64", "--set", "objects.min_area_um2=200",
]  # fmt: skip
SMALL = '{"filters": [8, 8], "norm": "batch"}'


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    for seed in SEEDS:
        truth = save_glands(tmp_path / "slides" / f"{seed}.png", seed)
        write_geojson(tmp_path / "truth" / f"{seed}.geojson", truth, FRAME)
    return tmp_path


def train(command: Any, cohort: Path, *words: Any, hyper: str = SMALL) -> tuple[int, str, str]:
    code, said, error = command(
        "wsi", "segment", "train", "--slides", cohort / "slides", "--annotations", cohort / "truth",
        "--out", cohort / "model", "--set", f"dense.hyper={hyper}", *FAST, *words,
    )  # fmt: skip
    return code, said, error


def test_glands_that_touch_are_objects_of_their_own(command: Any, cohort: Path) -> None:
    code, said, error = train(command, cohort, "--rim", 6)
    assert (code, error) == (0, "")
    assert "dense network: step" in said
    assert "dense dice 0.9" in said
    about = json.loads((cohort / "model" / "model.json").read_text(encoding="utf-8"))
    assert (about["method"], list(about["files"])) == ("dense", ["dense.safetensors"])
    assert (about["config"]["dense"]["mpp"], about["config"]["dense"]["tile_px"]) == (2.0, 32)

    truth = save_glands(cohort / "new" / "9.png", 9)
    words = ("--model", cohort / "model", "--slide-mpp", 2.0, "--device", "cpu", "--tolerance", 0)
    formats = ("--formats", "geojson,mask,picture,objects")
    code, said, error = command("wsi", "segment", "run", cohort / "new", cohort / "out", *words, *formats)
    assert (code, error) == (0, "")
    assert "gland: 0.04 mm² on 1 of 1 slides" in said
    found = read_geojson(cohort / "out" / "9.geojson").annotations
    assert {each.class_name for each in found} == {"gland"}
    assert len(found) == len(truth) == 8
    for one in truth:
        best = max(found, key=lambda a: a.geometry.intersection(one.geometry).area).geometry
        assert best.intersection(one.geometry).area / best.union(one.geometry).area > 0.85
    with (cohort / "out" / "9.objects.csv").open(encoding="utf-8", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["gland"] * 8
    mask = tifffile.imread(cohort / "out" / "9.ome.tif", level=0)
    assert set(np.unique(mask)) == {0, 1}  # rims are glands, too
    assert mask.sum() == pytest.approx(shapely.area([a.geometry for a in found]).sum(), rel=0.02)

    write_geojson(cohort / "new-truth" / "9.geojson", truth, FRAME)
    code, said, _ = command("wsi", "segment", "evaluate", cohort / "out", "--truth", cohort / "new-truth")
    assert code == 0
    with (cohort / "out" / "evaluation" / "scores.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["object_f1"]) == 1
    assert float(row["dice"]) > 0.9


def test_without_rims_areas_are_found_as_they_hang_together(command: Any, cohort: Path) -> None:
    assert train(command, cohort)[0] == 0
    save_glands(cohort / "new" / "9.png", 9)
    words = ("--model", cohort / "model", "--slide-mpp", 2.0, "--device", "cpu", "--min-area", 200)
    assert command("wsi", "segment", "run", cohort / "new", cohort / "out", *words)[0] == 0
    assert len(read_geojson(cohort / "out" / "9.geojson").annotations) == 4


def test_an_exported_network_finds_the_same(command: Any, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra onnx is not installed")
    from segmentation import export

    assert train(command, cohort, "--rim", 6)[0] == 0
    save_glands(cohort / "new" / "9.png", 9)
    monkeypatch.setattr(export, "_median_seconds", lambda run, *_: 1.0 if isinstance(run, export.OnnxRunner) else 2.0)
    code, said, _ = command("wsi", "segment", "export", cohort / "model")
    assert code == 0
    assert "dense.safetensors: onnxruntime" in said
    areas = []
    for runtime in ("auto", "torch"):
        words = ("--model", cohort / "model", "--slide-mpp", 2.0, "--device", "cpu", "--runtime", runtime)
        assert command("wsi", "segment", "run", cohort / "new", cohort / runtime, *words)[0] == 0
        found = read_geojson(cohort / runtime / "9.geojson").annotations
        areas.append(sorted(each.geometry.area for each in found))
    assert len(areas[0]) == len(areas[1]) == 8
    assert areas[0] == pytest.approx(areas[1], rel=2e-2)


def test_a_decoder_stands_on_the_tokens_of_a_foundation_model(command: Any, cohort: Path) -> None:
    words = ("--trunk", "timm:test_vit", "--random-weights", 0, "--patch", 64, "--set", "dense.network=tokens")
    code, said, error = train(command, cohort, *words, "--steps", 10, "--set", "fit.validate_every=10", hyper="{}")
    assert (code, error) == (0, "")
    assert (cohort / "model" / "dense.safetensors").stat().st_size < 10_000  # the decoder alone
    run = ("--model", cohort / "model", "--slide-mpp", 2.0, "--device", "cpu")
    assert command("wsi", "segment", "run", cohort / "slides", cohort / "out", *run)[0] == 0
    if all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        code, said, _ = command("wsi", "segment", "export", cohort / "model")
        assert code == 0
        assert "dense.safetensors: torch, as it stands on a foundation model" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "cascade", "--rim", 6], "--rim is of the method dense"),
        (["--set", "dense.overlap_px=32"], "overlap"),
        (["--set", "dense.network=tokens", "--trunk", "colour-stats"], "no hyper-parameter 'filters'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words: list[Any], said: str, command: Any, cohort: Path) -> None:
    code, _, error = train(command, cohort, *words)
    assert code in (2, 5)
    assert said in error
    assert error.count("\n") <= 4  # click says how the command is used, too
    assert not list(cohort.glob("model/*.safetensors"))
