"""OCP microscaling (MX): blocks of 32 small floats share a power-of-two scale (E8M0).

The scale is a biased exponent byte b: X = 2^(b - 127), and 255 means NaN.  Rules for choosing it
from a block's largest magnitude:

* ``"floor"``: floor(log2 amax) - e_max (the OCP specification; values above the largest one
  saturate);
* ``"even"``: amax rounded to the element's mantissa first, then floor (best for MXFP4 weights);
* ``"ceil"``: ceil(log2 amax) - e_max;
* ``"rceil"``: ceil(log2(amax / largest)) (NVIDIA's recipe; never saturates).

X is kept within 2^-127 .. 2^(127 - e_max), so that every code is finite in fp32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .blocks import RowCodec
from .minifloat import MiniFloat
from .scales import block_amax, power_of_two, quotient

SCALE_RULES: Final = ("floor", "even", "ceil", "rceil")
_BIAS: Final = 127
_NAN_BYTE: Final = 255


def shared_exponent(amax: Tensor, fmt: MiniFloat, rule: str) -> Tensor:
    """Return the biased E8M0 byte (uint8) for fp32 block magnitudes; NaN gives 255.

    >>> from .minifloat import E4M3
    >>> amax = torch.tensor([448.0, 449.0])
    >>> [shared_exponent(amax, E4M3, rule).tolist() for rule in ("floor", "rceil")]
    [[127, 127], [127, 128]]
    """
    if rule == "rceil":
        bits = quotient(amax, fmt.largest).view(torch.int32)
        exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7F_FFFF
        # Exponent field 0 is subnormal: up to 2^-127 the byte is 0, above it 1.
        up = torch.where(exponent == 0, mantissa > 0x40_0000, mantissa > 0)
        biased = exponent + up.to(torch.int32)
    else:
        bits = amax.view(torch.int32)
        if rule == "even":
            bits = bits + (1 << (23 - fmt.mantissa_bits - 1))
        exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7F_FFFF
        if rule == "ceil":
            exponent = exponent + (mantissa > 0).to(torch.int32)
        biased = exponent - fmt.largest_exponent
    # Beyond this the largest codes would overflow fp32; the values saturate instead.
    biased = biased.clamp(0, 2 * _BIAS - fmt.largest_exponent)
    return torch.where(torch.isnan(amax), torch.full_like(biased, _NAN_BYTE), biased).to(
        torch.uint8
    )


@dataclass(frozen=True)
class MxCodec(RowCodec):
    """Common arithmetic of the MX formats."""

    @property
    @abstractmethod
    def float_format(self) -> MiniFloat:
        """The element format."""

    @property
    @abstractmethod
    def scale_rule(self) -> str:
        """One of ``SCALE_RULES``."""

    def __post_init__(self) -> None:
        if self.scale_rule not in SCALE_RULES:
            raise ValueError(
                f"scale_rule {self.scale_rule!r} of codec {self.name!r} is not known; choose one "
                f"of {SCALE_RULES}"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} of codec {self.name!r} is below 1")

    def block_spec(self) -> dict[str, torch.dtype]:
        return {"scale": torch.uint8}

    def code_values(self) -> tuple[float, ...]:
        return self.float_format.values()

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scale = shared_exponent(block_amax(blocks), self.float_format, self.scale_rule)
        inverse = power_of_two(_BIAS - scale.to(torch.int32))
        return self.float_format.encode(blocks * inverse[:, None], uniform), {"scale": scale}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        return unit * _factor(stats["scale"])

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        scale = shared_exponent(block_amax(blocks), self.float_format, self.scale_rule)
        inverse = power_of_two(_BIAS - scale.to(torch.int32))[:, None]
        error = self.float_format.error(blocks * inverse, stochastic=stochastic)
        # 2^-147: results below fp32's smallest subnormals are rounded on the way out.
        return error * _factor(scale)[:, None] + 2.0**-147


def _factor(scale: Tensor) -> Tensor:
    factor = power_of_two(scale.to(torch.int32) - _BIAS)
    return torch.where(scale == _NAN_BYTE, torch.full_like(factor, float("nan")), factor)
