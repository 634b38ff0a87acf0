"""Encoder: uint8 tiles in, float32 vectors out; and EncoderSpec, the row of facts that makes one."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from features.custom import BACKBONES, did_you_mean, make_from_file
from features.weights import HubFile, WeightsRecord, draw_random, fetch, fit, read_state, state_sha256
from wsi.errors import DeviceError, MissingWeightsError, ModelMismatchError, UnknownEncoderError, UsageError

__all__ = [
    "Encoder",
    "EncoderRequest",
    "EncoderSpec",
    "build_encoder",
    "create_backbone",
    "known_encoders",
    "load_encoder",
    "resolve_device",
    "resolve_precision",
]

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INTERPOLATIONS = ("bilinear", "bicubic")
_POOLINGS = ("cls", "cls+mean", "mean", "pooled")
_KEY_LAYOUTS = ("timm", "hf_dinov2", "none")
_PROBE_PX = 224  # divides by the patch sizes in use: 7, 8, 14, 16, 32


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of one encoder: a row of facts, not a class.

    Attributes:
        name: the name it is asked for by, and its features are stored under.
        arch: name of a timm model, or of a backbone in ``features.custom``.
        dim: length of a vector.
        input_px: side of the square that the network sees; None for a backbone that takes uint8 tiles (B, H, W, 3) of
            any size as they are.
        resize_px: the shorter side of a tile becomes this before the centre is cut out; None for no resizing.
        tile_px: recommended side of a tile, in pixels at ``mpp``.
        mpp: recommended microns per pixel; None where nothing is recommended.
        pooling: ``"cls"`` the class token; ``"mean"`` the mean of the patch tokens, registers left out; ``"cls+mean"``
            both, in this order; ``"pooled"`` what the backbone itself returns.
        mean: of the pixels in training, R, G, B from 0 to 1.
        std: likewise.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.
        arch_kwargs: arguments for timm, JSON values only; ``mlp_layer`` is a name in ``timm.layers``.
        key_layout: names in the weights file, ``"timm"`` or ``"hf_dinov2"``; ``"none"`` for a backbone without weights.
        hub_id: Hugging Face repository; None where there is none.
        weights_file: file in that repository.
        revision: commit to take; None for the newest, where none is known to be the one.
        gated: whether the repository's terms must be accepted first.
        licence: of the weights.
        source: paper or address.
        notes: where readings differ, and what is not verified.
        aliases: other names.

    Raises:
        ValueError: a fact that cannot be.
    """

    name: str
    arch: str
    dim: int
    input_px: int | None
    resize_px: int | None
    tile_px: int
    mpp: float | None
    pooling: str
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: str = "bilinear"
    arch_kwargs: Mapping[str, str | int | float | bool] = field(default_factory=dict, hash=False)
    key_layout: str = "timm"
    hub_id: str | None = None
    weights_file: str | None = None
    revision: str | None = None
    gated: bool = False
    licence: str = "unknown"
    source: str = "unknown"
    notes: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or self.name != self.name.strip():
            raise ValueError(f"an encoder needs a name without blanks around it, got {self.name!r}")
        for what, value, choices in (
            ("interpolation", self.interpolation, _INTERPOLATIONS),
            ("pooling", self.pooling, _POOLINGS),
            ("key_layout", self.key_layout, _KEY_LAYOUTS),
        ):
            if value not in choices:
                raise ValueError(f"{self.name}: {what} is one of {', '.join(choices)}, got {value!r}")
        if self.dim < 1 or self.tile_px < 1:
            raise ValueError(f"{self.name}: dim and tile_px are at least 1, got {self.dim} and {self.tile_px}")
        if self.mpp is not None and not 0 < self.mpp < math.inf:
            raise ValueError(f"{self.name}: mpp must be positive, got {self.mpp}")
        if self.input_px is not None and self.input_px < 1:
            raise ValueError(f"{self.name}: input_px is at least 1, got {self.input_px}")
        if self.resize_px is not None and (self.input_px is None or self.resize_px < self.input_px):
            raise ValueError(
                f"{self.name}: resize_px is at least input_px, got {self.resize_px} and {self.input_px or 'none'}"
            )
        if self.input_px is None and self.pooling != "pooled":
            raise ValueError(f"{self.name}: a backbone that takes tiles as they are pools by itself")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(f"{self.name}: mean and std are three numbers, std positive, got {self.mean}, {self.std}")
        if (self.hub_id is None) != (self.weights_file is None):
            raise ValueError(f"{self.name}: hub_id and weights_file go together")
        json.dumps(self.arch_kwargs)  # a TypeError here names the value that cannot be saved with the result


