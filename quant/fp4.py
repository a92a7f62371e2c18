"""FP4 as bitsandbytes defines it (not the OCP map): less accurate than NF4, kept for its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from .four_bit import FourBitTableCodec
from .tables import fp4_values


@final
@dataclass(frozen=True)
class Fp4Codec(FourBitTableCodec):
    """4-bit floats with a subnormal of 1/192, byte for byte as bitsandbytes packs them.

    Parts and cost as ``Nf4Codec``.  Worst error in a block: absmax / 6 (half the gap between
    2/3 and 1).

    >>> Fp4Codec().code_values()[2:4]
    (0.6666666865348816, 1.0)
    """

    name: ClassVar[str] = "fp4"
    code_bits: ClassVar[int] = 4
    high_first: ClassVar[bool] = True

    def code_values(self) -> tuple[float, ...]:
        return fp4_values()
