"""Networks from pixels to classes, one paper a file, and the names they are asked for by."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from features.custom import did_you_mean
from segmentation.models.agu_net import AGUNet, DAGUNet
from segmentation.models.base import SegmentationModel, SegmentationOutput
from segmentation.models.dru_net import DRUNet
from segmentation.models.unet import UNet
from wsi.errors import UsageError

__all__ = ["NETWORKS", "SegmentationModel", "SegmentationOutput", "build_network", "check_hyper"]

NETWORKS: Mapping[str, type[SegmentationModel]] = MappingProxyType(
    {
        "u-net": UNet,
        "agu-net": AGUNet,
        "dagu-net": DAGUNet,
        "dru-net": DRUNet,
    }
)


def build_network(name: str, in_channels: int, n_classes: int, **hyper: Any) -> SegmentationModel:
    """The network of this name, with weights drawn at random.

    ``hyper`` are the hyper-parameters of its class; what is not given has the default of its paper.

    Raises:
        UsageError: no such network, or it has no such hyper-parameter.
    """
    if name not in NETWORKS:
        raise UsageError(f"no network {name!r}{did_you_mean(name.lower(), NETWORKS)}; there are {', '.join(NETWORKS)}")
    check_hyper(name, NETWORKS[name], hyper)
    return NETWORKS[name](in_channels, n_classes, **hyper)


def check_hyper(name: str, kind: type[SegmentationModel], hyper: Mapping[str, Any]) -> None:
    """Refuse what is no hyper-parameter of a network's class.

    Raises:
        UsageError: there is such.
    """
    parameters = inspect.signature(kind).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for word in hyper:
        if word not in known:
            raise UsageError(
                f"{name} has no hyper-parameter {word!r}{did_you_mean(word, known)}; it has {', '.join(known)}"
            )
