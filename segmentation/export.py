"""Export: networks to ONNX, run by ONNX Runtime where that is faster than PyTorch and says the same."""

import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from features.encoder import Encoder
from segmentation.models import SegmentationModel, SegmentationOutput
from segmentation.saved import read_network
from wsi._files import write_atomically
from wsi.errors import EnvironmentFaultError, ModelMismatchError, UsageError

__all__ = [
    "TOLERANCE", "Choice", "OnnxBackbone", "OnnxRunner", "answering", "check_installed", "export_file", "fastest",
    "fastest_classifier", "to_onnx", "torch_runner",
]  # fmt: skip

TOLERANCE = 1e-3  # between the probabilities of the two

_Floats = NDArray[np.float32]
_OPSET = 18
_AT_ONCE = 4  # patches: 280 a second on two cores, against 225 with 16 at once, in a quarter of the memory
_SMALL_PX = 512**2
_FAULTS = (
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoSuchFile",
    "NotImplemented",
)  # of loading; not RuntimeErrors
_EXTRA = "pip install 'wsi-engine[onnx]'"


class OnnxRunner:
    """A network in ONNX Runtime on the CPU: float32 (B, C, h, w) → probabilities; h and w are those it was exported for.

    It takes a few pictures at once whatever the batch: more are slower, as they leave the processor's caches, and need memory.

    Attributes:
        facts: what was written with it.
    """

    def __init__(
        self, model: bytes | str | os.PathLike[str], *, threads: int | None = None, keep_memory: bool = True
    ) -> None:
        """Load a model, from its bytes or its file.

        Args:
            threads: by default as many as PyTorch uses.
            keep_memory: between calls; that is faster, and of pictures as large as a slide's it is much.

        Raises:
            EnvironmentFaultError: ONNX Runtime is not installed.
            ModelMismatchError: it cannot be loaded.
        """
        runtime = _load("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = keep_memory
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # slides are decoded at the same time
        state = runtime.capi.onnxruntime_pybind11_state
        faults = tuple(getattr(state, name) for name in _FAULTS)
        try:
            source = model if isinstance(model, bytes) else os.fspath(model)
            self._session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except (OSError, RuntimeError, *faults) as error:
            name = "the model" if isinstance(model, bytes) else model
            raise ModelMismatchError(f"{name}: ONNX Runtime cannot load it ({_first_line(error)})") from error
        self._input = self._session.get_inputs()[0].name
        self._shape = tuple(self._session.get_inputs()[0].shape[1:])
        self.facts: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map.get("wsi", "{}"))

    def __call__(self, x: _Floats) -> _Floats:
        if x.shape[1:] != self._shape:
            raise UsageError(f"the model was exported for (B, {', '.join(map(str, self._shape))}), not {x.shape}")
        x = np.ascontiguousarray(x, np.float32)
        parts = [x[at : at + _AT_ONCE] for at in range(0, len(x), _AT_ONCE)]
        return np.concatenate([self._session.run(None, {self._input: part})[0] for part in parts])


@dataclass(frozen=True, eq=False)
class Choice:
    """The fastest way to run a network, and what was measured.

    Attributes:
        runner: float32 input → probabilities.
        name: ``"torch"`` or ``"onnxruntime"``.
        seconds: of one call, the median, by name.
        why: one line to users.
        model: as ONNX, where that was chosen.
    """

    runner: Callable[[_Floats], _Floats]
    name: str
    seconds: Mapping[str, float] = field(hash=False)
    why: str
    model: bytes | None = field(default=None, repr=False)

    def __call__(self, x: _Floats) -> _Floats:
        return self.runner(x)


def answering(network: nn.Module) -> nn.Module:
    """The network with a softmax after it: from logits (B, K, …), or a ``SegmentationOutput``, to probabilities."""
    return _Answer(network).eval()


def torch_runner(module: nn.Module) -> Callable[[_Floats], _Floats]:
    """A module from one tensor to another in PyTorch, on the device it is on."""
    module.eval()

    @torch.inference_mode()
    def run(x: _Floats) -> _Floats:
        seen = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(_device_of(module))
        return np.asarray(module(seen).cpu().numpy())

    return run


