"""Encoder: pixels are prepared as torchvision does, and a batch comes through whatever happens to it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from features.encoder import (
    Encoder,
    EncoderRequest,
    EncoderSpec,
    build_encoder,
    create_backbone,
    load_encoder,
    resolve_device,
    resolve_precision,
)
from features.runner import EncoderRunner
from features.weights import state_sha256
from features.zoo import ZOO
from wsi.errors import DeviceError, MissingWeightsError, ModelMismatchError, UnknownEncoderError, UsageError

SPEC = EncoderSpec(
    name="small",
    arch="vit_tiny_patch16_224",
    arch_kwargs={
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "reg_tokens": 2,
        "init_values": 1e-5,
        "mlp_layer": "SwiGLUPacked",
        "act_layer": "silu",
    },
    dim=24,
    input_px=32,
    resize_px=36,
    tile_px=40,
    mpp=0.5,
    mean=(0.7, 0.5, 0.6),
    std=(0.2, 0.3, 0.25),
    interpolation="bicubic",
    pooling="cls",
    hub_id="owner/small",
    weights_file="model.safetensors",
)
ON_CPU = EncoderRequest("small", device="cpu", random_seed=0)


class Stub(nn.Module):
    """A backbone from the prepared pixels to vectors, or tokens, by a given function; it remembers its batch sizes."""

    num_prefix_tokens = 3

    def __init__(self, compute: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.compute = compute
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Any:
        self.sizes.append(len(images))
        return self.compute(images)

    forward_features = forward


def stub(compute: Callable[[Tensor], Any], **facts: Any) -> Encoder:
    merged: dict[str, Any] = {"dim": 3, "pooling": "pooled", "resize_px": None, "input_px": 4} | facts
    return Encoder(replace(SPEC, **merged), Stub(compute))


def tiles(n: int, height: int = 40, width: int = 40, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def encoded(encoder: Encoder, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.inference_mode():
        vectors: NDArray[np.float32] = encoder(torch.from_numpy(pixels)).numpy()
    return vectors


# ---- facts


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"name": " uni"}, "blanks"),
        ({"dim": 0}, "got 0"),
        ({"tile_px": 0}, "and 0"),
        ({"resize_px": 31}, "resize_px is at least input_px, got 31 and 32"),
        ({"input_px": 0, "resize_px": None}, "input_px is at least 1, got 0"),
        ({"input_px": None, "resize_px": None}, "pools by itself"),
        ({"input_px": None}, "got 36 and none"),
        ({"mpp": 0.0}, "mpp must be positive, got 0.0"),
        ({"std": (0.2, 0.0, 0.2)}, "std positive"),
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"interpolation": "nearest"}, "bilinear, bicubic, got 'nearest'"),
        ({"pooling": "max"}, "got 'max'"),
        ({"key_layout": "hf"}, "got 'hf'"),
        ({"weights_file": None}, "go together"),
    ],
)
def test_facts_that_cannot_be_are_refused_with_the_number(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SPEC, **facts)


def test_facts_that_cannot_be_saved_are_refused() -> None:
    with pytest.raises(TypeError, match="JSON"):
        replace(SPEC, arch_kwargs={"act_layer": nn.GELU})  # type: ignore[dict-item]  # that is the mistake


@pytest.mark.parametrize(
    "wishes",
    [
        {"weights": Path("w.pt"), "random_seed": 0},
        {"weights": Path("w.pt"), "revision": "main"},
        {"random_seed": 0, "revision": "main"},
        {"random_seed": -1},
        {"precision": "fp8"},
    ],
)
def test_wishes_that_contradict_each_other_are_refused(wishes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EncoderRequest("uni", **wishes)


# ---- pixels


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(20, 90),
    width=st.integers(20, 90),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    input_px=st.integers(8, 40),
    margin=st.integers(0, 20),
)
def test_pixels_are_prepared_exactly_as_torchvision_does(
    height: int, width: int, interpolation: str, input_px: int, margin: int
) -> None:
    spec = replace(SPEC, input_px=input_px, resize_px=input_px + margin, interpolation=interpolation)
    pixels = torch.from_numpy(tiles(2, height, width))
    reference = v2.Compose(
        [
            v2.Resize(input_px + margin, interpolation=v2.InterpolationMode(interpolation), antialias=True),
            v2.CenterCrop(input_px),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec.mean, spec.std),
        ]
    )
    prepared = Encoder(spec, nn.Identity()).prepare(pixels)
    assert torch.equal(prepared, reference(pixels.permute(0, 3, 1, 2)))
    assert prepared.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_the_references_path_over_pil_to_a_grey_level(interpolation: str) -> None:
    smooth = np.asarray(Image.fromarray(tiles(1, 24, 24)[0]).resize((256, 256), Image.Resampling.BICUBIC))
    grain = np.random.default_rng(1).normal(0, 6, smooth.shape)
    tile = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    spec = replace(SPEC, input_px=224, resize_px=230, interpolation=interpolation)
    reference = v2.Compose(
        [
            v2.Resize(230, interpolation=v2.InterpolationMode(interpolation)),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec.mean, spec.std),
        ]
    )
    ours = Encoder(spec, nn.Identity()).prepare(torch.from_numpy(tile[None]))[0]
    levels = (ours - reference(Image.fromarray(tile))).abs() * torch.tensor(spec.std).view(3, 1, 1) * 255
    assert levels.mean() < 0.3
    assert levels.quantile(0.99) < 1.01
    assert levels.max() < 4


def test_a_tile_of_the_right_size_is_not_resampled() -> None:
    spec = replace(SPEC, input_px=32, resize_px=32)
    pixels = tiles(1, 32, 32)
    prepared = Encoder(spec, nn.Identity()).prepare(torch.from_numpy(pixels)) * torch.tensor(spec.std).view(3, 1, 1)
    back = (prepared + torch.tensor(spec.mean).view(3, 1, 1)) * 255
    assert np.array_equal(back.round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), pixels)


def test_without_resizing_the_centre_is_seen_and_a_smaller_tile_refused() -> None:
    seen = stub(lambda images: images.mean((2, 3)), input_px=4)
    pixels = np.zeros((1, 10, 10, 3), np.uint8)
    pixels[:, 3:7, 3:7] = 255
    assert encoded(seen, pixels)[0] == pytest.approx((1 - np.array(SPEC.mean)) / np.array(SPEC.std), rel=1e-6)
    with pytest.raises(UsageError, match=r"sees 4 px, more than tiles of \(3, 9\)"):
        encoded(seen, tiles(1, 3, 9))


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(2, 40, 40, 3),
        torch.zeros(40, 40, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 40, 40, dtype=torch.uint8),
    ],
    ids=["floats", "one tile", "channels first"],
)
def test_other_pixels_than_rgb_bytes_are_refused(pixels: Tensor) -> None:
    with pytest.raises(UsageError, match=r"wants uint8 \(B, H, W, 3\)"):
        build_encoder(SPEC, ON_CPU)(pixels)


# ---- vectors


def test_the_class_token_is_what_timm_itself_would_return() -> None:
    encoder = build_encoder(SPEC, ON_CPU)
    pixels = tiles(3)
    with torch.inference_mode():
        expected = encoder.backbone(encoder.prepare(torch.from_numpy(pixels)))
    assert np.allclose(encoded(encoder, pixels), expected.numpy(), atol=1e-6)


def test_pooling_takes_the_tokens_it_names_and_leaves_registers_out() -> None:
    tokens = torch.arange(2 * 7 * 4, dtype=torch.float32).view(2, 7, 4)  # class, two registers, four patches
    first, patches = tokens[:, 0].numpy(), tokens[:, 3:].mean(1).numpy()
    pixels = tiles(2, 4, 4)
    for pooling, expected in {
        "cls": first,
        "mean": patches,
        "cls+mean": np.concatenate([first, patches], axis=1),
    }.items():
        encoder = stub(lambda _: tokens, pooling=pooling, dim=expected.shape[1])
        assert np.array_equal(encoded(encoder, pixels), expected), pooling


@pytest.mark.parametrize(
    ("returned", "pooling", "said"),
    [
        (torch.zeros(2, 4), "pooled", r"gives torch.float32 \(2, 4\) where float \(2, 3\)"),
        (torch.zeros(2, 3, 1), "pooled", r"\(2, 3, 1\)"),
        (torch.zeros(2, 3, dtype=torch.int64), "pooled", "int64"),
        ((torch.zeros(2, 3),), "pooled", "gives tuple"),
        (torch.zeros(2, 3, 4, 4), "cls", "gives no tokens"),
    ],
)
def test_a_backbone_that_returns_something_else_is_a_mismatch(returned: object, pooling: str, said: str) -> None:
    with pytest.raises(ModelMismatchError, match=said):
        encoded(stub(lambda _: returned, pooling=pooling), tiles(2, 4, 4))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_casts_the_weights_and_stays_close(precision: str) -> None:
    full, half = (build_encoder(SPEC, replace(ON_CPU, precision=name)) for name in ("fp32", precision))
    assert {p.dtype for p in half.backbone.parameters()} == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    expected, vectors = encoded(full, tiles(4)), encoded(half, tiles(4))
    assert vectors.dtype == np.float32
    error = np.abs(vectors - expected).max() / expected.std()
    assert 1e-5 < error < 0.1
    assert half.identity == full.identity


def test_weights_that_fp16_cannot_hold_are_refused() -> None:
    layer = nn.Linear(3, 3)
    nn.init.constant_(layer.weight, 1e5)
    with pytest.raises(UsageError, match="beyond the range of fp16"):
        Encoder(replace(SPEC, pooling="pooled"), layer, precision="fp16")


# ---- weights


def test_random_weights_come_from_their_seed_and_leave_the_callers_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (build_encoder(SPEC, replace(ON_CPU, random_seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert one.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert np.array_equal(encoded(one, tiles(2)), encoded(again, tiles(2)))
    assert one.provenance["weights_source"] == "random"
    assert one.provenance["random_seed"] == 1


@pytest.mark.parametrize("name", ["small", "timm:test_resnet"])
def test_random_weights_tell_tiles_apart(name: str) -> None:
    encoder = build_encoder(SPEC, ON_CPU) if name == "small" else load_encoder(replace(ON_CPU, name=name))
    pixels = np.stack([np.full((200, 200, 3), (value, 80, 160), np.uint8) for value in (20, 90, 160, 230)])
    vectors = encoded(encoder, pixels)
    assert vectors.std(axis=0).mean() > 0.05 * vectors.std()


def save_small(path: Path, change: Callable[[dict[str, Tensor]], object] | None = None) -> dict[str, Tensor]:
    """Weights of ``SPEC`` other than random ones of any seed."""
    torch.manual_seed(99)
    state = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in create_backbone(SPEC).state_dict().items()}
    if change is not None:
        change(state)
    save_file(state, path)
    return state


def cached_small(root: Path, commit: str = "c" * 40) -> dict[str, Tensor]:
    """The same in a Hugging Face cache, laid out as ``hf download`` leaves it."""
    folder = root / "models--owner--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return save_small(folder / "snapshots" / commit / "model.safetensors")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_the_same_weights_from_the_hub_and_from_a_file_are_the_same_encoder(tmp_path: Path, cache: Path) -> None:
    state = cached_small(cache)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pt")
    hub = build_encoder(SPEC, EncoderRequest("small", device="cpu"))
    file = build_encoder(SPEC, EncoderRequest("small", device="cpu", weights=tmp_path / "w.pt"))
    assert hub.weights_sha256 == state_sha256(state)
    assert hub.identity == file.identity
    assert np.array_equal(encoded(hub, tiles(2)), encoded(file, tiles(2)))
    assert (hub.provenance["weights_source"], hub.provenance["revision"]) == ("hub", "c" * 40)
    assert (file.provenance["weights_source"], file.provenance["revision"]) == ("file", None)
    assert file.provenance["weights_notes"] == ["unwrapped 'state_dict'", "stripped 'module.'"]


def test_loaded_weights_compute_what_the_model_they_were_saved_from_does(tmp_path: Path) -> None:
    state = save_small(tmp_path / "w.safetensors")
    model = create_backbone(SPEC)
    model.load_state_dict(state)
    encoder = build_encoder(SPEC, EncoderRequest("small", device="cpu", weights=tmp_path / "w.safetensors"))
    pixels = tiles(2)
    with torch.inference_mode():
        expected = model.eval()(encoder.prepare(torch.from_numpy(pixels)))
    assert np.allclose(encoded(encoder, pixels), expected.numpy(), atol=1e-6)


def test_a_model_with_tables_that_no_file_holds_gets_them(tmp_path: Path) -> None:
    name = "vit_base_patch16_rope_reg1_gap_256"
    spec = replace(
        SPEC,
        arch=name,
        arch_kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3},
        pooling="pooled",
    )
    model = create_backbone(spec)
    assert any(key not in model.state_dict() for key, _ in model.named_buffers())
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = build_encoder(spec, EncoderRequest("x", device="cpu", weights=tmp_path / "w.safetensors"))
    pixels = tiles(2)
    with torch.inference_mode():
        expected = model.eval()(encoder.prepare(torch.from_numpy(pixels)))
    assert np.allclose(encoded(encoder, pixels), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["uni", "timm:test_vit", "timm:resnet18.a1_in1k"])
def test_without_weights_there_is_no_encoder_and_never_a_random_one(cache: Path, name: str) -> None:
    with pytest.raises(MissingWeightsError, match=r"hf download \S+/\S+ \S+"):
        load_encoder(EncoderRequest(name, device="cpu"))


def test_the_rows_revision_is_fetched_unless_another_is_asked_for(cache: Path) -> None:
    for revision, wanted in ((None, ZOO["uni"].revision), ("main", "main")):
        with pytest.raises(MissingWeightsError, match=f"--revision {wanted}`"):
            load_encoder(EncoderRequest("uni", device="cpu", revision=revision))


def test_weights_that_lack_a_key_are_not_completed_with_random_ones(tmp_path: Path) -> None:
    save_small(tmp_path / "w.safetensors", change=lambda state: state.pop("blocks.1.mlp.fc2.bias"))
    with pytest.raises(ModelMismatchError, match=r"w.safetensors: .*lacks 1 of \d+ keys \(blocks.1.mlp.fc2.bias\)"):
        build_encoder(SPEC, EncoderRequest("small", device="cpu", weights=tmp_path / "w.safetensors"))


def test_a_model_of_which_the_hub_has_nothing_asks_for_a_file() -> None:
    spec = replace(SPEC, hub_id=None, weights_file=None)
    with pytest.raises(MissingWeightsError, match="--weights FILE"):
        build_encoder(spec, EncoderRequest("small", device="cpu"))


def test_an_encoder_can_be_saved_with_its_results() -> None:
    encoder = build_encoder(SPEC, ON_CPU)
    assert json.loads(json.dumps(encoder.identity)) == encoder.identity
    assert json.loads(json.dumps(encoder.provenance)) == encoder.provenance
    other = Encoder(replace(SPEC, mean=(0.5, 0.5, 0.5)), create_backbone(SPEC))
    assert other.transform_sha256 != encoder.transform_sha256


# ---- names


def test_any_timm_model_is_an_encoder_with_timms_own_facts() -> None:
    encoder = load_encoder(replace(ON_CPU, name="timm:test_vit"))
    data = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    assert encoder.spec.name == "timm:test_vit+random0"
    assert encoder.spec.hub_id == "timm/test_vit.r160_in1k"
    assert (encoder.spec.mean, encoder.spec.std) == (data["mean"], data["std"])
    assert (encoder.spec.input_px, encoder.spec.interpolation) == (data["input_size"][1], data["interpolation"])
    reference = timm.data.create_transform(**data)
    picture = Image.fromarray(tiles(1, 160, 160)[0])
    ours = encoder.prepare(torch.from_numpy(np.array(picture)[None]))[0]
    assert (ours - reference(picture)).abs().mean() < 0.3 / 255 / 0.2
    assert encoded(encoder, tiles(2)).shape == (2, encoder.dim)


def test_timm_weights_from_the_hub_are_found_under_timms_own_repository(cache: Path) -> None:
    folder = cache / "models--timm--test_vit.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("d" * 40)
    (folder / "snapshots" / ("d" * 40)).mkdir(parents=True)
    model = timm.create_model("test_vit")  # with its classifier, as the hub has it
    save_file(model.state_dict(), folder / "snapshots" / ("d" * 40) / "model.safetensors")
    encoder = load_encoder(EncoderRequest("timm:test_vit", device="cpu"))
    assert encoder.provenance["revision"] == "d" * 40
    assert encoder.provenance["weights_notes"] == ["dropped head.bias, head.weight"]
    pixels = tiles(2, 200, 200)
    with torch.inference_mode():
        features = model.eval().forward_features(encoder.prepare(torch.from_numpy(pixels)))
        expected = model.forward_head(features, pre_logits=True)
    assert np.allclose(encoded(encoder, pixels), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("uni2h", "did you mean uni2-h"),
        ("virchow", "did you mean virchow2"),
        ("nothing like it", "there are uni, uni2-h"),
        ("timm:resnet81", "did you mean .*resnet"),
        ("timm:", "no model ''"),
        ("timm:resnet18.no_such_tag", "no model 'resnet18.no_such_tag'"),
    ],
)
def test_an_unknown_name_says_what_was_probably_meant(name: str, said: str) -> None:
    with pytest.raises(UnknownEncoderError, match=said) as raised:
        load_encoder(EncoderRequest(name, device="cpu"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["UNI", "uni_v1", "Uni"])
def test_aliases_and_capitals_are_understood(cache: Path, name: str) -> None:
    with pytest.raises(MissingWeightsError, match="MahmoodLab/UNI:"):
        load_encoder(EncoderRequest(name, device="cpu"))


# ---- devices


def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(DeviceError, match=f"^{name}: .*--device cpu"):
            load_encoder(replace(ON_CPU, name="timm:test_vit", device=name))
    assert resolve_device("auto") == torch.device("cpu")


def test_devices_are_found_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match=r"cuda:2: .* 2 CUDA devices"):
        resolve_device("cuda:2")
    with pytest.raises(DeviceError, match="no device 'gpu'"):
        resolve_device("gpu")


def test_precision_is_fp32_on_the_cpu_unless_asked() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert build_encoder(SPEC, ON_CPU).precision == "fp32"


# ---- the built-in baseline and encoders of one's own


def test_colour_statistics_are_the_three_moments_of_each_colour() -> None:
    encoder = load_encoder(EncoderRequest("colour-stats", device="cpu", precision="auto"))
    pixels = tiles(3, 17, 29)
    pixels[0] = (10, 200, 90)
    pixels[1, :, :, 0] = np.where(np.arange(29) < 5, 255, 0)
    values = pixels.reshape(3, -1, 3) / 255
    off = values - values.mean(axis=1, keepdims=True)
    expected = np.concatenate([values.mean(axis=1), values.std(axis=1), np.cbrt((off**3).mean(axis=1))], axis=1)
    assert encoded(encoder, pixels) == pytest.approx(expected, abs=3e-3)
    assert encoded(encoder, pixels)[:, :6] == pytest.approx(expected[:, :6], abs=1e-5)
    assert encoded(encoder, pixels)[1, 6] == pytest.approx(expected[1, 6], rel=1e-4)
    assert encoder.identity["weights_sha256"] is None
    assert encoder.provenance["weights_source"] == "none"


@pytest.mark.parametrize(
    "wish", [{"random_seed": 1}, {"weights": Path("w.pt")}, {"revision": "main"}, {"precision": "bf16"}]
)
def test_an_encoder_without_weights_takes_no_wishes_about_them(wish: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="colour-stats"):
        load_encoder(EncoderRequest("colour-stats", device="cpu", **wish))


PLUGIN = """
import torch
from features.encoder import Encoder, EncoderSpec

