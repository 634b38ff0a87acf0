"""Weights: find them, read them, fit them to a backbone; or say exactly what is missing and where to put it.

Nothing is filled in: a key that is missing, unknown or of another shape is an error, because a model that is partly
random gives vectors that look like any other. (``timm.create_model("hf_hub:…")`` may do just that; it is not used.)
"""

import errno
import hashlib
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeGuard

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wsi.errors import DiskFullError, MissingWeightsError, ModelMismatchError, UnsafePickleError

__all__ = [
    "HubFile",
    "StateDict",
    "WeightsRecord",
    "draw_random",
    "fetch",
    "fit",
    "hf_dinov2_to_timm",
    "read_state",
    "state_sha256",
]

StateDict = dict[str, Tensor]

_CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "teacher",
)  # of DINO's two networks the teacher is the encoder
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
_HEADS = ("head", "fc")
_RESAMPLED = ("pos_embed", "rel_pos", "relative_position")  # what timm may interpolate to another input size


@dataclass(frozen=True)
class HubFile:
    """One file on the Hugging Face hub.

    Attributes:
        repo: ``owner/name``.
        file: path inside the repository.
        revision: commit, tag or branch; None for the newest.
        gated: whether its terms must be accepted before it can be fetched.
    """

    repo: str
    file: str
    revision: str | None = None
    gated: bool = False


@dataclass(frozen=True)
class WeightsRecord:
    """Where the weights of an encoder came from.

    Attributes:
        source: ``"plugin"`` for weights that the user's own code brought, ``"none"`` where the encoder has none.
        sha256: ``state_sha256`` of the weights as the backbone got them, before any cast; None where there are none.
        revision: commit on the hub; None for everything else.
        random_seed: what random weights were drawn from.
        code_sha256: of the user's own Python file; None for everything else.
        notes: what was unwrapped, stripped, converted, dropped or resampled on the way.
    """

    source: Literal["hub", "file", "random", "none", "plugin"]
    sha256: str | None = None
    revision: str | None = None
    random_seed: int | None = None
    code_sha256: str | None = None
    notes: tuple[str, ...] = ()


def fetch(wanted: HubFile, *, offline: bool = False) -> tuple[Path, str]:
    """A file of the hub on this machine, fetched if need be, and the commit it belongs to.

    Follows Hugging Face's own settings: ``HF_HOME``, ``HF_HUB_OFFLINE``, the stored token.

    Raises:
        MissingWeightsError: not here, and it may not (``offline``) or cannot be fetched; says what to fetch, and how.
        DiskFullError: no space for it.
    """
    # The HTTP library's own base error: requests, httpx or httpx2, as the release of huggingface_hub has it.
    http_error: type[Exception] = vars(hub).get("HTTPError", OSError)
    try:
        path = Path(hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision, local_files_only=offline))
    except (OSError, hub.EntryNotFoundError, hub.HFValidationError, http_error) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DiskFullError(f"{constants.HF_HUB_CACHE}: no space left for {wanted.repo}; set HF_HOME") from error
        why = _why_not_fetched(error, offline=offline or bool(constants.HF_HUB_OFFLINE))
        terms = (
            f"accept the terms at https://huggingface.co/{wanted.repo}, `hf auth login`, then " if wanted.gated else ""
        )
        revision = f" --revision {wanted.revision}" if wanted.revision else ""
        raise MissingWeightsError(
            f"{wanted.repo}: no {wanted.file} on this machine ({why}); {terms}fetch it with "
            f"`hf download {wanted.repo} {wanted.file}{revision}`, which puts it into {constants.HF_HUB_CACHE}, "
            f"or pass a copy with --weights FILE"
        ) from error
    commit = path.parents[len(PurePosixPath(wanted.file).parts) - 1].name  # …/snapshots/<commit>/<file>
    return path, commit


