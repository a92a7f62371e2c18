"""MXFP4: E2M1 values in blocks of 32 with a power-of-two scale, as gpt-oss ships its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from .minifloat import E2M1, MiniFloat
from .mx import MxCodec


@final
@dataclass(frozen=True)
class Mxfp4Codec(MxCodec):
    """Parts ``codes`` (uint8, two elements a byte, even one low) and ``scale`` (uint8 E8M0).

    Cost: 4.25 bits an element.  Worst error: |x| / 4, at least X / 4; with the rules ``floor``
    and ``even`` values above 6 X saturate, which adds up to 2 X.

    >>> import torch
    >>> codec = Mxfp4Codec()
    >>> codec.encode(torch.tensor([[1.0, -6.0]]))["codes"]
    tensor([[242]], dtype=torch.uint8)
    """

    name: ClassVar[str] = "mxfp4"
    code_bits: ClassVar[int] = 4

    scale_rule: str = "even"
    block_size: int = 32

    @property
    def float_format(self) -> MiniFloat:
        return E2M1
