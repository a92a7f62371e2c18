"""Power-companded codes for optimizer states: a power law instead of a table or a logarithm.

A value is scaled by its block's largest magnitude, a root of it is rounded to an integer, and the
decoder raises the integer back: squares for signed values (first moments), fourth powers for
values that are never negative (second moments).  Small values keep relative accuracy as a
floating-point format's would, at the price of two multiplications.  A value that is not zero
never becomes code 0 when unsigned: the update divides by its root.

Rounding is to nearest in the companded domain; stochastic rounding is unbiased in the value.
Arithmetic is single fp32 operations, so compiled kernels reproduce the codes exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final, final

import numpy as np
import torch
from torch import Tensor

from .blocks import FlatCodec
from .exact import exact_sqrt
from .scales import block_amax
from .tables import code_table

#: Blocks whose largest magnitude is below this are scaled by it: its reciprocal is finite.
SMALLEST_SCALE: Final = 1e-30


def root_step(largest_code: int) -> float:
    """Return the fp32 number that turns a squared code into a square root of the unit value."""
    return float(np.float32(1.0) / np.float32(largest_code * largest_code))


@functools.cache
def unit_values(bits: int, signed: bool) -> tuple[float, ...]:
    """Return the value of each code (by bit pattern) in a block whose largest magnitude is one."""
    if signed:
        top = 2 ** (bits - 1) - 1
        patterns = np.arange(2**bits)
        codes = np.where(patterns > top, patterns - 2**bits, patterns).clip(-top, top)
        squares = (codes * codes).astype(np.float32) * np.float32(root_step(top))
        return tuple((np.sign(codes).astype(np.float32) * squares).tolist())
    top = 2**bits - 1
    codes = np.arange(2**bits)
    squares = (codes * codes).astype(np.float32) * np.float32(root_step(top))
    return tuple((squares * squares).tolist())


@dataclass(frozen=True)
class _CompandedCodec(FlatCodec):
    """What the 8-bit and the 4-bit codec share."""

    block_size: int = 128
    signed: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(
                f"block_size {self.block_size} of codec {self.name!r} is not a positive even number"
            )

    def block_spec(self) -> dict[str, torch.dtype]:
        return {"absmax": torch.float32}

    def code_values(self) -> tuple[float, ...]:
        return unit_values(self.code_bits, self.signed)

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        absmax = block_amax(blocks)
        floor = absmax.clamp(min=SMALLEST_SCALE)
        if uniform is not None:
            table = code_table(self.code_values(), blocks.device)
            scaled = blocks * (1.0 / floor)[:, None]
            codes = table.stochastic(scaled.clamp(-1.0, 1.0), uniform)
        elif self.signed:
            codes = self._nearest_signed(blocks * (1.0 / floor)[:, None])
        else:
            # Roots first: Adam has sqrt(v) at hand, and small values do not underflow.
            roots = exact_sqrt(blocks.clamp(min=0.0)) * (1.0 / exact_sqrt(floor))[:, None]
            codes = self._nearest_positive(roots)
        if not self.signed:
            codes = torch.where((blocks > 0) & (codes == 0), torch.ones_like(codes), codes)
        return codes, {"absmax": absmax}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        return unit * stats["absmax"]

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        absmax = block_amax(blocks)[:, None]
        # Rounding the root by half a code (or by a whole one) moves the value by at most the gap
        # above it times a little more than a half: the power is convex.
        values = sorted(set(self.code_values()))
        gaps = torch.tensor([b - a for a, b in pairwise(values)])
        widest = float(gaps.max())
        bound = absmax * (widest * (1.0 if stochastic else 0.8) + 1e-5) + SMALLEST_SCALE
        bound = bound.expand(blocks.shape)
        return bound if self.signed else bound + (-blocks).clamp(min=0.0)

    def _nearest_signed(self, scaled: Tensor) -> Tensor:
        top = 2 ** (self.code_bits - 1) - 1
        magnitude = exact_sqrt(scaled.abs()) * float(top) + 0.5
        codes = torch.nan_to_num(magnitude, nan=0.0).clamp(max=float(top)).to(torch.int32)
        codes = torch.where(scaled < 0, -codes, codes) & (2**self.code_bits - 1)
        return codes.to(torch.uint8)

    def _nearest_positive(self, roots: Tensor) -> Tensor:
        top = 2**self.code_bits - 1
        code = exact_sqrt(roots) * float(top) + 0.5
        return torch.nan_to_num(code, nan=0.0).clamp(max=float(top)).to(torch.int32).to(torch.uint8)


@final
@dataclass(frozen=True)
class Companded8Codec(_CompandedCodec):
    """8-bit power codes over flat blocks: parts ``codes`` (shape) and ``absmax`` (fp32 a block).

    ``signed`` codes are -127 .. 127 standing for sign(c) (c/127)^2, unsigned ones 0 .. 255 for
    (c/255)^4.  Cost: 8 + 32 / block_size bits an element.  Worst error: 0.013 of the block's
    largest magnitude; of a value x times the largest, about 0.008 sqrt(x) (signed).

    >>> codec = Companded8Codec(signed=False)
    >>> codec.decode(codec.encode(torch.tensor([1e-12, 0.0, 1.0])), (3,))[1:].tolist()
    [0.0, 1.0]
    """

    name: ClassVar[str] = "companded8"
    code_bits: ClassVar[int] = 8


@final
@dataclass(frozen=True)
class Companded4Codec(_CompandedCodec):
    """4-bit power codes over flat blocks, two codes a byte, the even element in the low half.

    ``signed`` codes are -7 .. 7 standing for sign(c) (c/7)^2, unsigned ones 0 .. 15 for
    (c/15)^4.  Cost: 4 + 32 / block_size bits an element.

    >>> Companded4Codec(block_size=64).nbytes((128,))
    72
    """

    name: ClassVar[str] = "companded4"
    code_bits: ClassVar[int] = 4