def to_onnx(module: nn.Module, example: _Floats, facts: Mapping[str, Any] | None = None) -> bytes:
    """A module from float32 (B, C, h, w) to one tensor (B, …) as an ONNX model of any batch size; ``answering`` makes one.

    Args:
        example: (B, C, h, w) float32; h and w are fixed by it.
        facts: JSON values that are written with it, under ``wsi``.

    Raises:
        EnvironmentFaultError: the extra is not installed.
        ModelMismatchError: the module cannot be written as ONNX.
    """
    check_installed()
    device = _device_of(module)
    two = np.broadcast_to(
        np.asarray(example[:1], np.float32), (2, *example.shape[1:])
    ).copy()  # one would be a constant
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said), torch.inference_mode():
            warnings.simplefilter("ignore")  # the exporter's, of its own parts
            program = torch.onnx.export(
                module.eval(),
                (torch.from_numpy(two).to(device),),
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                input_names=["x"],
                output_names=["answer"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelMismatchError(f"the module cannot be written as ONNX ({_first_line(error)})") from error
    assert program is not None
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = "wsi", json.dumps(dict(facts or {}), sort_keys=True)
    return bytes(model.SerializeToString())


def fastest(
    network: nn.Module, example: _Floats, *, repeats: int = 3, facts: Mapping[str, Any] | None = None
) -> Choice:
    """What gives a network's probabilities in the least time on ``example`` (B, C, h, w), measured here and now.

    ONNX Runtime is left out where it is not installed, where the network is on a GPU, or where its probabilities differ from
    PyTorch's by more than 1e-3.

    Args:
        facts: JSON values that are written with the ONNX model.
    """
    return _fastest(answering(network), example, repeats, facts)


def fastest_classifier(
    encoder: Encoder, *, batch_size: int = _AT_ONCE, repeats: int = 3, facts: Mapping[str, Any] | None = None
) -> tuple[Encoder, Choice]:
    """The same for an encoder whose vectors are probabilities, as a patch classifier's are.

    Returns the encoder, or one that looks the same from outside and runs in ONNX Runtime, and what was measured.

    Raises:
        UsageError: the encoder pools tokens, or takes pixels as they are: its backbone does not give probabilities then.
    """
    spec = encoder.spec
    if spec.pooling != "pooled" or spec.input_px is None or encoder.precision != "fp32":
        raise UsageError(f"{spec.name}: only a backbone that gives probabilities by itself, in fp32, can be exchanged")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (batch_size, spec.input_px, spec.input_px, 3), np.uint8)
    example = encoder.prepare(torch.from_numpy(pixels).to(encoder.device)).cpu().numpy()
    choice = _fastest(encoder.backbone, example, repeats, facts)
    if not isinstance(choice.runner, OnnxRunner):
        return encoder, choice
    return Encoder(spec, OnnxBackbone(choice.runner), encoder.weights), choice


def _fastest(module: nn.Module, example: _Floats, repeats: int, facts: Mapping[str, Any] | None) -> Choice:
    of_torch = torch_runner(module)
    expected = of_torch(example)
    seconds = {"torch": _median_seconds(of_torch, example, repeats)}
    device = _device_of(module).type
    if device != "cpu":
        return Choice(of_torch, "torch", seconds, f"torch, as the network is on {device}")
    try:
        model = to_onnx(module, example, facts)
        of_onnx = OnnxRunner(model, keep_memory=example[0, 0].size <= _SMALL_PX)
    except (EnvironmentFaultError, ModelMismatchError) as error:
        return Choice(of_torch, "torch", seconds, f"torch, {seconds['torch']:.3g} s a call: {error}")
    differs = _difference(of_onnx(example), expected)
    if not differs <= TOLERANCE:
        return Choice(of_torch, "torch", seconds, f"torch: ONNX Runtime differs from it by {differs:.2g}")
    seconds["onnxruntime"] = _median_seconds(of_onnx, example, repeats)
    name = min(seconds, key=lambda key: seconds[key])
    told = ", ".join(f"{key} {value:.3g} s" for key, value in seconds.items())
    why = f"{name} ({told} a call; probabilities differ by {differs:.1g})"
    if name == "torch":
        return Choice(of_torch, name, seconds, why)
    return Choice(of_onnx, name, seconds, why, model)


def export_file(model: str | os.PathLike[str], out: str | os.PathLike[str]) -> Choice:
    """Write a saved refinement or dense network as ONNX, checked against PyTorch and timed.

    Raises:
        EnvironmentFaultError: the extra is not installed.
        ModelMismatchError: the file is none of ours, or ONNX Runtime says something else than PyTorch.
    """
    network, side_px, facts = _saved(Path(model))
    module = answering(network)
    example = np.random.default_rng(0).random((1, network.in_channels, side_px, side_px), np.float32)
    written = to_onnx(module, example, facts)
    of_torch, of_onnx = torch_runner(module), OnnxRunner(written)
    differs = _difference(of_onnx(example), of_torch(example))
    if not differs <= TOLERANCE:
        raise ModelMismatchError(f"{model}: ONNX Runtime differs from PyTorch by {differs:.2g}; nothing was written")
    write_atomically(Path(out), written)
    seconds = {name: _median_seconds(run, example, 3) for name, run in (("torch", of_torch), ("onnxruntime", of_onnx))}
    name = min(seconds, key=lambda key: seconds[key])
    told = ", ".join(f"{key} {value:.3g} s" for key, value in seconds.items())
    why = f"{name} is faster on {side_px} x {side_px} px ({told}); probabilities differ by {differs:.1g}"
    return Choice(of_onnx if name == "onnxruntime" else of_torch, name, seconds, why)


class _Answer(nn.Module):
    """Probabilities, whatever the network's output is called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x)
        logits: Tensor = output.logits if isinstance(output, SegmentationOutput) else output
        return logits.float().softmax(1)


class OnnxBackbone(nn.Module):
    """A model in ONNX Runtime in the place of a backbone."""

    def __init__(self, runner: OnnxRunner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.runner(images.numpy()))


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _saved(path: Path) -> tuple[SegmentationModel, int, dict[str, Any]]:
    """A saved network of either kind on the CPU, the side of what it sees, and its facts."""
    from segmentation.dense import DenseSegmenter
    from segmentation.refine import Refiner

    try:
        facts, _ = read_network(path, "refinement")
    except ModelMismatchError:
        facts, _ = read_network(path, "dense")
        dense = DenseSegmenter.load(path, device="cpu")
        return dense.network, dense.config.tile_px, {"kind": "dense", **facts}
    refiner = Refiner.load(path, device="cpu")
    return refiner.network, refiner.config.side_px, {"kind": "refinement", **facts}


def check_installed() -> None:
    """Raise ``EnvironmentFaultError`` where what writes and runs ONNX is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _load(name)


def _load(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentFaultError(f"ONNX needs {name}, which is not installed: {_EXTRA}") from error


def _median_seconds(run: Callable[[_Floats], _Floats], example: _Floats, repeats: int) -> float:
    times = []
    for _ in range(max(1, repeats)):
        start = time.perf_counter()
        run(example)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _difference(one: _Floats, other: _Floats) -> float:
    return float(np.abs(one - other).max()) if one.shape == other.shape else math.inf


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
