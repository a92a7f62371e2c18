"""States coded by a table (``int8_dynamic`` and ``int4_torchao``) in device kernels.

A code is the rank of its value: both tables ascend.  The nearest one is found by a binary search
among the middles; tables lie in global memory and stay in the first-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(code: tl.tensor, scale: tl.tensor, values: tl.tensor) -> tl.tensor:
    """Return the values of int32 codes (rows, block); scales are (rows, 1)."""
    return tl.load(values + code) * scale


@triton.jit
def _halved(rank: tl.tensor, x: tl.tensor, middles: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    return tl.where(tl.load(middles + rank + (HALF - 1)) < x, rank + HALF, rank)


@triton.jit
def nearest(x: tl.tensor, middles: tl.tensor, CODES: tl.constexpr) -> tl.tensor:
    """Return the int32 code of the nearest value; ties go to the lower one."""
    rank = tl.zeros(x.shape, tl.int32)
    if CODES == 256:
        rank = _halved(rank, x, middles, 128)
        rank = _halved(rank, x, middles, 64)
        rank = _halved(rank, x, middles, 32)
        rank = _halved(rank, x, middles, 16)
    rank = _halved(rank, x, middles, 8)
    rank = _halved(rank, x, middles, 4)
    rank = _halved(rank, x, middles, 2)
    return _halved(rank, x, middles, 1)


@triton.jit
def encode(
    value: tl.tensor, scale: tl.tensor, short: tl.tensor, middles: tl.tensor, CODES: tl.constexpr
) -> tl.tensor:
    """Return int32 codes of values (rows, block); scales are (rows, 1).

    ``short`` (rows, 1) marks a last block that is not whole, which the dynamic format divides
    instead of multiplying.
    """
    if CODES == 256:
        floor = tl.where(scale < 1e-38, 1e-38, scale)
        scaled = tl.where(short, tl.div_rn(value, floor), value * tl.div_rn(1.0, floor))
    else:
        scaled = tl.div_rn(value, tl.where(scale < 1e-12, 1e-12, scale) + tl.zeros_like(value))
    scaled = tl.where(scaled > 1.0, 1.0, tl.where(scaled < -1.0, -1.0, scaled))
    return nearest(scaled, middles, CODES)
