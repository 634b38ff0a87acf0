"""Saved networks: weights and the facts it takes to use them, as one safetensors file that holds no code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wsi._files import write_atomically
from wsi.errors import ModelMismatchError

__all__ = ["read_facts", "read_network", "save_network"]

_FORMAT = "wsi-segmentation-network"
_VERSION = 1


def save_network(path: str | os.PathLike[str], kind: str, facts: Mapping[str, Any], network: nn.Module) -> None:
    """Write a network's weights with ``facts``, JSON values from which it is built again."""
    from safetensors.torch import save

    about = {"format": _FORMAT, "version": _VERSION, "kind": kind, "facts": dict(facts)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # One key: safetensors writes several in an order of its own, and equal networks should be equal files.
    write_atomically(Path(path), save(tensors, {"wsi": json.dumps(about, sort_keys=True)}))


def read_network(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and weights of a saved network.

    Raises:
        ModelMismatchError: the file is none of ours, damaged, of another release, or of a network of another kind.
    """
    return _read(path, kind, weights=True)


def read_facts(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The facts of a saved network alone; raises as ``read_network``."""
    return _read(path, kind, weights=False)[0]


def _read(path: str | os.PathLike[str], kind: str, *, weights: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device="cpu") as file:
            about = json.loads((file.metadata() or {})["wsi"])
            names = file.keys() if weights else ()
            tensors = {name: file.get_tensor(name) for name in names}
        found = (about["format"], about["version"], about["kind"])
        facts = dict(about["facts"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelMismatchError(f"{path}: cannot be used as a network ({error}); train it again") from error
    if found != (_FORMAT, _VERSION, kind):
        raise ModelMismatchError(
            f"{path}: holds {found[0]} {found[1]} of kind {found[2]}, not {_FORMAT} {_VERSION} of {kind}"
        )
    return facts, tensors