@dataclass(frozen=True)
class EncoderRequest:
    """Which encoder is wanted, and how it is to run: what the user asks for.

    Attributes:
        name: a name or alias of ``known_encoders``, ``timm:<model>``, or ``path/to/file.py:callable``.
        weights: a weights file in place of the published one.
        random_seed: draw the weights from this seed: for tests of a pipeline, never for results.
        revision: commit, tag or branch on the hub in place of the row's.
        offline: use what is on this machine, never the network.
        device: ``"auto"`` (a GPU if there is one, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``. For a run over
            a cohort ``"cuda"`` is all GPUs, and names with commas between them are several, see ``features.devices``.
        precision: ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``; see ``resolve_precision``.
        compiled: have ``torch.compile`` make the network faster; takes a minute at the start, and a C++ compiler.

    Raises:
        UsageError: the wishes contradict each other.
    """

    name: str
    weights: Path | None = None
    random_seed: int | None = None
    revision: str | None = None
    offline: bool = False
    device: str = "auto"
    precision: str = "auto"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and self.random_seed is not None:
            raise UsageError(f"{self.name}: weights from {self.weights} and random weights exclude each other")
        if self.revision is not None and (self.weights is not None or self.random_seed is not None):
            raise UsageError(f"{self.name}: a revision is one of the hub, it goes with neither file nor random seed")
        if self.random_seed is not None and not 0 <= self.random_seed < 2**63:
            raise UsageError(f"{self.name}: a random seed is a whole number from 0, got {self.random_seed}")
        if self.precision not in ("auto", *_DTYPES):
            raise UsageError(f"no precision {self.precision!r}; choose auto, {', '.join(_DTYPES)}")


