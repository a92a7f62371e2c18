"""Power-companded 8-bit and 4-bit states (``quant.companded``) in device kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.companded import SMALLEST_SCALE, law_of
from .bits import bits_float, float_bits

_S8, _U8 = law_of(8, signed=True), law_of(8, signed=False)
_S4, _U4 = law_of(4, signed=True), law_of(4, signed=False)
assert _S8.lead == _U8.lead and _S4.lead == _U4.lead, "both moments share one lead"

_LEAD8, _UNLEAD8 = tl.constexpr(_S8.lead), tl.constexpr(_S8.unlead)
_LEAD4, _UNLEAD4 = tl.constexpr(_S4.lead), tl.constexpr(_S4.unlead)
_INTO_S8, _OUT_S8 = tl.constexpr(_S8.into), tl.constexpr(_S8.out)
_INTO_U8, _OUT_U8 = tl.constexpr(_U8.into), tl.constexpr(_U8.out)
_INTO_S4, _OUT_S4 = tl.constexpr(_S4.into), tl.constexpr(_S4.out)
_INTO_U4, _OUT_U4 = tl.constexpr(_U4.into), tl.constexpr(_U4.out)
_SMALLEST = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _unit(code: tl.tensor, BITS: tl.constexpr, SIGNED: tl.constexpr) -> tl.tensor:
    """Return what int32 codes (negative ones too) stand for in a block scaled to the lead."""
    pattern = float_bits(tl.abs(code).to(tl.float32))
    if SIGNED:
        out = _OUT_S8 if BITS == 8 else _OUT_S4
        magnitude = bits_float((pattern << 1) - out)
    else:
        out = _OUT_U8 if BITS == 8 else _OUT_U4
        magnitude = bits_float((pattern << 2) - out)
    return tl.where(code == 0, 0.0, tl.where(code < 0, -magnitude, magnitude))


@triton.jit
def _root(magnitude: tl.tensor, BITS: tl.constexpr, SIGNED: tl.constexpr) -> tl.tensor:
    """Return the companded magnitude, between codes as on them: 0 .. top."""
    lead = _LEAD8 if BITS == 8 else _LEAD4
    bits = float_bits(tl.where(magnitude < lead, magnitude, lead))
    if SIGNED:
        into = _INTO_S8 if BITS == 8 else _INTO_S4
        root = bits_float((bits >> 1) + into)
    else:
        into = _INTO_U8 if BITS == 8 else _INTO_U4
        root = bits_float((bits >> 2) + into)
    return root


@triton.jit
def decode(
    code: tl.tensor, scale: tl.tensor, BITS: tl.constexpr, SIGNED: tl.constexpr
) -> tl.tensor:
    """Return the values of int32 code patterns (rows, block); scales are (rows, 1)."""
    if SIGNED:
        top = 127 if BITS == 8 else 7
        code = tl.where(code > top, code - 2 * (top + 1), code)
    unlead = _UNLEAD8 if BITS == 8 else _UNLEAD4
    return _unit(code, BITS, SIGNED) * (scale * unlead)


@triton.jit
def encode(
    value: tl.tensor,
    scale: tl.tensor,
    uniform: tl.tensor,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> tl.tensor:
    """Return int32 code patterns of values (rows, block); scales are (rows, 1)."""
    lead = _LEAD8 if BITS == 8 else _LEAD4
    # A reciprocal and a product, as torch divides a number by a tensor.
    factor = tl.div_rn(1.0, tl.where(scale < _SMALLEST, _SMALLEST, scale)) * lead
    scaled = value * factor
    if STOCHASTIC:
        # The code at or below a value: that of its magnitude, rounded away from zero if negative.
        scaled = tl.where(scaled > lead, lead, tl.where(scaled < -lead, -lead, scaled))
        floor = _root(tl.abs(scaled), BITS, SIGNED).to(tl.int32)
        on_code = _unit(floor, BITS, SIGNED) == tl.abs(scaled)
        below = tl.where(scaled < 0, -floor - tl.where(on_code, 0, 1), floor)
        top = (2 ** (BITS - 1) - 1) if SIGNED else (2**BITS - 1)
        below = tl.where(below > top - 1, top - 1, below)
        low = _unit(below, BITS, SIGNED)
        portion = tl.div_rn(scaled - low, _unit(below + 1, BITS, SIGNED) - low)
        code = below + (uniform < portion).to(tl.int32)
    else:
        root = _root(tl.abs(scaled), BITS, SIGNED)
        code = (float_bits(root + 8388608.0) & 0xFF).to(tl.int32)
        code = tl.where(value < 0, -code, code) if SIGNED else code
    if SIGNED:
        code = code & (2**BITS - 1)
    else:
        # What is not zero never becomes code 0: the update divides by its root.
        code = tl.where((value > 0) & (code == 0), 1, code)
    return code
