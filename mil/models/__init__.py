"""MODELS: slide models by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from mil.models.abmil import ABMIL
from mil.models.base import MILModel, MILOutput

__all__ = ["MODELS", "MILModel", "MILOutput", "build_model"]

MODELS: dict[str, Callable[..., MILModel]] = {"abmil": partial(ABMIL, gated=False), "abmil-gated": ABMIL}


def build_model(name: str, dim: int, n_classes: int, **hyper: Any) -> MILModel:
    """A new slide model."""
    return MODELS[name](dim, n_classes, **hyper)
