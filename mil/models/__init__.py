"""Multiple-instance models, one paper a file, and the names they are asked for by."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from features.custom import did_you_mean
from mil.models.abmil import ABMIL, GatedABMIL
from mil.models.additive import AdditiveMIL
from mil.models.base import MILModel, MILOutput
from mil.models.clam import CLAMMB, CLAMSB
from mil.models.dsmil import DSMIL
from mil.models.dtfd import DTFDMIL
from mil.models.ilra import ILRAMIL
from mil.models.panther import PantherMIL, PantherMLP
from mil.models.pooling import LinearProbe, MaxMIL, MeanMIL
from mil.models.prototypes import H2TMIL, OTMIL, MeanVarianceMIL, ProtoCountsMIL, QuantilesMIL
from mil.models.rrt import RRTMIL
from mil.models.stamp_vit import STAMPViT
from mil.models.transformer import TransformerMIL
from mil.models.transmil import TransMIL
from mil.models.wikg import WiKG
from wsi.errors import UsageError

__all__ = ["MODELS", "MILModel", "MILOutput", "build_model"]

MODELS: Mapping[str, type[MILModel]] = MappingProxyType(
    {
        "linear": LinearProbe,
        "mean": MeanMIL,
        "max": MaxMIL,
        "abmil": ABMIL,
        "abmil-gated": GatedABMIL,
        "clam-sb": CLAMSB,
        "clam-mb": CLAMMB,
        "dsmil": DSMIL,
        "transmil": TransMIL,
        "dtfd": DTFDMIL,
        "transformer": TransformerMIL,
        "stamp-vit": STAMPViT,
        "rrt": RRTMIL,
        "wikg": WiKG,
        "ilra": ILRAMIL,
        "additive": AdditiveMIL,
        "panther": PantherMIL,
        "panther-mlp": PantherMLP,
        "protocounts": ProtoCountsMIL,
        "h2t": H2TMIL,
        "ot": OTMIL,
        "mean-variance": MeanVarianceMIL,
        "quantiles": QuantilesMIL,
    }
)


def build_model(name: str, dim: int, n_classes: int, **hyper: Any) -> MILModel:
    """The model of this name for features of width ``dim``, with weights drawn at random.

    ``hyper`` are the hyper-parameters of its class; what is not given has the default of its paper.

    Raises:
        UsageError: no such model, or it has no such hyper-parameter.
    """
    if name not in MODELS:
        raise UsageError(f"no model {name!r}{did_you_mean(name.lower(), MODELS)}; there are {', '.join(MODELS)}")
    parameters = inspect.signature(MODELS[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for word in hyper:
        if word not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{name} has no hyper-parameter {word!r}{did_you_mean(word, known)}; {has}")
    return MODELS[name](dim, n_classes, **hyper)