class Encoder(nn.Module):
    """One encoder, ready to run: pixels to vectors.

    ``forward`` takes uint8 tiles (B, H, W, 3) on any device and gives float32 vectors (B, dim) on the encoder's device.

    Pixels are prepared on the device: antialiased resize of the shorter side to ``spec.resize_px`` (skipped where it
    has that size), centre cut out to ``spec.input_px``, scaled to 0..1, normalised; all as torchvision does it with a
    uint8 tensor, and in float32 whatever the precision, with one cast at the end. The references do the same with
    torchvision on a PIL image. What differs:

    - On the CPU, torchvision resamples bytes in fixed point as PIL does: about 0.5 % of the values differ by 1 of 255.
      On a GPU it resamples in float32 and rounds once, where PIL rounds after each direction: about 20 % of the values
      differ by 1 of 255 (by up to 3 at the sharpest edges with bicubic). Tiles that have the right size do not differ.
    - Scaling multiplies by 1/255 where PIL's path divides by 255: the last bit of a float32.
    - Autocast is not used: the weights are cast once and all layers run in that type.

    On a GPU, "fp32" leaves PyTorch's own switches alone; by its defaults convolutions may use TensorFloat-32.

    Attributes:
        spec: the facts.
        weights: where the weights came from.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        spec: EncoderSpec,
        backbone: nn.Module,
        weights: WeightsRecord | None = None,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        """Take over ``backbone``: it is cast, moved and frozen in place.

        Args:
            spec: the facts.
            backbone: normalised float (B, 3, input_px, input_px) to tokens or vectors, see ``EncoderSpec.pooling``; or
                uint8 (B, H, W, 3) to float (B, dim) where ``spec.input_px`` is None.
            weights: where its weights came from; by default from the caller's own code.
            device: where it runs.
            precision: type of weights and activations.
            compiled: run the network through ``torch.compile``.

        Raises:
            UsageError: the precision is not for this encoder, or there is nothing to compile.
        """
        super().__init__()
        if spec.input_px is None and precision != "fp32":
            raise UsageError(f"{spec.name}: takes pixels as they are and computes in its own precision; ask for fp32")
        if spec.input_px is None and compiled:
            raise UsageError(f"{spec.name}: takes pixels as they are, there is no network to compile")
        self.spec = spec
        self.weights = weights or WeightsRecord("plugin", state_sha256(backbone.state_dict()))
        self.precision = precision
        self.compiled = compiled
        self._network: Callable[[Tensor], Any] = torch.compile(self.pool) if compiled else self.pool
        self.backbone = backbone.eval().requires_grad_(False)
        self.backbone.to(device=device, dtype=_DTYPES[precision])
        if spec.input_px is not None:
            self.backbone.to(memory_format=torch.channels_last)
        if precision == "fp16" and not all(bool(p.isfinite().all()) for p in self.backbone.parameters()):
            raise UsageError(f"{spec.name}: its weights go beyond the range of fp16; ask for bf16 or fp32")
        for name, values in (("_mean", spec.mean), ("_std", spec.std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1), persistent=False)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.spec.dim

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._mean.device

    @property
    def weights_sha256(self) -> str | None:
        """Digest of the weights, see ``weights.state_sha256``; None for an encoder that has none."""
        return self.weights.sha256

    @property
    def transform(self) -> dict[str, Any]:
        """How pixels are prepared, as JSON values."""
        if self.spec.input_px is None:
            return {"input_px": None}
        return {
            "resize_px": self.spec.resize_px,
            "interpolation": self.spec.interpolation,
            "antialias": True,
            "crop": "centre",
            "input_px": self.spec.input_px,
            "mean": list(self.spec.mean),
            "std": list(self.spec.std),
        }

    @property
    def transform_sha256(self) -> str:
        """Digest of ``transform``."""
        return hashlib.sha256(json.dumps(self.transform, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors, as JSON values; two encoders with equal identities give equal features.

        Neither file nor commit is part of it: the same tensors are the same encoder wherever they came from.
        """
        return {
            "name": self.spec.name,
            "arch": self.spec.arch,
            "arch_kwargs": dict(self.spec.arch_kwargs),
            "pooling": self.spec.pooling,
            "dim": self.dim,
            "transform": self.transform,
            "transform_sha256": self.transform_sha256,
            "weights_sha256": self.weights_sha256,
            "code_sha256": self.weights.code_sha256,
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights came from and how they were fitted, as JSON values: to read, not to compare."""
        return {
            "hub_id": self.spec.hub_id,
            "weights_file": self.spec.weights_file,
            "revision": self.weights.revision,
            "weights_source": self.weights.source,
            "weights_notes": list(self.weights.notes),
            "random_seed": self.weights.random_seed,
            "licence": self.spec.licence,
            "source": self.spec.source,
            "device": str(self.device),
            "precision": self.precision,
            "compiled": self.compiled,
        }

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → normalised float32 (B, 3, input_px, input_px), channels last in memory."""
        from torchvision.transforms.v2 import functional as tv  # slow to import, like timm

        resize_px, input_px = self.spec.resize_px, self.spec.input_px
        images: Tensor = pixels.permute(0, 3, 1, 2)  # (B, 3, H, W); strides are those of channels_last
        if resize_px is not None:
            images = tv.resize(images, [resize_px], tv.InterpolationMode(self.spec.interpolation), antialias=True)
        if min(images.shape[2:]) < (input_px or 0):
            raise UsageError(f"{self.spec.name}: sees {input_px} px, more than tiles of {tuple(pixels.shape[1:3])}")
        images = tv.center_crop(images, [input_px, input_px])
        images = images.to(torch.float32)
        return images.mul_(1 / 255).sub_(self._mean).div_(self._std)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → float32 (B, dim).

        Raises:
            UsageError: other pixels than that, or tiles smaller than the network's input.
            ModelMismatchError: the backbone returns something else than vectors of length ``dim``.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise UsageError(f"{self.spec.name}: wants uint8 (B, H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}")
        pixels = pixels.to(self.device)
        if self.spec.input_px is None:
            vectors = self.backbone(pixels)
        else:
            vectors = self._network(self.prepare(pixels).to(_DTYPES[self.precision]))
        return _checked(vectors, (len(pixels), self.dim), self.spec.name).to(torch.float32)

    def pool(self, images: Tensor) -> Any:
        """Normalised images in the backbone's own type, as ``prepare`` makes them, → (B, dim) in that type."""
        if self.spec.pooling == "pooled":
            return self.backbone(images)
        backbone: Any = self.backbone
        tokens = backbone.forward_features(images)  # (B, prefix + patches, C)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            raise ModelMismatchError(
                f"{self.spec.name}: {self.spec.arch} gives no tokens; its pooling must be 'pooled'"
            )
        first = tokens[:, 0]  # (B, C)
        if self.spec.pooling == "cls":
            return first
        patches = tokens[:, backbone.num_prefix_tokens :].mean(1, dtype=torch.float32)  # (B, C)
        return patches if self.spec.pooling == "mean" else torch.cat([first.float(), patches], dim=1)


