"""MXFP8: 8-bit floats in blocks of 32 with a power-of-two scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from .minifloat import MiniFloat, eight_bit_float
from .mx import MxCodec


@final
@dataclass(frozen=True)
class Mxfp8Codec(MxCodec):
    """Parts ``codes`` (uint8 bit patterns, shape) and ``scale`` (uint8 E8M0, one per block).

    Cost: 8.25 bits an element.  Worst error (e4m3): |x| / 16, at least X * 2^-10; with the rules
    ``floor`` and ``even`` values above 448 X saturate, which adds up to 64 X.

    >>> import torch
    >>> codec = Mxfp8Codec()
    >>> codec.decode(codec.encode(torch.tensor([3.0, -0.5])), (2,))
    tensor([ 3.0000, -0.5000])
    """

    name: ClassVar[str] = "mxfp8"
    code_bits: ClassVar[int] = 8

    element: str = "e4m3"
    scale_rule: str = "rceil"
    block_size: int = 32

    @property
    def float_format(self) -> MiniFloat:
        return eight_bit_float(self.element)
