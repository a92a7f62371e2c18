"""Codecs for weights, states and activations, and layers over encoded weights.

Start with ``codec_for_format("nf4")`` or ``codec_from_parameters``; every codec is a ``Codec``.
"""

from .codec import Codec
from .registry import codec_classes, codec_for_format, codec_from_parameters
from .rounding import CounterGenerator
from .spec import TensorSpec

__all__ = [
    "Codec",
    "CounterGenerator",
    "TensorSpec",
    "codec_classes",
    "codec_for_format",
    "codec_from_parameters",
]
