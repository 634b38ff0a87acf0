"""wsi segment export on a model's folder: what is written answers as the model did, and is used only where it belongs."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segmentation import export
from segmentation.export import OnnxRunner
from segmentation.refine import ExportedRefiner, Refiner
from segmentation.segmenter import Segmenter, export_model, is_exported
from segmentation.train import train
from tests.segmentation.trained import config, save_picture, slide
from wsi.slide import Slide


@pytest.fixture(scope="module")
def trained(trained_model: Path) -> Path:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra onnx is not installed")
    return trained_model


def onnx_is(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(run: Any, *_: Any) -> float:
        return 1.0 if isinstance(run, OnnxRunner) == faster else 2.0

    monkeypatch.setattr(export, "_median_seconds", measured)


@pytest.fixture(scope="module")
def onnx_model(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model whose second network ONNX Runtime was found faster for, and what was said."""
    model = Path(shutil.copytree(trained, tmp_path_factory.mktemp("exported") / "model"))
    with pytest.MonkeyPatch.context() as patch:
        onnx_is(True, patch)
        return model, "\n".join(export_model(model))


@pytest.fixture
def exported(onnx_model: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    """The same, to be spoiled."""
    return Path(shutil.copytree(onnx_model[0], tmp_path / "model")), onnx_model[1]


def found_by(model: Path, picture: Path, scratch: Path, **options: Any) -> tuple[Segmenter, np.ndarray, np.ndarray]:
    segmenter = Segmenter.load(model, device="cpu", **options)
    with Slide.open(picture, mpp=(1.0, 1.0)) as opened:
        found = segmenter.find(opened, segmenter.score(opened, scratch))
    return segmenter, np.asarray(found.labels[:]), np.asarray(found.probability[:])


def test_exported_networks_are_used_and_say_the_same(exported: tuple[Path, str], tmp_path: Path) -> None:
    model, said = exported
    assert "refinement.safetensors: onnxruntime (torch 2 s, onnxruntime 1 s a call" in said
    assert "classifier.safetensors: torch, as its trunk takes pixels as they are" in said
    assert not (model / "classifier.onnx").exists()
    assert is_exported(model)
    picture = save_picture(tmp_path / "a.png", 31)
    fast, labels, probability = found_by(model, picture, tmp_path / "a.zarr")
    plain, expected, sure = found_by(model, picture, tmp_path / "b.zarr", runtime="torch")
    assert isinstance(fast._refiner, ExportedRefiner)
    assert isinstance(plain._refiner, Refiner)
    assert fast._refiner.config == plain._refiner.config
    assert fast.said == plain.said == []
    np.testing.assert_allclose(probability, sure, atol=1e-3)
    assert (labels == expected).mean() > 0.999
    assert 0.05 < expected.mean() < 0.5


def test_a_run_says_the_same_with_and_without_the_exported_network(
    exported: tuple[Path, str], tmp_path: Path, command: Any
) -> None:
    save_picture(tmp_path / "slides" / "a.png", 31)
    areas = []
    for runtime in ("auto", "torch"):
        out = tmp_path / runtime
        words = ("--model", exported[0], "--slide-mpp", 1.0, "--device", "cpu", "--runtime", runtime)
        assert command("wsi", "segment", "run", tmp_path / "slides", out, *words)[0] == 0
        areas.append(float((out / "areas.csv").read_text(encoding="utf-8").splitlines()[1].split(",")[3]))
    assert areas[0] == pytest.approx(areas[1], rel=2e-3)


def test_a_network_that_pytorch_runs_faster_leaves_nothing_and_takes_away_what_was_there(
    exported: tuple[Path, str], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = exported
    assert (model / "refinement.onnx").exists()
    onnx_is(False, monkeypatch)
    code, said, _ = command("wsi", "segment", "export", model)
    assert code == 0
    assert "refinement.safetensors: torch (torch 1 s, onnxruntime 2 s a call" in said
    assert not (model / "refinement.onnx").exists()
    assert not is_exported(model)


def test_an_export_of_other_weights_is_not_used_and_the_way_out_is_said(
    exported: tuple[Path, str], tmp_path: Path
) -> None:
    model, _ = exported
    train([slide(tmp_path, seed) for seed in range(5)], config("picture", seed=5), tmp_path / "other")
    shutil.copy(model / "refinement.onnx", tmp_path / "other")
    segmenter = Segmenter.load(tmp_path / "other", device="cpu")
    (line,) = segmenter.said
    assert "refinement.onnx: is of other weights than refinement.safetensors; PyTorch is used" in line
    assert isinstance(segmenter._refiner, Refiner)


def test_a_damaged_export_is_not_used_and_a_run_says_so(
    exported: tuple[Path, str], tmp_path: Path, command: Any
) -> None:
    model, _ = exported
    (model / "refinement.onnx").write_bytes((model / "refinement.onnx").read_bytes()[:200])
    save_picture(tmp_path / "slides" / "a.png", 31)
    words = ("--model", model, "--slide-mpp", 1.0, "--device", "cpu")
    code, said, _ = command("wsi", "segment", "run", tmp_path / "slides", tmp_path / "out", *words)
    assert code == 0
    assert "refinement.onnx: " in said
    assert "PyTorch is used" in said


@pytest.mark.parametrize("words", [["model", "out.onnx"], ["model/model.json"]])
def test_a_folder_goes_alone_and_a_file_with_its_out(
    words: list[str], tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").touch()
    code, _, error = command("wsi", "segment", "export", *words)
    assert code == 2
    assert "give the folder of a model alone, or the file of one network and OUT" in error


def test_a_folder_that_is_no_model_is_one_line_and_exit_code_5(tmp_path: Path, command: Any) -> None:
    code, _, error = command("wsi", "segment", "export", tmp_path)
    assert code == 5
    assert error.startswith("MODEL_MISMATCH: ")
    assert "holds no whole model" in error
    assert error.count("\n") == 1
