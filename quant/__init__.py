"""Codecs for weights, states and activations, and layers over encoded weights.

Start with ``codec_from_parameters`` or ``codec_for_format("nf4")``; every codec is a ``Codec``.
"""

from .codec import Codec
from .rounding import CounterGenerator
from .spec import TensorSpec

__all__ = ["Codec", "CounterGenerator", "TensorSpec"]
