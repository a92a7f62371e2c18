"""NF4: 4-bit codes at the quantiles of the normal distribution, as QLoRA stores frozen weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from .four_bit import FourBitTableCodec
from .tables import NF4_VALUES


@final
@dataclass(frozen=True)
class Nf4Codec(FourBitTableCodec):
    """4-bit NormalFloat (Dettmers et al., 2023), byte for byte as bitsandbytes packs it.

    Parts: ``codes`` (uint8, two elements a byte, flat), ``absmax`` (uint8, one a block),
    ``nested_absmax`` (fp32, one per 256 blocks), ``nested_offset`` (fp32, scalar); without
    double quantisation ``codes`` and ``absmax`` (fp32).  Cost at block 64: 4.127 bits an element,
    4.5 without double quantisation.  Worst error in a block: 0.152 * absmax (half the widest gap
    of the table; twice that stochastically), plus with double quantisation 0.0071 times the
    largest distance of 256 neighbouring magnitudes from their mean.

    >>> import torch
    >>> codec = Nf4Codec(double_quantized=False)
    >>> hex(codec.encode(torch.tensor([-1.0, 1.0]))["codes"].item())
    '0xf'
    """

    name: ClassVar[str] = "nf4"
    code_bits: ClassVar[int] = 4
    high_first: ClassVar[bool] = True

    def code_values(self) -> tuple[float, ...]:
        return NF4_VALUES

    @property
    def zero_code(self) -> int:
        return 7
