"""The code tables of the lookup formats, and nearest or stochastic search in a table.

Tables are plain tuples of floats (exact fp32 values).  ``CodeTable`` holds one table's tensors on
a device; ``code_table`` remembers them, since copying a table to an accelerator on every call
would stall it.  The tables are constants, so the memory is never stale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

#: NF4: quantiles of the normal distribution (Dettmers et al., 2023, QLoRA), as fp32.
NF4_VALUES: Final[tuple[float, ...]] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

#: FP4 of bitsandbytes by bit pattern: sign, two exponent bits of bias 2, one mantissa bit; / 12.
FP4_TWELFTHS: Final[tuple[float, ...]] = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@functools.cache
def fp4_values() -> tuple[float, ...]:
    """Return the 16 values of bitsandbytes' FP4 by bit pattern (8 is a second zero)."""
    positive = torch.tensor(FP4_TWELFTHS, dtype=torch.float32) / 12.0
    return tuple(positive.tolist()) + tuple((-positive).tolist())


@functools.cache
def dynamic_map(*, signed: bool = True) -> tuple[float, ...]:
    """Return the 256 ascending values of the 8-bit dynamic map (Dettmers et al., 2022).

    Seven decades; decade i holds 2^i (signed, each sign) or 2^(i+1) (unsigned) values at the
    centres of equal intervals of [0.1, 1] times 10^(i-6); then 0 and 1.  All fp32.
    """
    values: list[float] = [0.0, 1.0]
    for decade in range(7):
        intervals = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, intervals + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2.0
        scaled = 10.0 ** (decade - 6) * centres
        values += scaled.tolist()
        if signed:
            values += (-scaled).tolist()
    assert len(values) == 256, "254 centres, zero and one"
    return tuple(sorted(values))


@final
@dataclass(frozen=True, slots=True)
class CodeTable:
    """A code table's tensors on one device, in code order and in ascending order."""

    values: Tensor  # (codes,) fp32, by code
    ascending: Tensor  # (finite codes,) fp32
    order: Tensor  # (finite codes,) uint8: the code of each ascending value
    midpoints: Tensor  # (finite codes - 1,) fp32

    def nearest(self, x: Tensor) -> Tensor:
        """Return the uint8 code of the nearest value; ties go to the lower value."""
        return self._codes(torch.bucketize(x, self.midpoints, out_int32=True))

    def stochastic(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Return the code of one of the two neighbours, unbiased; clamps outside the table."""
        last = self.ascending.numel() - 1
        # Above the value or at it: the lower neighbour's rank.
        low = torch.bucketize(x, self.ascending, out_int32=True, right=True) - 1
        low = low.clamp_(0, last - 1)
        below = self._at(self.ascending, low)
        gap = self._at(self.ascending, low + 1) - below
        # A table may hold the same value twice (two zeros): the gap is then zero.
        portion = torch.where(gap > 0, (x - below) / gap.clamp(min=1e-30), torch.zeros_like(x))
        return self._codes(low + (uniform < portion).to(torch.int32))

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the fp32 value of each uint8 code, same shape."""
        return self._at(self.values, codes.to(torch.int32))

    @property
    def largest_gap(self) -> float:
        """Largest distance of two neighbouring values."""
        return float((self.ascending[1:] - self.ascending[:-1]).max())

    def _codes(self, rank: Tensor) -> Tensor:
        return self._at(self.order, rank)

    @staticmethod
    def _at(table: Tensor, index: Tensor) -> Tensor:
        return torch.index_select(table, 0, index.reshape(-1)).view(index.shape)


@functools.cache
def code_table(values: tuple[float, ...], device: torch.device) -> CodeTable:
    """Return the tensors of a table on a device, made once; searches find finite values only."""
    by_code = torch.tensor(values, dtype=torch.float32)
    ascending, order = torch.sort(by_code, stable=True)
    finite = torch.isfinite(ascending)
    ascending, order = ascending[finite], order[finite]
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    return CodeTable(
        values=by_code.to(device),
        ascending=ascending.to(device),
        order=order.to(torch.uint8).to(device),
        midpoints=midpoints.to(device),
    )


@functools.cache
def pair_table(values: tuple[float, ...], high_first: bool, device: torch.device) -> Tensor:
    """Return (256, 2) fp32: the two values that each byte of packed 4-bit codes stands for."""
    by_code = torch.tensor(values, dtype=torch.float32)
    byte = torch.arange(256)
    high, low = by_code[byte >> 4], by_code[byte & 15]
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=1).to(device)


def pack_nibbles(codes: Tensor, *, high_first: bool, padding: int = 0) -> Tensor:
    """Pack 4-bit codes (uint8, last axis) two to a byte; an odd last code gets ``padding``.

    >>> pack_nibbles(torch.tensor([0, 15], dtype=torch.uint8), high_first=True)
    tensor([15], dtype=torch.uint8)
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=padding)
    first, second = codes[..., ::2], codes[..., 1::2]
    return (first << 4) | second if high_first else (second << 4) | first


def unpack_nibbles(packed: Tensor, count: int, *, high_first: bool) -> Tensor:
    """Unpack bytes to ``count`` 4-bit codes along the last axis (uint8)."""
    high, low = packed >> 4, packed & 15
    pair = (high, low) if high_first else (low, high)
    codes = torch.stack(pair, dim=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)
    return codes[..., :count]
