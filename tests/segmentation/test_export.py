"""Export: ONNX Runtime says what PyTorch says, the faster one is taken, and what is missing is said in one line."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from cli.segment import segment
from features.encoder import Encoder, EncoderSpec
from features.runner import EncoderRunner
from segmentation import export
from segmentation.dense import DenseConfig, DenseSegmenter
from segmentation.export import OnnxRunner, answering, export_file, fastest, fastest_classifier, to_onnx, torch_runner
from segmentation.models import build_network
from segmentation.refine import RefineConfig, Refiner
from wsi.errors import EnvironmentFaultError, ModelMismatchError, UsageError

NETWORKS = ("u-net", "dagu-net", "dru-net")  # what AGU-Net is made of is in DAGU-Net
WITH_EXTRA = ("onnx", "onnxscript", "onnxruntime")


def needs_extra() -> None:
    for name in WITH_EXTRA:
        pytest.importorskip(name, reason="the extra onnx is not installed")


def picture(batch: int = 1, side: int = 24, channels: int = 4) -> np.ndarray:
    return np.random.default_rng(0).random((batch, channels, side, side), np.float32)


def trained(name: str) -> nn.Module:
    """As after some training: running means that are not 0 and 1."""
    torch.manual_seed(0)
    network = build_network(name, 4, 3, filters=(4, 6, 8))
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.rand(2, 4, 32, 32) * 2)
    return network.eval()


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x).mean((2, 3))
        return logits


def delayed(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def slow(*args: Any) -> np.ndarray:
        time.sleep(0.2)
        return run(*args)

    return slow


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_says_what_pytorch_says_for_any_batch(name: str) -> None:
    needs_extra()
    network = trained(name)
    runner = OnnxRunner(to_onnx(answering(network), picture(side=20), {"classes": ["a", "b"]}))
    assert runner.facts == {"classes": ["a", "b"]}
    for batch in (1, 3):
        x = picture(batch, 20)
        expected = torch_runner(answering(network))(x)
        np.testing.assert_allclose(runner(x), expected, atol=1e-3)
        np.testing.assert_allclose(expected.sum(1), 1, atol=1e-5)
    assert np.ptp(expected) > 0.1


def test_a_classifiers_logits_become_probabilities_too() -> None:
    needs_extra()
    network = Slow()
    x = picture(5)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).softmax(1).numpy()
    np.testing.assert_allclose(OnnxRunner(to_onnx(answering(network), x))(x), expected, atol=1e-5)
    np.testing.assert_allclose(torch_runner(answering(network))(x), expected, atol=1e-6)


def test_the_faster_one_is_taken_and_what_was_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_extra()
    network, x = Slow(), picture()
    real = export.torch_runner

    monkeypatch.setattr(export, "torch_runner", lambda network: delayed(real(network)))
    choice = fastest(network, x)
    assert choice.name == "onnxruntime"
    assert choice.seconds["torch"] > 0.2 > choice.seconds["onnxruntime"]
    assert choice.why.startswith("onnxruntime (torch 0.2")
    np.testing.assert_allclose(choice(x), real(answering(network))(x), atol=1e-5)
    call = OnnxRunner.__call__
    monkeypatch.setattr(export, "torch_runner", real)
    monkeypatch.setattr(OnnxRunner, "__call__", delayed(call))
    assert fastest(network, x).name == "torch"


def test_a_runner_that_says_something_else_is_never_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_extra()
    call = OnnxRunner.__call__
    monkeypatch.setattr(OnnxRunner, "__call__", lambda self, x: call(self, x) + np.float32(0.002))
    choice = fastest(Slow(), picture())
    assert choice.name == "torch"
    assert choice.why == "torch: ONNX Runtime differs from it by 0.002"
    saved = _refiner(tmp_path)
    with pytest.raises(ModelMismatchError, match=r"differs from PyTorch by 0\.002; nothing was written"):
        export_file(saved, tmp_path / "r.onnx")
    assert not (tmp_path / "r.onnx").exists()


def _refiner(folder: Path) -> Path:
    config = RefineConfig(("tumour",), hyper={"filters": (4, 8), "norm": "batch"}, side_px=16)
    Refiner.untrained(config, device="cpu").save(folder / "r.safetensors")
    return folder / "r.safetensors"


def test_saved_networks_of_both_kinds_are_exported_by_the_verb(tmp_path: Path) -> None:
    needs_extra()
    saved = _refiner(tmp_path)
    result = CliRunner().invoke(segment, ["export", str(saved), str(tmp_path / "r.onnx")], standalone_mode=False)
    assert result.exception is None, result.output
    assert "is faster on 16 x 16 px (torch" in result.output
    runner = OnnxRunner(tmp_path / "r.onnx")
    assert runner.facts["kind"] == "refinement"
    assert runner.facts["config"]["classes"] == ["tumour"]
    x = picture(2, 16)
    np.testing.assert_allclose(runner(x), Refiner.load(saved, device="cpu").predict(x), atol=1e-3)
    dense = DenseSegmenter.untrained(
        DenseConfig(("a",), tile_px=16, overlap_px=4, hyper={"filters": (4, 8)}), device="cpu"
    )
    dense.save(tmp_path / "d.safetensors")
    export_file(tmp_path / "d.safetensors", tmp_path / "d.onnx")
    with pytest.raises(UsageError, match=r"exported for \(B, 4, 16, 16\), not \(1, 4, 24, 24\)"):
        runner(picture())
    x = picture(2, 16, 3)
    np.testing.assert_allclose(OnnxRunner(tmp_path / "d.onnx")(x), dense.predict(x), atol=1e-3)


class Probable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x).mean((2, 3)).softmax(1)
        return answer


def test_a_classifier_in_onnx_runtime_looks_the_same_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_extra()
    torch.manual_seed(0)
    spec = EncoderSpec("c", "c", 2, 16, 16, 16, 1.0, "pooled", mean=(0.7, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    encoder = Encoder(spec, Probable())
    real = export.torch_runner
    monkeypatch.setattr(export, "torch_runner", lambda module: delayed(real(module)))
    faster, choice = fastest_classifier(encoder, batch_size=4)
    assert choice.name == "onnxruntime"
    assert faster.identity == encoder.identity
    pixels = np.random.default_rng(1).integers(0, 256, (5, 20, 24, 3), np.uint8)  # resized and cut, as the encoder does
    expected = EncoderRunner(encoder).encode(pixels).vectors
    np.testing.assert_allclose(EncoderRunner(faster).encode(pixels).vectors, expected, atol=1e-3)
    assert np.ptp(expected[:, 0]) > 1e-3
    monkeypatch.setattr(export, "torch_runner", real)
    call = OnnxRunner.__call__
    monkeypatch.setattr(OnnxRunner, "__call__", delayed(call))
    assert fastest_classifier(encoder, batch_size=4)[0] is encoder
    with pytest.raises(UsageError, match="c: only a backbone that gives probabilities"):
        fastest_classifier(Encoder(EncoderSpec("c", "c", 2, 16, 16, 16, 1.0, "cls"), Probable()))


def test_without_the_extra_there_is_one_clear_line_and_pytorch_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in WITH_EXTRA:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(
        EnvironmentFaultError, match=r"ONNX needs onnx, which is not installed: pip install 'wsi-engine\[onnx\]'"
    ):
        export_file(_refiner(tmp_path), tmp_path / "r.onnx")
    with pytest.raises(EnvironmentFaultError, match="ONNX needs onnxruntime"):
        OnnxRunner(b"")
    choice = fastest(Slow(), picture())
    assert choice.name == "torch"
    assert "pip install 'wsi-engine[onnx]'" in choice.why
    assert "\n" not in choice.why


def test_what_is_no_model_is_said_by_name(tmp_path: Path) -> None:
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(ModelMismatchError, match=r"no\.safetensors: cannot be used as a network"):
        export_file(tmp_path / "no.safetensors", tmp_path / "r.onnx")
    needs_extra()
    (tmp_path / "no.onnx").write_bytes(b"no")
    for path in (tmp_path / "no.onnx", tmp_path / "none.onnx"):
        with pytest.raises(ModelMismatchError, match=rf"{path.name}: ONNX Runtime cannot load it"):
            OnnxRunner(path)
