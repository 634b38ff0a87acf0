"""Weights: what is read, what is refused, and that nothing is ever filled in."""

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import errors as hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from features.weights import HubFile, fetch, fit, hf_dinov2_to_timm, read_state, state_sha256
from wsi.errors import (
    DiskFullError,
    MissingWeightsError,
    ModelMismatchError,
    UnsafePickleError,
    WsiError,
)

UNI = HubFile("MahmoodLab/UNI", "pytorch_model.bin", "0123456789abcdef0123456789abcdef01234567", gated=True)


def some_state(seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.weight": torch.randn(3, 4, generator=draws),
        "norm.bias": torch.randn(5, generator=draws).to(torch.bfloat16),
        "steps": torch.tensor(7),
    }


def torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def tiny_vit(**kwargs: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3} | kwargs
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    return model.eval()


# ---- reading


def test_a_safetensors_and_a_torch_file_of_the_same_tensors_have_the_same_digest(tmp_path: Path) -> None:
    state = some_state()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(dict(reversed(state.items())), tmp_path / "b.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    digests = {state_sha256(read_state(file)[0]) for file in tmp_path.iterdir()}
    assert digests == {state_sha256(state)}


def test_the_digest_notices_a_changed_bit_name_shape_or_type() -> None:
    state = some_state()
    changed = {key: tensor.clone() for key, tensor in state.items()}
    changed["blocks.0.weight"].view(torch.int32)[2, 3] ^= 1
    others = [
        changed,
        {("norm.gain" if key == "norm.bias" else key): tensor for key, tensor in state.items()},
        state | {"blocks.0.weight": state["blocks.0.weight"].reshape(4, 3)},
        state | {"steps": state["steps"].to(torch.int32)},
        {key: tensor for key, tensor in state.items() if key != "steps"},
    ]
    assert len({state_sha256(other) for other in [state, *others]}) == 6


def test_the_digest_is_of_the_values_and_not_of_their_place_in_memory() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    assert state_sha256({"w": weight.T}) == state_sha256({"w": weight.T.contiguous()})


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (lambda state: state, ()),
        (lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, ("unwrapped 'state_dict'",)),
        (lambda state: {"student": {}, "teacher": state}, ("unwrapped 'teacher'",)),
        (
            lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
            ("unwrapped 'model'", "stripped 'module.'"),
        ),
        (
            lambda state: {
                "teacher": {f"module.backbone.{key}": value for key, value in state.items()}
                | {"module.head.last.weight": torch.zeros(2)}
            },
            ("unwrapped 'teacher'", "stripped 'module.'", "stripped 'backbone.'", "dropped head.last.weight"),
        ),
    ],
    ids=["plain", "training", "dino", "parallel", "dino-parallel"],
)
def test_what_training_code_wraps_around_the_tensors_is_taken_off_and_named(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object], notes: tuple[str, ...]
) -> None:
    torch.save(wrap(some_state()), tmp_path / "w.pt")
    state, said = read_state(tmp_path / "w.pt")
    assert state_sha256(state) == state_sha256(some_state())
    assert said == notes


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    ran = tmp_path / "ran"
    file = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(1), "x": _Trap(ran)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafePickleError, match=r"w\.pt: .*could run code.*safetensors"):
        read_state(file)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "neither"),
        (b"<html>404 not found</html>", "neither"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (torch_bytes(some_state())[:-40], "torch cannot read it"),
        (save(some_state())[:-1], "safetensors cannot read it"),
        (torch_bytes([torch.zeros(2)]), "no tensors by name"),
        (torch_bytes({"epoch": 3}), "no tensors by name"),
        (torch_bytes({}), "no tensors by name"),
    ],
    ids=["empty", "html", "lfs", "cut torch", "cut safetensors", "list", "no tensor", "nothing"],
)
def test_what_is_no_weights_file_is_named_as_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(ModelMismatchError, match=said) as raised:
        read_state(written(tmp_path / "w.bin", content))
    assert str(tmp_path / "w.bin") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_weights_file_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"none\.pt: no such weights file"):
        read_state(tmp_path / "none.pt")