def known_encoders() -> list[EncoderSpec]:
    """The rows of the zoo, in its order."""
    from features.zoo import ZOO  # a row is made of EncoderSpec, so the zoo imports this file

    return list(ZOO.values())


def load_encoder(request: EncoderRequest) -> Encoder:
    """The encoder asked for, with its weights, on its device.

    Raises:
        UnknownEncoderError: no encoder of this name; says which come close.
        MissingWeightsError: the weights are not here and cannot be fetched; says exactly what to fetch.
        ModelMismatchError: the weights are damaged or another model's.
        UnsafePickleError: the weights file would run code.
        DeviceError: the device is not there.
        UsageError: what is asked makes no sense for this encoder.
    """
    path, _, attribute = request.name.rpartition(":")
    if path.endswith(".py"):
        return _load_plugin(Path(path), attribute, request)
    return build_encoder(_find_spec(request.name), request)


def build_encoder(spec: EncoderSpec, request: EncoderRequest) -> Encoder:
    """The encoder of a row of facts, with the weights, device and precision of ``request``; its name is not looked at.

    Raises:
        Error: as ``load_encoder``.
    """
    device = resolve_device(request.device)
    precision = _precision_of(spec, request, device)
    backbone, record = _load_backbone(spec, request)
    named = replace(spec, name=_stored_name(spec, request, record))
    return Encoder(named, backbone, record, device=device, precision=precision, compiled=request.compiled)


def _stored_name(spec: EncoderSpec, request: EncoderRequest, record: WeightsRecord) -> str:
    """What features are stored under: random weights never pass for trained ones, nor a file's for timm's own."""
    name = request.name if spec.name.startswith("timm:") and record.source != "hub" else spec.name
    return f"{name}+random{record.random_seed}" if record.source == "random" else name


