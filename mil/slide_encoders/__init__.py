"""Slide encoders: tile features in, one vector a slide out, without labels; one paper a file."""

from mil.slide_encoders.base import SlideEmbedding, SlideEncoder
from mil.slide_encoders.chief import CHIEF
from mil.slide_encoders.cobra import COBRA
from mil.slide_encoders.loading import (
    KINDS,
    LoadedSlideEncoder,
    SlideEncoderRequest,
    load_slide_encoder,
    save_slide_encoder,
)
from mil.slide_encoders.madeleine import MADELEINE
from mil.slide_encoders.zoo import SLIDE_ZOO, SlideEncoderSpec

__all__ = [
    "CHIEF",
    "COBRA",
    "KINDS",
    "MADELEINE",
    "SLIDE_ZOO",
    "LoadedSlideEncoder",
    "SlideEmbedding",
    "SlideEncoder",
    "SlideEncoderRequest",
    "SlideEncoderSpec",
    "load_slide_encoder",
    "save_slide_encoder",
]
