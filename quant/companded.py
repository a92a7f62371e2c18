"""Power-companded codes for optimizer states: a shift of the bit pattern instead of a root.

A floating-point number's bits, read as an integer, are a piecewise linear logarithm (Mitchell,
1962), straight within a binade: halving the integer takes a square root, doubling it squares.  A
value is scaled by its block's largest magnitude, its bits are shifted right (by one for signed
values, first moments; by two for values that are never negative, second moments), and the result
is rounded to an integer code; the decoder shifts back.  Both directions are inverse to each other
bit for bit, so that rounding to the nearest code is the only error.  A code's value lies within
12 % of the true square, or 21 % of the true fourth power, and on it at powers of two.

Small values keep relative accuracy as a floating-point format's would.  A value that is not zero
never becomes code 0 when unsigned: the update divides by its root.  Stochastic rounding is
unbiased in the value.  Arithmetic is single fp32 and integer operations, so compiled kernels
reproduce the codes exactly, on any device.
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
from .scales import block_amax
from .tables import code_table

#: Blocks whose largest magnitude is below this are scaled by it: its reciprocal is finite.
SMALLEST_SCALE: Final = 1e-30


#: fp32 bits of 1.0, and the number whose addition leaves an integer in the low mantissa bits.
_ONE: Final = 0x3F80_0000
_ROUNDER: Final = 2.0**23


@final
@dataclass(frozen=True, slots=True)
class Law:
    """The numbers of one companding: codes up to ``top``, bits shifted by ``shift``.

    ``lead`` is what a block's largest magnitude is scaled to: the mantissa of the top code's
    value, so that no reciprocal overflows.  ``into`` is added to shifted bits of a value, ``out``
    is taken off shifted bits of a code (modulo 2^32).

    >>> law_of(8, signed=True)
    Law(top=127, shift=1, lead=1.96875, into=587202560, out=1174405120)
    """

    top: int
    shift: int
    lead: float
    into: int
    out: int

    @property
    def unlead(self) -> float:
        """The fp32 number that turns a block's largest magnitude into the step of its codes."""
        return float(np.float32(1.0) / np.float32(self.lead))


@functools.cache
def law_of(bits: int, *, signed: bool) -> Law:
    """Return the companding of a code width: squares if signed, else fourth powers."""
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    shift = 1 if signed else 2
    pattern = int(np.float32(top).view(np.uint32))
    value = (pattern << shift) - ((1 << shift) - 1) * _ONE
    lead = _ONE | (value & 0x7F_FFFF)
    return Law(
        top=top,
        shift=shift,
        lead=float(np.uint32(lead).view(np.float32)),
        into=pattern - (lead >> shift),
        out=((pattern << shift) - lead) & 0xFFFF_FFFF,
    )


@functools.cache
def unit_values(bits: int, signed: bool) -> tuple[float, ...]:
    """Return the value of each code (by bit pattern) in a block scaled to ``lead``."""
    law = law_of(bits, signed=signed)
    codes = np.arange(2**bits)
    if signed:
        codes = np.where(codes > law.top, codes - 2**bits, codes)
    patterns = np.abs(codes).astype(np.float32).view(np.uint32).astype(np.uint64)
    patterns = ((patterns << np.uint64(law.shift)) - np.uint64(law.out)).astype(np.uint32)
    values = np.where(codes == 0, np.float32(0.0), patterns.view(np.float32))
    return tuple(np.where(codes < 0, -values, values).tolist())


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
        law = law_of(self.code_bits, signed=self.signed)
        absmax = block_amax(blocks)
        scaled = blocks * (law.lead / absmax.clamp(min=SMALLEST_SCALE))[:, None]
        if uniform is not None:
            table = code_table(self.code_values(), blocks.device)
            codes = table.stochastic(scaled.clamp(-law.lead, law.lead), uniform)
        else:
            magnitude = scaled.abs() if self.signed else scaled.clamp(min=0.0)
            codes = self._nearest(magnitude, law)
            if self.signed:
                codes = torch.where(blocks < 0, -codes, codes) & (2**self.code_bits - 1)
            codes = codes.to(torch.uint8)
        if not self.signed:
            codes = torch.where((blocks > 0) & (codes == 0), torch.ones_like(codes), codes)
        return codes, {"absmax": absmax}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        return unit * (stats["absmax"] * law_of(self.code_bits, signed=self.signed).unlead)

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        absmax = block_amax(blocks)[:, None]
        values = sorted(set(self.code_values()))
        law = law_of(self.code_bits, signed=self.signed)
        # The curve is straight between the codes with the widest gaps: half of one is the bound.
        widest = max(b - a for a, b in pairwise(values) if abs(a) <= law.lead) / law.lead
        bound = absmax * (widest * (1.0 if stochastic else 0.5) + 1e-5) + SMALLEST_SCALE
        bound = bound.expand(blocks.shape)
        return bound if self.signed else bound + (-blocks).clamp(min=0.0)

    @staticmethod
    def _nearest(magnitude: Tensor, law: Law) -> Tensor:
        """Return int32 codes; NaN gets the top one (its block is NaN anyway)."""
        capped = torch.where(magnitude < law.lead, magnitude, torch.full_like(magnitude, law.lead))
        root = ((capped.contiguous().view(torch.int32) >> law.shift) + law.into).view(torch.float32)
        return (root + _ROUNDER).view(torch.int32) & 0xFF


@final
@dataclass(frozen=True)
class Companded8Codec(_CompandedCodec):
    """8-bit power codes over flat blocks: parts ``codes`` (shape) and ``absmax`` (fp32 a block).

    ``signed`` codes are -127 .. 127 standing for about sign(c) (c/127)^2, unsigned ones 0 .. 255
    for about (c/255)^4.  Cost: 8 + 32 / block_size bits an element.  Worst error: 0.0080 of the
    block's largest magnitude, halving with every second binade below it (unsigned: fourth).

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

    ``signed`` codes are -7 .. 7 standing for about sign(c) (c/7)^2, unsigned ones 0 .. 15 for
    about (c/15)^4.  Cost: 4 + 32 / block_size bits an element.

    >>> Companded4Codec(block_size=64).nbytes((128,))
    72
    """

    name: ClassVar[str] = "companded4"
    code_bits: ClassVar[int] = 4