def resolve_device(name: str) -> torch.device:
    """The device of this name, or the best one for ``"auto"``: the first GPU, else the CPU.

    Raises:
        DeviceError: it is not there. The CPU is never taken in its place.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise DeviceError(f"no device {name!r}; choose auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= n:
            raise DeviceError(f"{name}: this machine shows PyTorch {n} CUDA devices; choose --device cpu or auto")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("mps: this machine has no Metal device; choose --device cpu or auto")
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision of this name; for ``"auto"`` bf16 on a GPU that has it, fp16 on other GPUs, fp32 elsewhere."""
    if name != "auto":
        return name  # type: ignore[return-value]  # checked by EncoderRequest
    if device.type != "cuda":
        return "fp32"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _precision_of(spec: EncoderSpec, request: EncoderRequest, device: torch.device) -> Precision:
    if spec.input_px is None and request.precision == "auto":
        return "fp32"
    return resolve_precision(request.precision, device)


def _find_spec(name: str) -> EncoderSpec:
    from features.zoo import ALIASES, ZOO  # see known_encoders

    if name.startswith("timm:"):
        return _timm_spec(name.removeprefix("timm:"))
    wanted = name.lower()
    wanted = ALIASES.get(wanted, wanted)
    if wanted not in ZOO:
        raise UnknownEncoderError(
            f"no encoder {name!r}{did_you_mean(wanted, ZOO)}; there are {', '.join(ZOO)}; "
            f"timm:MODEL for any model of timm, FILE.py:NAME for one of your own"
        )
    return ZOO[wanted]


def _timm_spec(model: str) -> EncoderSpec:
    """The facts of any timm model, as timm itself states them."""
    import timm  # takes seconds

    if not timm.is_model(model) or not _timm_has_tag(model):
        close = did_you_mean(model, timm.list_models(pretrained=True) + timm.list_models())
        raise UnknownEncoderError(f"timm {timm.__version__} has no model {model!r}{close}; see timm.list_models()")
    with torch.device("meta"):
        backbone = timm.create_model(model, pretrained=False, num_classes=0)
    cfg = backbone.pretrained_cfg
    data = timm.data.resolve_model_data_config(backbone)
    channels, height, width = data["input_size"]
    if channels != 3 or height != width or data["interpolation"] not in _INTERPOLATIONS:
        raise UnknownEncoderError(
            f"timm:{model}: wants {channels} x {height} x {width}, {data['interpolation']}; only square RGB input with "
            f"{' or '.join(_INTERPOLATIONS)} interpolation is known here"
        )
    hub_id = cfg.get("hf_hub_id")
    full_name = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]
    return EncoderSpec(
        name=f"timm:{full_name}",
        arch=full_name,
        dim=getattr(backbone, "head_hidden_size", None) or backbone.num_features,
        input_px=height,
        resize_px=max(height, math.floor(height / data["crop_pct"])),
        tile_px=height,
        mpp=None,
        pooling="pooled",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        hub_id=hub_id,
        weights_file=(cfg.get("hf_hub_filename") or "model.safetensors") if hub_id else None,
        licence=cfg.get("license") or "unknown",
        source=f"https://huggingface.co/{hub_id}" if hub_id else "timm",
    )


def _timm_has_tag(model: str) -> bool:
    import timm

    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError:  # how timm says that the model is known and its tag is not
        return False
    return True


def create_backbone(spec: EncoderSpec) -> nn.Module:
    """The backbone of a row, with whatever weights it is born with."""
    if spec.arch in BACKBONES:
        return BACKBONES[spec.arch]()
    import timm  # takes seconds

    kwargs = dict(spec.arch_kwargs)
    layers = {"mlp_layer": getattr(timm.layers, str(kwargs.pop("mlp_layer")))} if "mlp_layer" in kwargs else {}
    backbone: nn.Module = timm.create_model(spec.arch, pretrained=False, num_classes=0, **kwargs, **layers)
    return backbone


