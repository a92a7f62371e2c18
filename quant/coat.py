"""FP8 with dynamic range expansion: a power per group spreads the values over E4M3's range.

Xi et al., 2024 (COAT), for optimizer states: the values of a group often span fewer binades than
E4M3 can tell apart, so magnitudes are raised to a power k before the cast, with
k = log(448^2 / 2) / log(max / min) rounded down to a sixteenth.  Differences from the paper:

* Logarithms are piecewise linear (Mitchell, 1962): the bits of a floating-point number read as an
  integer.  Powers are then products of integers, the decoder inverts the encoder exactly, and
  every device computes the same; the expanded values lie within 13 % of the paper's.
* A group keeps its largest magnitude and k; the paper's centre and scale follow from them.
* ``min`` is the smallest *nonzero* magnitude, and zeros stay zeros; k is limited to 1/16 .. 15.9
  and kept in one byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from .blocks import FlatCodec
from .minifloat import E4M3
from .scales import block_amax

#: fp32 bits of 448.
LARGEST_BITS: Final = 0x43E0_0000
#: Sixteen times the distance in bits from 2 / 448 to 448: what groups are spread over.
RANGE_SIXTEENTHS: Final = (LARGEST_BITS - 0x3B92_4925) * 16
#: How far below 448 an expanded value may lie, in bits: beyond it, it is below every code.
DEEPEST_BITS: Final = float(0x2000_0000)


@final
@dataclass(frozen=True)
class CoatCodec(FlatCodec):
    """Range-expanded E4M3 over flat groups.

    Parts: ``codes`` (uint8, shape), ``absmax`` (fp32) and ``power`` (uint8: 16 k), one of each
    per group.  A code q stands for about sign * |q / 448|^(1/k) * absmax.  Cost: 8 + 40 /
    block_size bits an element.  Worst relative error: 2^(1 / (8 k)) - 1 for E4M3's normal
    numbers; no nonzero value becomes zero.  That gain needs narrow groups: at k = 1 it is plain
    FP8.

    >>> codec = CoatCodec()
    >>> codec.decode(codec.encode(torch.tensor([1e-20, 0.0, -1e-20])), (3,))[1]
    tensor(0.)
    """

    name: ClassVar[str] = "coat"
    code_bits: ClassVar[int] = 8

    block_size: int = 128

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} of codec {self.name!r} is below 1")

    def block_spec(self) -> dict[str, torch.dtype]:
        return {"absmax": torch.float32, "power": torch.uint8}

    def code_values(self) -> tuple[float, ...]:
        return E4M3.values()

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = self._numbers(blocks)
        expanded = torch.copysign(self._expanded(blocks, numbers), blocks)
        codes = E4M3.encode(expanded, uniform)
        zero = blocks == 0
        # A nonzero value never becomes code 0 (or 0x80): it takes the smallest subnormal.
        lost = ~zero & ((codes & 0x7F) == 0)
        codes = torch.where(zero, torch.zeros_like(codes), codes + lost.to(torch.uint8))
        return codes, numbers

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        shrunk = torch.copysign(self._shrunk(unit.abs(), stats), unit)
        # Adds nothing, or NaN: the bits of a group that is not finite are like any others.
        return torch.where(unit == 0, 0.0, shrunk) + (stats["absmax"] - stats["absmax"])

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        numbers = self._numbers(blocks)
        column = {name: value[:, None] for name, value in numbers.items()}
        y, x = self._expanded(blocks, numbers), blocks.abs()
        error = E4M3.error(y, stochastic=stochastic) + (E4M3.smallest_step - y).clamp(min=0.0)
        error = error * (1 + 1e-3) + 1e-6
        above = self._shrunk((y + error).clamp(max=E4M3.largest), column) - x
        below = x - self._shrunk((y - error).clamp(min=1e-30), column)
        bound = torch.maximum(above, below).abs() + x * 1e-3 + 2.0**-140
        return torch.where(blocks == 0, torch.zeros_like(bound), bound)

    @staticmethod
    def _numbers(blocks: Tensor) -> dict[str, Tensor]:
        absmax = block_amax(blocks)
        bits = _bits(blocks.abs())
        smallest = torch.where(bits == 0, torch.full_like(bits, 0x7F80_0000), bits).amin(dim=1)
        span = (_bits(absmax) - smallest).clamp(min=1).to(torch.float32)
        power = torch.floor(float(RANGE_SIXTEENTHS) / span).clamp(1.0, 255.0)
        return {"absmax": absmax, "power": power.to(torch.uint8)}

    @staticmethod
    def _expanded(blocks: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """Return the expanded magnitudes, 448 at most."""
        power = (numbers["power"].to(torch.float32) * (1 / 16))[:, None]
        below = _bits(numbers["absmax"])[:, None] - _bits(blocks.abs())
        depth = (below.to(torch.float32) * power).clamp(0.0, DEEPEST_BITS)
        return (LARGEST_BITS - depth.to(torch.int32)).view(torch.float32)

    @staticmethod
    def _shrunk(expanded: Tensor, stats: Mapping[str, Tensor]) -> Tensor:
        """Return the magnitudes that expanded ones stand for; statistics are (groups, 1)."""
        inverse = 16.0 / stats["power"].to(torch.float32)
        below = (LARGEST_BITS - _bits(expanded)).to(torch.float32) * inverse
        bits = _bits(stats["absmax"]) - below.clamp(max=float(2**30)).to(torch.int32)
        return bits.clamp(min=0).view(torch.float32)


def _bits(magnitudes: Tensor) -> Tensor:
    return magnitudes.contiguous().view(torch.int32)
