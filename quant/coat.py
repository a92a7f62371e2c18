"""FP8 with dynamic range expansion: a power per group spreads the values over E4M3's range.

Xi et al., 2024 (COAT), for optimizer states: the values of a group often span fewer binades than
E4M3 can tell apart, so magnitudes are raised to a power k before the cast, with
k = log(448^2 / 2) / log(max / min) rounded down to a sixteenth.  Differences from the paper: the
centre sqrt(max * min) and the scale are kept as base-2 logarithms, so that no ratio overflows;
``min`` is the smallest *nonzero* magnitude, and zeros stay zeros; k is limited to 1/16 .. 15.9
and kept in one byte, so that a decoder on another device cannot compute another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from .blocks import FlatCodec
from .logarithm import exp2, log2
from .minifloat import E4M3

_RANGE_BITS: Final = math.log2(E4M3.largest**2 / 2)


@final
@dataclass(frozen=True)
class CoatCodec(FlatCodec):
    """Range-expanded E4M3 over flat groups.

    Parts: ``codes`` (uint8, shape), ``log2_centre`` and ``log2_scale`` (fp32), ``power`` (uint8:
    16 k), one of each per group.  A code q stands for sign * |q * scale|^(1/k) * centre.  Cost: 8
    + 72 / block_size bits an element.  Worst relative error: (1 / (1 - r))^(1/k) - 1 with r =
    1/16 for E4M3's normal numbers; no nonzero value becomes zero.  That gain needs narrow groups:
    at k = 1 it is plain FP8.

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
        return {
            "log2_centre": torch.float32,
            "log2_scale": torch.float32,
            "power": torch.uint8,
        }

    def code_values(self) -> tuple[float, ...]:
        return E4M3.values()

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = self._numbers(blocks)
        expanded = self._expanded(blocks, numbers)
        codes = E4M3.encode(expanded, uniform)
        # A nonzero value never becomes code 0 (or 0x80): it takes the smallest subnormal.
        lost = (blocks != 0) & ((codes & 0x7F) == 0)
        return codes + lost.to(torch.uint8), numbers

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        power = stats["power"].to(torch.float32) / 16.0
        exponent = (log2(unit.abs()) + stats["log2_scale"]) / power + stats["log2_centre"]
        return torch.copysign(exp2(exponent), unit)

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        numbers = self._numbers(blocks)
        y = self._expanded(blocks, numbers).abs()
        relative = E4M3.error(y.clamp(max=E4M3.largest), stochastic=stochastic) / y
        inverse_power = (16.0 / numbers["power"].to(torch.float32))[:, None]
        grown = torch.exp2(torch.log2(1.0 + relative + 1e-4) * inverse_power) - 1.0
        shrunk = 1.0 - (1.0 - relative - 1e-4).clamp(min=0.0) ** inverse_power
        bound = blocks.abs() * torch.maximum(grown, shrunk) + 2.0**-140
        return torch.where(blocks == 0, torch.zeros_like(bound), bound)

    def _numbers(self, blocks: Tensor) -> dict[str, Tensor]:
        logs = log2(blocks.abs())  # -inf for zeros
        high = logs.amax(dim=1)
        finite = torch.isfinite(logs)
        low = torch.where(finite, logs, torch.full_like(logs, float("inf"))).amin(dim=1)
        empty = ~finite.any(dim=1) & ~torch.isnan(high) & (high < 0)
        high = torch.where(empty, torch.zeros_like(high), high)
        low = torch.where(empty, torch.zeros_like(low), low)
        # NaN or inf in the block: high is NaN or +inf, and the centre must be NaN.
        high = torch.where(torch.isfinite(high), high, torch.full_like(high, float("nan")))
        centre = (high + low) / 2.0
        half_span = (high - low) / 2.0
        power = torch.floor(_RANGE_BITS / (2.0 * half_span).clamp(min=1e-3) * 16.0)
        power = torch.nan_to_num(power, nan=16.0).clamp(1.0, 255.0)
        log2_scale = half_span * (power / 16.0) - math.log2(E4M3.largest)
        return {
            "log2_centre": centre,
            "log2_scale": log2_scale,
            "power": power.to(torch.uint8),
        }

    @staticmethod
    def _expanded(blocks: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        power = numbers["power"].to(torch.float32)[:, None] / 16.0
        centred = log2(blocks.abs()) - numbers["log2_centre"][:, None]
        exponent = centred * power - numbers["log2_scale"][:, None]
        return torch.copysign(exp2(exponent), blocks)