def _load_backbone(spec: EncoderSpec, request: EncoderRequest) -> tuple[nn.Module, WeightsRecord]:
    if spec.key_layout == "none":
        if request.weights is not None or request.random_seed is not None or request.revision is not None:
            raise UsageError(f"{spec.name}: has no weights, so there are none to choose")
        return create_backbone(spec), WeightsRecord("none")
    if request.random_seed is not None:
        return _draw(spec, request.random_seed)
    if request.weights is not None:
        return _fitted(spec, request.weights, "file", None)
    if spec.hub_id is None or spec.weights_file is None:
        raise MissingWeightsError(f"{spec.name}: no weights of it are on the Hugging Face hub; pass --weights FILE")
    file = HubFile(spec.hub_id, spec.weights_file, request.revision or spec.revision, spec.gated)
    path, commit = fetch(file, offline=request.offline)
    return _fitted(spec, path, "hub", commit)


def _fitted(
    spec: EncoderSpec, path: Path, source: Literal["hub", "file"], revision: str | None
) -> tuple[nn.Module, WeightsRecord]:
    state, read_notes = read_state(path)
    with torch.device("meta"):  # the random weights a model is born with would take longer than reading the file
        backbone = create_backbone(spec)
    state, fit_notes = fit(state, backbone, layout=spec.key_layout, where=path)
    if any(key not in state and buffer.is_meta for key, buffer in backbone.named_buffers()):
        backbone = create_backbone(spec)  # has tables that it computes itself and no file holds
    backbone.load_state_dict(state, strict=True, assign=True)
    return backbone, WeightsRecord(source, state_sha256(state), revision, notes=(*read_notes, *fit_notes))


def _draw(spec: EncoderSpec, seed: int) -> tuple[nn.Module, WeightsRecord]:
    """Random weights, the same for the same seed; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        backbone = create_backbone(spec)
        draw_random(backbone)
    return backbone, WeightsRecord("random", state_sha256(backbone.state_dict()), random_seed=seed)


def _load_plugin(path: Path, attribute: str, request: EncoderRequest) -> Encoder:
    """What ``attribute()`` of the user's file makes: an Encoder, or a module from uint8 tiles to vectors."""
    name = f"{path.name}:{attribute}"
    if request.weights is not None or request.random_seed is not None or request.revision is not None:
        raise UsageError(f"{name}: brings its own weights, so there are none to choose")
    device = resolve_device(request.device)
    code_sha256, made = make_from_file(path, attribute)
    if isinstance(made, Encoder):
        spec, backbone, record = made.spec, made.backbone, made.weights
    elif isinstance(made, nn.Module):
        spec, backbone = _plugin_spec(name, made), made
        record = WeightsRecord("plugin", state_sha256(made.state_dict()))
    else:
        raise ModelMismatchError(f"{path}: {attribute}() makes a {type(made).__name__}, neither Encoder nor nn.Module")
    record = replace(record, code_sha256=code_sha256)
    precision = _precision_of(spec, request, device)
    return Encoder(spec, backbone, record, device=device, precision=precision, compiled=request.compiled)


def _plugin_spec(name: str, module: nn.Module) -> EncoderSpec:
    """The facts of a module that takes uint8 tiles; how long its vectors are is found by running it once."""
    with torch.inference_mode():
        probe = module.eval()(torch.full((1, _PROBE_PX, _PROBE_PX, 3), 128, dtype=torch.uint8))
    dim = probe.shape[-1] if isinstance(probe, Tensor) and probe.ndim == 2 else 1
    return EncoderSpec(
        name=name,
        arch=type(module).__qualname__,
        dim=_checked(probe, (1, dim), name).shape[1],
        input_px=None,
        resize_px=None,
        tile_px=_PROBE_PX,
        mpp=None,
        pooling="pooled",
        licence="the user's own",
        source="the user's own code",
    )


def _checked(vectors: object, shape: tuple[int, int], name: str) -> Tensor:
    if not isinstance(vectors, Tensor) or vectors.shape != shape or not vectors.is_floating_point():
        got = f"{vectors.dtype} {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ModelMismatchError(f"{name}: gives {got} where float {shape} is expected")
    return vectors