def _why_not_fetched(error: Exception, *, offline: bool) -> str:
    if isinstance(error, hub.GatedRepoError):
        return "the repository is gated and this account has no access"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "no such repository, or a private one"
    if isinstance(error, hub.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, hub.LocalEntryNotFoundError):
        return "working offline" if offline else "the hub cannot be reached"
    if isinstance(error, hub.EntryNotFoundError):
        return "the repository has no such file"
    return _first_line(error)


def read_state(path: Path) -> tuple[StateDict, tuple[str, ...]]:
    """The tensors of a weights file, out of the containers and prefixes that training code wraps around them.

    Reads safetensors, and torch files without running any code in them; which one is told by the content. Returns the
    tensors on the CPU and a note for each layer that was taken off.

    Raises:
        MissingWeightsError: no such file.
        UnsafePickleError: reading it would run code.
        ModelMismatchError: it is no weights file, or a damaged one.
    """
    if not path.is_file():
        raise MissingWeightsError(f"{path}: no such weights file")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ModelMismatchError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    if start[:2] == b"PK" or start[:1] == b"\x80":
        content = _read_torch(path)
    elif start[8:9] == b"{":
        content = _read_safetensors(path)
    else:
        raise ModelMismatchError(f"{path}: neither a safetensors nor a torch file; is the download complete?")
    return _unwrap(content, path)


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelMismatchError(
            f"{path}: safetensors cannot read it ({_first_line(error)}); is the download complete?"
        ) from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {named[1]}" if named else "holds more than tensors"
        raise UnsafePickleError(
            f"{path}: {what}, which could run code on this machine; where you trust the file, load it with "
            f"torch.load(…, weights_only=False), save its tensors with safetensors.torch.save_file and pass that file"
        ) from error
    except Exception as error:  # damaged bytes break torch's reader in any way at all; nothing is carried on with
        raise ModelMismatchError(
            f"{path}: torch cannot read it ({_first_line(error)}); is the download complete?"
        ) from error


def _unwrap(content: object, path: Path) -> tuple[StateDict, tuple[str, ...]]:
    notes = []
    while not _is_state(content):
        name = None
        if isinstance(content, Mapping):
            name = next((name for name in _CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if not isinstance(content, Mapping) or name is None:
            raise ModelMismatchError(
                f"{path}: holds no tensors by name, nor a {', '.join(_CONTAINERS[:-1])} or {_CONTAINERS[-1]} that does"
            )
        content = content[name]
        notes.append(f"unwrapped {name!r}")
    state: StateDict = dict(content)
    while True:
        wrapper = next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in state)), None)
        if wrapper is not None:
            state = {key.removeprefix(wrapper): tensor for key, tensor in state.items()}
            notes.append(f"stripped {wrapper!r}")
        elif any(key.startswith("backbone.") for key in state):
            beside = [key for key in state if not key.startswith("backbone.")]
            state = {key.removeprefix("backbone."): state[key] for key in state if key.startswith("backbone.")}
            notes += ["stripped 'backbone.'", *([f"dropped {_some(beside)}"] if beside else [])]
        else:
            return state, tuple(notes)


def _is_state(content: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Digest of named tensors: over key, dtype, shape and bytes, in the order of the keys.

    The same tensors give the same digest whatever file they came in. (On a big-endian machine the bytes, and so the
    digest, differ.)
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def draw_random(backbone: nn.Module) -> None:
    """Fill ``backbone`` with random weights that tell tiles apart; draws from torch's own random numbers.

    Training starts networks close to the identity (layer scales of 1e-5, last norms of 0), which would give all tiles
    nearly the same vector. So scales become 1, biases 0, and matrices keep the variance of what they are fed. Tokens
    and positions stay as they are.
    """
    for module in backbone.modules():
        for name, values in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                nn.init.normal_(values, std=values[0].numel() ** -0.5)
            elif values.ndim == 1 and name in ("weight", "gamma"):
                nn.init.ones_(values)
            elif name == "bias":
                nn.init.zeros_(values)


_HF_DINOV2 = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.attention\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    )
)