class Means(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, pixels):
        return self.scale * pixels.float().mean((1, 2))

def means():
    return Means()

def whole():
    spec = EncoderSpec(
        name="mine", arch="linear", dim=5, input_px=2, resize_px=2, tile_px=64, mpp=1.0, pooling="pooled"
    )
    torch.manual_seed(0)
    return Encoder(spec, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)))

def text():
    return "no encoder"

def integers():
    return torch.nn.Flatten()
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def test_a_module_in_a_file_of_ones_own_is_an_encoder(plugin: Path, tmp_path: Path) -> None:
    encoder = load_encoder(EncoderRequest(f"{plugin}:means", device="cpu"))
    pixels = tiles(3)
    assert encoder.dim == 3
    assert np.allclose(encoded(encoder, pixels), 2 * pixels.mean((1, 2)), rtol=1e-5)
    assert encoder.identity["name"] == "mine.py:means"
    assert encoder.weights_sha256 == state_sha256({"scale": torch.tensor(2.0)})
    moved = tmp_path / "elsewhere" / "mine.py"
    moved.parent.mkdir()
    moved.write_text(PLUGIN)
    assert load_encoder(EncoderRequest(f"{moved}:means", device="cpu")).identity == encoder.identity
    moved.write_text(PLUGIN + "# changed\n")
    assert load_encoder(EncoderRequest(f"{moved}:means", device="cpu")).identity != encoder.identity


