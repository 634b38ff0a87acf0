"""EMBEDDERS: the methods that turn a bag into one vector, by name."""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from features.custom import did_you_mean
from mil.prototypes.counts import ProtoCounts
from mil.prototypes.embedder import Embedder
from mil.prototypes.h2t import H2T
from mil.prototypes.moments import Mean, MeanVariance
from mil.prototypes.ot import OptimalTransport
from mil.prototypes.panther import Panther
from mil.prototypes.quantiles import Quantiles
from wsi.errors import UsageError

__all__ = ["EMBEDDERS", "build_embedder"]

EMBEDDERS: Mapping[str, type[Embedder]] = MappingProxyType(
    {kind.name: kind for kind in (Panther, ProtoCounts, H2T, OptimalTransport, Mean, MeanVariance, Quantiles)}
)


def build_embedder(name: str, **hyper: Any) -> Embedder:
    """The method of this name; hyper-parameters that are not given have the default of its file.

    Raises:
        UsageError: no such method, or it has no such hyper-parameter, or not with this value.
    """
    if name not in EMBEDDERS:
        raise UsageError(f"no method {name!r}{did_you_mean(name.lower(), EMBEDDERS)}; there are {', '.join(EMBEDDERS)}")
    known = [each.name for each in fields(EMBEDDERS[name])]  # type: ignore[arg-type]
    for word in hyper:
        if word not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{name} has no hyper-parameter {word!r}{did_you_mean(word, known)}; {has}")
    return EMBEDDERS[name](**hyper)