_FILES = (
    torch_bytes({"state_dict": some_state()}),
    save(some_state()),
)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # a changed byte may name another one
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from(_FILES), where=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_gives_an_error_of_ours_or_none(
    tmp_path: Path, which: bytes, where: float, byte: int, cut: bool
) -> None:
    at = int(where * (len(which) - 1))
    content = which[:at] if cut else which[:at] + bytes([byte]) + which[at + 1 :]
    try:
        read_state(written(tmp_path / "w.bin", content))
    except WsiError as error:
        assert str(tmp_path / "w.bin") in str(error)  # noqa: PT017  # either outcome is right; the message must help
    else:
        assert not cut


# ---- fetching


def hub_cache(root: Path, repo: str, file: str, commit: str, content: bytes) -> Path:
    """A Hugging Face cache that holds one file, laid out as ``hf download`` leaves it."""
    folder = root / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True)
    return written(path, content)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("file", ["model.safetensors", "weights/model.safetensors"])
def test_a_file_in_the_cache_is_found_with_its_commit(cache: Path, file: str) -> None:
    there = hub_cache(cache, "owner/model", file, "c" * 40, b"weights")
    assert fetch(HubFile("owner/model", file), offline=True) == (there, "c" * 40)
    assert fetch(HubFile("owner/model", file, "c" * 40), offline=True) == (there, "c" * 40)


def test_hf_hub_offline_is_obeyed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    there = hub_cache(cache, "owner/model", "model.safetensors", "c" * 40, b"weights")
    assert fetch(HubFile("owner/model", "model.safetensors"))[0] == there
    with pytest.raises(MissingWeightsError, match="working offline"):
        fetch(HubFile("owner/other", "model.safetensors"))


def test_another_revision_than_the_cached_one_is_missing(cache: Path) -> None:
    hub_cache(cache, "owner/model", "model.safetensors", "c" * 40, b"weights")
    with pytest.raises(MissingWeightsError, match=f"--revision {'d' * 40}"):
        fetch(HubFile("owner/model", "model.safetensors", "d" * 40), offline=True)


def test_missing_weights_say_in_one_line_what_to_fetch_and_where_to_put_it(cache: Path) -> None:
    with pytest.raises(MissingWeightsError) as raised:
        fetch(UNI, offline=True)
    said = str(raised.value)
    assert "\n" not in said
    for part in (
        "https://huggingface.co/MahmoodLab/UNI",
        f"`hf download MahmoodLab/UNI pytorch_model.bin --revision {UNI.revision}`",
        str(cache),
        "--weights FILE",
    ):
        assert part in said


