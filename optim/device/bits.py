"""Bit-level conversions for the device kernels: bf16 as 16-bit integers, counter noise.

bf16 travels as int16 and is rounded by integer arithmetic, fp16 and fp32 as themselves.  Operations
on fp32 are single ones, rounded to nearest even: kernels are launched without contraction, and
divisions and roots are the correctly rounded ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float_bits(x: tl.tensor) -> tl.tensor:
    """Reinterpret fp32 as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def bits_float(bits: tl.tensor) -> tl.tensor:
    """Reinterpret uint32 as fp32."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widened(half: tl.tensor) -> tl.tensor:
    """Return the fp32 values of bf16 patterns (int16)."""
    return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load(pointer: tl.tensor, index: tl.tensor, mask: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Return elements as fp32; absent ones are zero."""
    raw = tl.load(pointer + index, mask=mask, other=0)
    if DTYPE == "bfloat16":
        value = widened(raw)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def bf16_nearest(bits: tl.tensor) -> tl.tensor:
    """Round fp32 bits to bf16 bits (uint32), ties to even; every NaN stays a NaN."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)


@triton.jit
def bf16_stochastic(bits: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """Round fp32 bits to bf16 bits by adding 16 random bits; infinities and NaN stay."""
    rounded = (bits + (noise & 0xFFFF)) >> 16
    return tl.where((bits & 0x7F800000) == 0x7F800000, bf16_nearest(bits), rounded)


@triton.jit
def mix32(x: tl.tensor) -> tl.tensor:
    """The two-multiply 32-bit finaliser that ``quant.rounding`` uses, bit for bit."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_of(
    index_low: tl.tensor, index_high: tl.tensor, low_key: tl.tensor, high_key: tl.tensor
) -> tl.tensor:
    """Return 32 random bits for each element; keys are 32-bit words passed as int32."""
    low = low_key.to(tl.uint32, bitcast=True)
    high = high_key.to(tl.uint32, bitcast=True)
    return mix32(mix32(index_low ^ low) ^ index_high ^ high)


@triton.jit
def uniform_of(noise: tl.tensor) -> tl.tensor:
    """Return fp32 uniforms in [0, 1), multiples of 2^-24."""
    return (noise >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def scale_of(values: tl.tensor) -> tl.tensor:
    """Return the largest magnitude of each row of fp32 (rows, block); NaN if not finite."""
    worst = tl.max((float_bits(values) & 0x7FFFFFFF).to(tl.int32), axis=1)
    return tl.where(worst < 0x7F800000, worst, 0x7FC00000).to(tl.float32, bitcast=True)
