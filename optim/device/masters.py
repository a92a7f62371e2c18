"""Reading and writing master weights in device kernels, one source for every format.

``extra`` is the fp32 master, the int16 remainder of a split one, or absent (stochastic rounding;
an fp32 weight is its own master).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import bf16_nearest, bf16_stochastic, bits_float, float_bits, load


@triton.jit
def read_master(
    weight: tl.tensor,
    extra: tl.tensor,
    index: tl.tensor,
    mask: tl.tensor,
    WEIGHT: tl.constexpr,
    MASTER: tl.constexpr,
) -> tl.tensor:
    """Return the fp32 masters of the elements."""
    if MASTER == "fp32":
        value = tl.load(extra + index, mask=mask, other=0)
    elif MASTER == "split":
        high = tl.load(weight + index, mask=mask, other=0).to(tl.int32) << 16
        low = tl.load(extra + index, mask=mask, other=0).to(tl.int32)
        value = (high + low).to(tl.float32, bitcast=True)
    else:
        value = load(weight, index, mask, WEIGHT)
    return value


@triton.jit
def untie(bits: tl.tensor) -> tl.tensor:
    """Move a master half way beyond an even bf16 number towards it by one fp32 unit."""
    return bits - ((bits & 0x1FFFF) == 0x8000).to(tl.uint32)


@triton.jit
def write_master(
    weight: tl.tensor,
    extra: tl.tensor,
    index: tl.tensor,
    mask: tl.tensor,
    value: tl.tensor,
    noise: tl.tensor,
    WEIGHT: tl.constexpr,
    MASTER: tl.constexpr,
) -> None:
    """Set masters and weights of the elements; ``noise`` is used by stochastic rounding only."""
    if WEIGHT == "float32":
        tl.store(weight + index, value, mask=mask)
    elif WEIGHT == "float16":
        tl.store(extra + index, value, mask=mask)
        tl.store(weight + index, value.to(tl.float16), mask=mask)
    elif MASTER == "sr":
        rounded = bf16_stochastic(float_bits(value), noise)
        tl.store(weight + index, rounded.to(tl.int16), mask=mask)
    else:
        bits = untie(float_bits(value))
        rounded = bf16_nearest(bits)
        if MASTER == "fp32":
            tl.store(extra + index, bits_float(bits), mask=mask)
        else:
            # A NaN's remainder is zero: adding its low bits back could carry it out of the NaNs.
            low = (bits - (rounded << 16)).to(tl.int16)
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            tl.store(extra + index, tl.where(nan, 0, low).to(tl.int16), mask=mask)
        tl.store(weight + index, rounded.to(tl.int16), mask=mask)