def hf_dinov2_to_timm(state: Mapping[str, Tensor]) -> StateDict:
    """The weights of a Hugging Face ``Dinov2Model`` under the names of timm's ``VisionTransformer``.

    Query, key and value become one matrix, in this order. With registers, the class token's position is added to the
    token itself: timm's register models have positions for patches only (``no_embed_class``). The mask token, which
    only training needs, is left out. Keys that are not of this layout keep their names.
    """
    renamed: StateDict = {}
    for key, tensor in state.items():
        if key == "embeddings.mask_token":
            continue
        name = key
        for pattern, replacement in _HF_DINOV2:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            renamed[name.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    if {"reg_token", "cls_token", "pos_embed"} <= renamed.keys():
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def fit(
    state: Mapping[str, Tensor], backbone: nn.Module, *, layout: str, where: object
) -> tuple[StateDict, tuple[str, ...]]:
    """Exactly the tensors that ``backbone`` has, from those of a file, and notes on what was done to them.

    Converts the layout, lets timm convert what it knows (older names, positions for another input size), and drops the
    classifier. ``backbone`` may be on the meta device: only names and shapes are looked at. ``where`` names the file.

    Raises:
        ModelMismatchError: keys missing or unknown, or tensors of another shape; names some of them.
    """
    notes = []
    state = dict(state)
    if layout == "hf_dinov2" and any(key.startswith("embeddings.") for key in state):
        mask = ["dropped embeddings.mask_token"] if "embeddings.mask_token" in state else []
        state = hf_dinov2_to_timm(state)
        notes += ["converted from Hugging Face Dinov2 names", *mask]
    wanted = {key: tensor.shape for key, tensor in backbone.state_dict().items()}
    convert = _timm_filter(backbone)
    if convert is not None and _differences(state, wanted, _heads_of(backbone)):
        _refuse_other_model(state, wanted, where)
        before = {key: tensor.shape for key, tensor in state.items()}
        try:
            state = dict(convert(dict(state), backbone))
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise ModelMismatchError(f"{where}: timm cannot make it fit ({_first_line(error)})") from error
        resized = [key for key, shape in before.items() if key in state and state[key].shape != shape]
        notes += [f"resampled {key} from {tuple(before[key])} to {tuple(state[key].shape)}" for key in resized]
        if before.keys() != state.keys():
            notes.append("names converted by timm")
    heads = sorted(key for key in state if key not in wanted and key.startswith(_heads_of(backbone)))
    if heads:
        notes.append(f"dropped {', '.join(heads)}")
    differences = _differences(state, wanted, _heads_of(backbone))
    if differences:
        raise ModelMismatchError(
            f"{where}: does not fit {type(backbone).__name__}: {differences}; is it the file of another model?"
        )
    return {key: state[key] for key in wanted}, tuple(notes)


def _heads_of(backbone: nn.Module) -> tuple[str, ...]:
    named = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{head}." for head in (*_HEADS, *([named] if isinstance(named, str) else named)))


def _timm_filter(backbone: nn.Module) -> Callable[[StateDict, nn.Module], Mapping[str, Tensor]] | None:
    """timm's own conversion of checkpoints: by its convention a function of this name beside the model's class."""
    found: Any = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    return found if type(backbone).__module__.startswith("timm.") else None


def _refuse_other_model(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], where: object) -> None:
    """Refuse weights of another size before timm sees them: it would resample even the patch embedding to fit."""
    other = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in state and state[key].numel() != shape.numel() and not any(name in key for name in _RESAMPLED)
    ]
    if other:
        raise ModelMismatchError(f"{where}: of another shape: {_some(other)}; is it the file of another model?")


def _differences(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], heads: tuple[str, ...]) -> str:
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted and not key.startswith(heads)]
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    said = []
    if missing:
        said.append(f"lacks {len(missing)} of {len(wanted)} keys ({_some(missing)})")
    if unknown:
        said.append(f"has {len(unknown)} unknown keys ({_some(unknown)})")
    if reshaped:
        said.append(f"{len(reshaped)} of another shape ({_some(reshaped)})")
    return ", ".join(said)


def _some(names: Iterable[str], n: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
