"""Multiple-instance models, one paper a file, and the names they are asked for by."""

from typing import Any

from mil.models.abmil import ABMIL, GatedABMIL
from mil.models.base import MILModel, MILOutput
from wsi.errors import UsageError

__all__ = ["MODELS", "MILModel", "MILOutput", "build_model"]

MODELS: dict[str, type[MILModel]] = {"abmil": ABMIL, "abmil-gated": GatedABMIL}


def build_model(name: str, dim: int, n_classes: int, **hyper: Any) -> MILModel:
    """A new slide model."""
    if name not in MODELS:
        raise UsageError(f"no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name](dim, n_classes, **hyper)
