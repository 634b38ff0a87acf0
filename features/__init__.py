"""Tiles into vectors in a Zarr store.

>>> from features import FeatureStore, extract_slides
>>> extract_slides("slides/", "out", "uni2-h")
>>> FeatureStore("out").slide("case-1.svs").features("uni2-h").torch()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from features.cohort import extract_slides
    from features.encoder import Encoder, EncoderRequest, EncoderSpec, known_encoders, load_encoder
    from features.extract import encode_slide
    from features.outcome import Report
    from features.pipeline import ExtractOptions
    from features.prepare import PrepareOptions
    from features.runner import EncoderRunner
    from features.store import Features, FeatureStore, SlideStore

__all__ = [
    "Encoder",
    "EncoderRequest",
    "EncoderRunner",
    "EncoderSpec",
    "ExtractOptions",
    "FeatureStore",
    "Features",
    "PrepareOptions",
    "Report",
    "SlideStore",
    "encode_slide",
    "extract_slides",
    "known_encoders",
    "load_encoder",
]

# Loaded when first asked for, so that reading a store does not wait for torch.
_HOME = {
    "extract_slides": "features.cohort",
    **dict.fromkeys(("Encoder", "EncoderRequest", "EncoderSpec", "known_encoders", "load_encoder"), "features.encoder"),
    "encode_slide": "features.extract",
    "Report": "features.outcome",
    "ExtractOptions": "features.pipeline",
    "EncoderRunner": "features.runner",
    "PrepareOptions": "features.prepare",
    **dict.fromkeys(("FeatureStore", "Features", "SlideStore"), "features.store"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'features' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
