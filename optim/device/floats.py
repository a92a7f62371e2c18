"""E4M3 states, plain (``fp8``) and with range expansion (``coat``), in device kernels.

E4M3 is coded and decoded by integer arithmetic, so that no chip needs the type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.coat import DEEPEST_BITS, LARGEST_BITS, RANGE_SIXTEENTHS
from .bits import bits_float, float_bits

_LARGEST, _RANGE = tl.constexpr(LARGEST_BITS), tl.constexpr(float(RANGE_SIXTEENTHS))
_DEEPEST = tl.constexpr(DEEPEST_BITS)


@triton.jit
def _unit(code: tl.tensor) -> tl.tensor:
    """Return the magnitudes of E4M3 patterns (int32), the sign left out; 0x7F is NaN."""
    pattern, fraction = code & 0x7F, (code & 7).to(tl.float32)
    normal = (((pattern >> 3) + 120) << 23 | (pattern & 7) << 20).to(tl.float32, bitcast=True)
    value = tl.where(pattern < 8, fraction * 0.001953125, normal)
    return tl.where(pattern == 0x7F, float("nan"), value)


@triton.jit
def _pattern(magnitude: tl.tensor, uniform: tl.tensor, STOCHASTIC: tl.constexpr) -> tl.tensor:
    """Return the int32 pattern of magnitudes up to 448."""
    exponent = (float_bits(magnitude) >> 23).to(tl.int32) - 127
    exponent = tl.where(exponent < -6, -6, exponent)
    scaled = magnitude * ((130 - exponent) << 23).to(tl.float32, bitcast=True)
    if STOCHASTIC:
        floor = scaled.to(tl.int32)  # cuts, and no magnitude is negative
        steps = floor + (uniform < scaled - floor.to(tl.float32)).to(tl.int32)
    else:
        steps = (float_bits(scaled + 8388608.0) & 0xFF).to(tl.int32)
    # Sixteen steps are eight of the next exponent: the sum carries.
    return (exponent + 6) * 8 + steps


@triton.jit
def _signed(magnitude: tl.tensor, code: tl.tensor) -> tl.tensor:
    """Give magnitudes the signs of their codes; a minus would lose that of zero."""
    return bits_float(float_bits(magnitude) | ((code & 0x80).to(tl.uint32) << 24))


@triton.jit
def decode_plain(code: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return the values of int32 codes (rows, block); scales are (rows, 1)."""
    return _signed(_unit(code), code) * scale


@triton.jit
def encode_plain(
    value: tl.tensor, scale: tl.tensor, uniform: tl.tensor, SIGNED: tl.constexpr
) -> tl.tensor:
    """Return int32 codes, rounded stochastically; a second moment that is not zero stays so."""
    safe = tl.where(scale == 0, 1.0, scale) + tl.zeros_like(value)
    y = tl.where(scale == 0, 0.0, tl.div_rn(value, safe))
    magnitude = tl.abs(y)
    code = _pattern(tl.where(magnitude > 448.0, 448.0, magnitude), uniform, True)
    code = code | ((float_bits(y) >> 31) << 7).to(tl.int32)
    if not SIGNED:
        code = tl.where((value > 0) & (code == 0), 1, code)
    return code


@triton.jit
def decode_expanded(code: tl.tensor, scale: tl.tensor, power: tl.tensor) -> tl.tensor:
    """Return the values of int32 codes (rows, block); scales and powers are (rows, 1)."""
    unit = _unit(code)
    inverse = tl.div_rn(1.0, power.to(tl.float32)) * 16.0
    below = (-float_bits(unit).to(tl.int32) + _LARGEST).to(tl.float32) * inverse
    below = tl.where(below > 1073741824.0, 1073741824.0, below).to(tl.int32)
    bits = float_bits(scale).to(tl.int32) - below
    shrunk = tl.where(bits < 0, 0, bits).to(tl.float32, bitcast=True)
    # Adds nothing, or NaN: the bits of a group that is not finite are like any others.
    return tl.where(unit == 0, 0.0, _signed(shrunk, code)) + (scale - scale)


@triton.jit
def power_of(value: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return sixteen times the power that spreads each row of (rows, block) over E4M3, (rows,)."""
    bits = (float_bits(value) & 0x7FFFFFFF).to(tl.int32)
    smallest = tl.min(tl.where(bits == 0, 0x7F800000, bits), axis=1)
    span = float_bits(scale).to(tl.int32) - smallest
    span = tl.where(span < 1, 1, span).to(tl.float32)
    power = tl.div_rn(1.0, span) * _RANGE
    power = tl.where(power < 1.0, 1.0, tl.where(power > 255.0, 255.0, power))
    return power.to(tl.int32).to(tl.float32)


@triton.jit
def encode_expanded(value: tl.tensor, scale: tl.tensor, power: tl.tensor) -> tl.tensor:
    """Return int32 codes (rows, block); scales and powers (fp32) are (rows, 1)."""
    below = float_bits(scale).to(tl.int32) - (float_bits(value) & 0x7FFFFFFF).to(tl.int32)
    depth = below.to(tl.float32) * (power * 0.0625)
    depth = tl.where(depth < 0.0, 0.0, tl.where(depth > _DEEPEST, _DEEPEST, depth))
    expanded = (-depth.to(tl.int32) + _LARGEST).to(tl.float32, bitcast=True)
    code = _pattern(expanded, expanded, False)
    # A nonzero value never becomes code 0: it takes the smallest subnormal.
    code = tl.where(code == 0, 1, code) | ((float_bits(value) >> 31) << 7).to(tl.int32)
    return tl.where(value == 0, 0, code)