def _raised(kind: type[Exception]) -> Exception:
    """An error of the hub without the HTTP response that its constructor wants."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (_raised(hub.GatedRepoError), "gated and this account has no access"),
        (_raised(hub.RepositoryNotFoundError), "no such repository, or a private one"),
        (_raised(hub.RevisionNotFoundError), "no such revision"),
        (_raised(hub.RemoteEntryNotFoundError), "no such file"),
        (hub.LocalEntryNotFoundError("no"), "the hub cannot be reached"),
        (vars(hub)["HTTPError"]("connection reset\nby peer"), "connection reset"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_whatever_keeps_a_file_from_coming_is_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("features.weights.hf_hub_download", fails)
    with pytest.raises(MissingWeightsError, match=said) as raised:
        fetch(UNI)
    assert "hf download" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_full_disk_while_fetching_is_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("features.weights.hf_hub_download", fails)
    with pytest.raises(DiskFullError, match="HF_HOME"):
        fetch(UNI)


# ---- fitting


def test_fitting_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    model = tiny_vit()
    state, notes = fit(model.state_dict(), tiny_vit(), layout="timm", where=tmp_path)
    assert state_sha256(state) == state_sha256(model.state_dict())
    assert notes == ()


def test_the_classifier_is_dropped_and_named() -> None:
    state = dict(tiny_vit().state_dict()) | {"head.weight": torch.zeros(10, 24), "fc.bias": torch.zeros(10)}
    fitted, notes = fit(state, tiny_vit(), layout="timm", where="w.pt")
    assert fitted.keys() == tiny_vit().state_dict().keys()
    assert notes == ("dropped fc.bias, head.weight",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("blocks.1.attn.qkv.weight"), r"lacks 1 of \d+ keys \(blocks.1.attn.qkv.weight\)"),
        (lambda state: state.update({"visual.extra": torch.zeros(1)}), r"1 unknown keys \(visual.extra\)"),
        (lambda state: state.update({"norm.weight": torch.ones(25)}), r"norm.weight \(25,\) instead of \(24,\)"),
        (
            lambda state: state.update({"patch_embed.proj.weight": torch.zeros(24, 3, 16, 16)}),
            r"patch_embed.proj.weight \(24, 3, 16, 16\) instead of \(24, 3, 8, 8\)",
        ),
    ],
    ids=["missing", "unknown", "shape", "patch size"],
)
def test_weights_that_do_not_fit_are_refused_by_key(change: Callable[[dict[str, Tensor]], object], said: str) -> None:
    state = dict(tiny_vit().state_dict())
    change(state)
    with pytest.raises(ModelMismatchError, match=said) as raised:
        fit(state, tiny_vit(), layout="timm", where="w.pt")
    assert str(raised.value).startswith("w.pt: ")


def test_weights_of_quite_another_model_are_refused_in_one_line() -> None:
    resnet = timm.create_model("resnet10t").state_dict()
    with pytest.raises(ModelMismatchError, match=r"does not fit VisionTransformer.*another model") as raised:
        fit(resnet, tiny_vit(), layout="timm", where="w.pt")
    assert len(str(raised.value)) < 600


def test_positions_for_another_input_size_are_resampled_as_timm_does_and_named() -> None:
    state = tiny_vit(img_size=32).state_dict()
    model = tiny_vit(img_size=48)
    fitted, notes = fit(state, model, layout="timm", where="w.pt")
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.equal(fitted["pos_embed"], expected)
    assert notes == ("resampled pos_embed from (1, 17, 24) to (1, 37, 24)",)


def test_a_model_is_fitted_on_the_meta_device_as_on_any_other() -> None:
    state = tiny_vit(img_size=32).state_dict()
    with torch.device("meta"):
        model = tiny_vit(img_size=48)
    on_meta, _ = fit(state, model, layout="timm", where="w.pt")
    assert not any(tensor.is_meta for tensor in on_meta.values())
    assert state_sha256(on_meta) == state_sha256(fit(state, tiny_vit(img_size=48), layout="timm", where="w.pt")[0])


# ---- Hugging Face Dinov2


def hf_dinov2_state(*, dim: int, depth: int, patch: int, tokens: int, hidden: int, registers: int) -> dict[str, Tensor]:
    """Random weights with the names and shapes of ``Dinov2Model``; SwiGLU where there are registers, as in Hibou."""
    draws = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws) * 0.2

    state = {
        "embeddings.cls_token": draw(1, 1, dim),
        "embeddings.mask_token": draw(1, dim),
        "embeddings.position_embeddings": draw(1, 1 + tokens, dim),
        "embeddings.patch_embeddings.projection.weight": draw(dim, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": draw(dim),
        "layernorm.weight": 1 + draw(dim),
        "layernorm.bias": draw(dim),
    }
    if registers:
        state["embeddings.register_tokens"] = draw(1, registers, dim)
    into, out = ("weights_in", "weights_out") if registers else ("fc1", "fc2")
    for layer in (f"encoder.layer.{i}." for i in range(depth)):
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            state |= {f"{layer}{name}.weight": draw(dim, dim), f"{layer}{name}.bias": draw(dim)}
        state |= {
            f"{layer}attention.output.dense.weight": draw(dim, dim),
            f"{layer}attention.output.dense.bias": draw(dim),
            f"{layer}mlp.{into}.weight": draw(2 * hidden if registers else hidden, dim),
            f"{layer}mlp.{into}.bias": draw(2 * hidden if registers else hidden),
            f"{layer}mlp.{out}.weight": draw(dim, hidden),
            f"{layer}mlp.{out}.bias": draw(dim),
        }
        for i in (1, 2):
            state |= {
                f"{layer}norm{i}.weight": 1 + draw(dim),
                f"{layer}norm{i}.bias": draw(dim),
                f"{layer}layer_scale{i}.lambda1": 1 + draw(dim),
            }
    return state


def hf_dinov2_forward(w: dict[str, Tensor], images: Tensor, *, depth: int, heads: int, patch: int) -> Tensor:
    """What ``Dinov2Model`` computes from its own weights: (B, 3, H, W) → tokens after the last norm (B, N, dim)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    name, dim = "embeddings.patch_embeddings.projection", w["layernorm.bias"].shape[0]
    x = F.conv2d(images, w[f"{name}.weight"], w[f"{name}.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([w["embeddings.cls_token"].expand(len(x), -1, -1), x], 1) + w["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in w:
        x = torch.cat([x[:, :1], w["embeddings.register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for layer in (f"encoder.layer.{i}." for i in range(depth)):
        y = norm(x, f"{layer}norm1")
        q, k, v = (
            linear(y, f"{layer}attention.attention.{part}").view(len(y), -1, heads, dim // heads).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        y = linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}attention.output.dense")
        x = x + y * w[f"{layer}layer_scale1.lambda1"]
        y = norm(x, f"{layer}norm2")
        if f"{layer}mlp.weights_in.weight" in w:
            gate, value = linear(y, f"{layer}mlp.weights_in").chunk(2, -1)
            y = linear(gate * gate.sigmoid() * value, f"{layer}mlp.weights_out")
        else:
            y = linear(y, f"{layer}mlp.fc1")
            y = linear(y * 0.5 * (1 + torch.erf(y / 2**0.5)), f"{layer}mlp.fc2")
        x = x + y * w[f"{layer}layer_scale2.lambda1"]
    return norm(x, "layernorm")


@pytest.mark.parametrize("registers", [0, 4], ids=["as phikon-v2", "as hibou-b"])
def test_converted_weights_compute_what_the_originals_do(registers: int) -> None:
    state = hf_dinov2_state(dim=24, depth=2, patch=8, tokens=16, hidden=64, registers=registers)
    kwargs: dict[str, Any] = {"init_values": 1e-5, "mlp_ratio": 64 / 24}
    if registers:
        kwargs |= {"reg_tokens": 4, "no_embed_class": True, "act_layer": "silu", "mlp_ratio": 128 / 24}
        kwargs["mlp_layer"] = timm.layers.SwiGLUPacked
    model = tiny_vit(**kwargs)
    fitted, notes = fit(state, model, layout="hf_dinov2", where="model.safetensors")
    model.load_state_dict(fitted, strict=True)
    assert notes == ("converted from Hugging Face Dinov2 names", "dropped embeddings.mask_token")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model.forward_features(images)  # type: ignore[operator]  # a method that nn.Module's stub does not know
        theirs = hf_dinov2_forward(state, images, depth=2, heads=3, patch=8)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours.std() > 0.5


def test_a_converted_file_that_lacks_a_key_says_so() -> None:
    state = hf_dinov2_state(dim=24, depth=2, patch=8, tokens=16, hidden=96, registers=0)
    del state["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(ModelMismatchError, match=r"lacks 1 of \d+ keys \(blocks.1.attn.qkv.bias\)"):
        fit(state, tiny_vit(init_values=1e-5), layout="hf_dinov2", where="model.safetensors")


def test_the_same_weights_under_timms_names_are_taken_for_a_hugging_face_row_too() -> None:
    state = hf_dinov2_state(dim=24, depth=2, patch=8, tokens=16, hidden=96, registers=0)
    converted = hf_dinov2_to_timm(state)
    model = tiny_vit(init_values=1e-5)
    both = [fit(given, model, layout="hf_dinov2", where="w")[0] for given in (state, converted)]
    assert state_sha256(both[0]) == state_sha256(both[1])
