"""Small floating-point formats: rounding to their grid, bit patterns, error bounds.

Everything saturates: a finite value beyond the largest finite one becomes that one.  (Casts of
torch to these types differ between formats and versions in this, so values are clamped first.)
Sign, then exponent, then mantissa; subnormals are kept.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from .rounding import round_half_even, round_stochastic
from .scales import power_of_two
from .tables import code_table


@final
@dataclass(frozen=True, slots=True)
class MiniFloat:
    """A floating-point format of at most 8 bits without infinities in use.

    >>> E2M1.values()[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    >>> E4M3.largest, E5M2.largest, E2M1.largest
    (448.0, 57344.0, 6.0)
    """

    name: str
    mantissa_bits: int
    exponent_bits: int
    bias: int
    largest: float

    @property
    def code_bits(self) -> int:
        """Bits of a pattern, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_step(self) -> float:
        """Distance of neighbours around zero: the smallest subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest finite value: floor(log2(largest))."""
        return math.frexp(self.largest)[1] - 1

    def round(self, y: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Round fp32 to the format's grid: to nearest even, or stochastically; saturates.

        NaN stays NaN; the sign of zero is kept.
        """
        y = y.clamp(-self.largest, self.largest)
        magnitude = y.abs()
        exponent = torch.frexp(magnitude)[1].sub_(1).clamp_(min=1 - self.bias)
        step = power_of_two(exponent - self.mantissa_bits)
        scaled = magnitude / step
        if uniform is None:
            rounded = round_half_even(scaled)
        else:
            rounded = round_stochastic(scaled, uniform)
        return torch.copysign(rounded * step, y)

    def encode(self, y: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Return the uint8 bit pattern of each value after rounding (``round``)."""
        if self.code_bits == 8:
            dtype = torch.float8_e4m3fn if self.mantissa_bits == 3 else torch.float8_e5m2
            if uniform is None:
                clamped = y.clamp(-self.largest, self.largest)
                return clamped.to(dtype).view(torch.uint8)
            return self.round(y, uniform).to(dtype).view(torch.uint8)
        grid = self.round(y, uniform)
        positive = self.values()[: 1 << (self.code_bits - 1)]
        code = code_table(positive, y.device).nearest(grid.abs())
        sign = torch.signbit(grid).to(torch.uint8) << (self.code_bits - 1)
        return code | sign

    def values(self) -> tuple[float, ...]:
        """Return the value of every bit pattern (NaN and infinity where the format has them)."""
        return _values(self)

    def error(self, y: Tensor, *, stochastic: bool) -> Tensor:
        """Bound the rounding error of fp32 values: half a step (a whole one if stochastic).

        Beyond the largest value the distance to it is added.
        """
        half = 1.0 if stochastic else 0.5
        magnitude = y.abs()
        relative = magnitude * (half * 2.0**-self.mantissa_bits)
        return relative.clamp(min=half * self.smallest_step) + (magnitude - self.largest).clamp(
            min=0.0
        )


@functools.cache
def _values(fmt: MiniFloat) -> tuple[float, ...]:
    if fmt.code_bits == 8:
        dtype = torch.float8_e4m3fn if fmt.mantissa_bits == 3 else torch.float8_e5m2
        patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        return tuple(patterns.view(dtype).to(torch.float32).tolist())
    values = []
    for code in range(1 << fmt.code_bits):
        sign = -1.0 if code >> (fmt.code_bits - 1) else 1.0
        exponent = (code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
        mantissa = (code & ((1 << fmt.mantissa_bits) - 1)) / (1 << fmt.mantissa_bits)
        if exponent == 0:
            values.append(sign * mantissa * 2.0 ** (1 - fmt.bias))
        else:
            values.append(sign * (1.0 + mantissa) * 2.0 ** (exponent - fmt.bias))
    return tuple(values)


E4M3: Final = MiniFloat("e4m3", mantissa_bits=3, exponent_bits=4, bias=7, largest=448.0)
E5M2: Final = MiniFloat("e5m2", mantissa_bits=2, exponent_bits=5, bias=15, largest=57344.0)
E2M1: Final = MiniFloat("e2m1", mantissa_bits=1, exponent_bits=2, bias=1, largest=6.0)


def eight_bit_float(name: str) -> MiniFloat:
    """Return E4M3 or E5M2 by name."""
    for fmt in (E4M3, E5M2):
        if fmt.name == name:
            return fmt
    raise ValueError(f"element format {name!r} is not known; choose 'e4m3' or 'e5m2'")