def test_an_encoder_in_a_file_of_ones_own_keeps_its_facts_and_gets_the_wished_precision(plugin: Path) -> None:
    encoder = load_encoder(EncoderRequest(f"{plugin}:whole", device="cpu", precision="bf16"))
    assert encoder.spec.name == "mine"
    assert encoder.precision == "bf16"
    assert encoder.provenance["weights_source"] == "plugin"
    assert encoded(encoder, tiles(2)).shape == (2, 5)


@pytest.mark.parametrize(
    ("attribute", "error", "said"),
    [
        ("mean", UnknownEncoderError, r"has no function 'mean' \(did you mean means"),
        ("text", ModelMismatchError, "makes a str, neither Encoder nor nn.Module"),
        ("integers", ModelMismatchError, "gives torch.uint8"),
    ],
)
def test_a_file_of_ones_own_that_makes_no_encoder_is_refused(
    plugin: Path, attribute: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        load_encoder(EncoderRequest(f"{plugin}:{attribute}", device="cpu"))


def test_a_file_of_ones_own_that_is_not_there_is_an_unknown_encoder(tmp_path: Path) -> None:
    with pytest.raises(UnknownEncoderError, match=r"none\.py: no such file"):
        load_encoder(EncoderRequest(f"{tmp_path / 'none.py'}:make", device="cpu"))


# ---- running


def test_vectors_do_not_depend_on_how_tiles_are_batched() -> None:
    runner = EncoderRunner(build_encoder(SPEC, ON_CPU))
    pixels = tiles(23)
    whole = runner.encode(pixels).vectors
    for size in (1, 2, 7, 22):
        parts = [runner.encode(pixels[i : i + size]).vectors for i in range(0, 23, size)]
        assert np.allclose(np.concatenate(parts), whole, atol=1e-5)


def test_read_only_pixels_are_encoded_and_left_alone() -> None:
    pixels = tiles(2)
    before = pixels.copy()
    pixels.setflags(write=False)
    assert EncoderRunner(build_encoder(SPEC, ON_CPU)).encode(pixels).finite.all()
    assert np.array_equal(pixels, before)


def test_no_tiles_give_no_vectors() -> None:
    vectors, finite = EncoderRunner(build_encoder(SPEC, ON_CPU)).encode(tiles(0))
    assert vectors.shape == (0, 24)
    assert vectors.dtype == np.float32
    assert finite.shape == (0,)


def fits(limit: int) -> Callable[[Tensor], Tensor]:
    """A backbone that runs out of memory with more than ``limit`` tiles at once."""

    def compute(images: Tensor) -> Tensor:
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return images.mean((2, 3))

    return compute


@given(n=st.integers(1, 40), limit=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_batch_too_large_for_memory_is_halved_until_it_fits(n: int, limit: int) -> None:
    encoder = stub(fits(limit))
    runner = EncoderRunner(encoder)
    pixels = tiles(n, 4, 4)
    vectors, finite = runner.encode(pixels)
    assert np.array_equal(vectors, encoded(stub(fits(n)), pixels))
    assert finite.all()
    assert (runner.batch_limit is None) == (n <= limit)
    encoder.backbone.sizes.clear()  # type: ignore[operator, union-attr]  # the stub's list
    runner.encode(pixels)
    assert max(encoder.backbone.sizes) <= limit  # type: ignore[arg-type]


def test_a_single_tile_too_large_for_memory_is_an_error_that_says_what_helps() -> None:
    with pytest.raises(DeviceError, match=r"cpu: out of memory with a single tile.*--batch-size.*--device"):
        EncoderRunner(stub(fits(0))).encode(tiles(5, 4, 4))


def fails(message: str) -> Callable[[Tensor], Tensor]:
    def compute(_: Tensor) -> Tensor:
        raise RuntimeError(message)

    return compute


def test_a_lost_gpu_is_a_device_error_and_a_mistake_in_the_code_is_not() -> None:
    with pytest.raises(DeviceError, match="CUDA error: unspecified launch failure; run again"):
        EncoderRunner(stub(fails("CUDA error: unspecified launch failure\nCompile with"))).encode(tiles(1, 4, 4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        EncoderRunner(stub(fails("mat1 and mat2 shapes cannot be multiplied"))).encode(tiles(1, 4, 4))


class Loud(nn.Module):
    """Overflows fp16 where a tile is bright: its sum of squares goes beyond 65504."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        nn.init.constant_(self.layer.weight, 700.0)
        self.rows: list[tuple[torch.dtype, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.rows.append((images.dtype, len(images)))
        vectors: Tensor = self.layer(images.mean((2, 3))) * 40
        return vectors


def test_a_tile_that_overflows_is_run_again_in_fp32_and_its_neighbours_are_not() -> None:
    spec = replace(SPEC, pooling="pooled", dim=3, input_px=4, resize_px=4)
    dark, bright = tiles(1, 4, 4)[0] // 200 + 150, np.full((4, 4, 3), 255, np.uint8)
    pixels = np.stack([dark, bright, dark, bright, bright])
    full = encoded(Encoder(spec, Loud()), pixels)
    assert np.isfinite(full).all()
    assert (np.abs(full[1]) > 65504).all()
    encoder = Encoder(spec, Loud(), precision="fp16")
    plain = encoded(encoder, pixels)
    runner = EncoderRunner(encoder)
    vectors, finite = runner.encode(pixels)
    assert not np.isfinite(plain[[1, 3, 4]]).any()
    assert finite.all()
    assert np.array_equal(vectors[[0, 2]], plain[[0, 2]])
    assert np.allclose(vectors[[1, 3, 4]], full[[1, 3, 4]], rtol=1e-5)
    again = runner._in_fp32.encoder.backbone.rows
    assert again[-1] == (torch.float32, 3)  # type: ignore[index]  # the stub's list
    assert {p.dtype for p in encoder.backbone.parameters()} == {torch.float16}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_vector_that_stays_not_finite_is_nan_throughout_and_reported(bad: float, precision: Any) -> None:
    def compute(images: Tensor) -> Tensor:
        vectors = images.mean((2, 3))
        vectors[images.amax((1, 2, 3)) > 1, 1] = bad
        return vectors

    spec = replace(SPEC, pooling="pooled", dim=3, input_px=4, resize_px=4, mean=(0, 0, 0), std=(0.99, 0.99, 0.99))
    pixels = np.zeros((4, 4, 4, 3), np.uint8)
    pixels[2] = 255
    vectors, finite = EncoderRunner(Encoder(spec, Stub(compute), precision=precision)).encode(pixels)
    assert finite.tolist() == [True, True, False, True]
    assert np.isnan(vectors[2]).all()
    assert np.isfinite(vectors[[0, 1, 3]]).all()


# ---- a process of its own


def test_a_fresh_process_takes_weights_from_hf_home_and_imports_timm_only_to_build(tmp_path: Path) -> None:
    state = cached_small(tmp_path / "hub")
    program = (
        "import sys, json; from features import encoder\n"
        "light = not {'timm', 'torchvision'} & sys.modules.keys()\n"
        "spec = json.loads(sys.argv[1])\n"
        "spec = encoder.EncoderSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()})\n"
        "made = encoder.build_encoder(spec, encoder.EncoderRequest('small', device='cpu'))\n"
        "print(json.dumps([light, made.weights_sha256, 'timm' in sys.modules]))\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(SPEC.__dict__)],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(run.stdout) == [True, state_sha256(state), True]
