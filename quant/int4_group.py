"""INT4 in groups along the last axis: signed, unsigned, or affine (scale and minimum).

Packed two to a byte, even element in the low four bits.  The signed code is stored as q + 8,
the convention of GPTQ checkpoints.  Codes are chosen with the scale as stored, so a 16-bit scale
costs range, never a shifted grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from .blocks import RowCodec
from .rounding import round_half_even, round_stochastic
from .scales import (
    SCALE_DTYPES,
    SMALLEST_SUBNORMAL,
    block_amax,
    check_scale_dtype,
    divide,
    poison,
    quotient,
    to_codes,
)


@final
@dataclass(frozen=True)
class Int4GroupCodec(RowCodec):
    """4-bit integers in groups: parts ``codes`` (uint8, half the columns), ``scale``, ``minimum``.

    ``mode``:

    * ``"signed"``: x = scale * q, q in -7 .. 7, scale = amax / 7;
    * ``"unsigned"``: x = scale * q, q in 0 .. 15, scale = amax / 15, for values that are never
      negative (negative ones become 0);
    * ``"affine"``: x = minimum + scale * q, q in 0 .. 15, scale = (max - min) / 15; the range
      always holds 0, and a group whose max - min overflows becomes NaN.

    Cost: 4 + scale bits / block_size (twice that for affine).  Worst error in a group: half a
    scale as stored (a whole one if stochastic), plus what the rounding of a 16-bit scale cuts
    off the end: at most 2^-8 of the range in bf16, 2^-11 in fp16.

    >>> codec = Int4GroupCodec(block_size=4)
    >>> codec.decode(codec.encode(torch.tensor([7.0, -7.0, 1.0, 0.0])), (4,))
    tensor([ 7., -7.,  1.,  0.])
    """

    name: ClassVar[str] = "int4_group"
    code_bits: ClassVar[int] = 4

    block_size: int = 128
    mode: str = "signed"
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.block_size < 0:
            raise ValueError(f"block_size {self.block_size} of codec {self.name!r} is negative")
        if self.mode not in ("signed", "unsigned", "affine"):
            raise ValueError(
                f"mode {self.mode!r} of codec {self.name!r} is not known; choose 'signed', "
                f"'unsigned' or 'affine'"
            )
        check_scale_dtype(self.scale_dtype)

    def block_spec(self) -> dict[str, torch.dtype]:
        dtype = SCALE_DTYPES[self.scale_dtype]
        return {"scale": dtype} | ({"minimum": dtype} if self.mode == "affine" else {})

    def code_values(self) -> tuple[float, ...]:
        shift = 8 if self.mode == "signed" else 0
        return tuple(float(code - shift) for code in range(16))

    @property
    def zero_code(self) -> int:
        return 8 if self.mode == "signed" else 0

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = self._numbers(blocks)
        scale = numbers["scale"].to(torch.float32)
        low, high, shift = (-7.0, 7.0, 8) if self.mode == "signed" else (0.0, 15.0, 0)
        if self.mode == "affine":
            blocks = blocks - numbers["minimum"].to(torch.float32)[:, None]
        scaled = divide(blocks, scale)
        rounded = round_half_even(scaled) if uniform is None else round_stochastic(scaled, uniform)
        codes = (to_codes(rounded.clamp(low, high)) + shift).to(torch.uint8)
        return codes, numbers

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        values = unit * stats["scale"].to(torch.float32)
        if self.mode == "affine":
            values += stats["minimum"].to(torch.float32)
        return values

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        amax = block_amax(blocks)[:, None]
        scale = self._numbers(blocks)["scale"].to(torch.float32)[:, None]
        cut = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "float16": 2.0**-11}[self.scale_dtype]
        span = amax * (2.0 if self.mode == "affine" else 1.0)
        underflow = 32 * SMALLEST_SUBNORMAL[self.scale_dtype]
        bound = scale * (1.0 if stochastic else 0.5) + span * (2 * cut) + underflow
        bound = bound.expand(blocks.shape)
        return bound + (-blocks).clamp(min=0.0) if self.mode == "unsigned" else bound

    def _numbers(self, blocks: Tensor) -> dict[str, Tensor]:
        dtype = SCALE_DTYPES[self.scale_dtype]
        if self.mode == "affine":
            amax = block_amax(blocks)
            minimum = poison(blocks.amin(dim=1).clamp(max=0.0).to(dtype))
            maximum = blocks.amax(dim=1).clamp(min=0.0)
            scale = quotient(maximum - minimum.to(torch.float32), 15.0)
            scale = torch.where(torch.isnan(amax), amax, scale)
            return {"scale": poison(scale.to(dtype)), "minimum": minimum}
        steps = 7.0 if self.mode == "signed" else 15.0
        return {"scale": poison(quotient(block_amax(blocks), steps).to(dtype))}
