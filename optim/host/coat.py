"""Fused AdamW with range-expanded FP8 states (``quant.coat``): one pass.

As in ``companded``: one loop decodes and computes the moments, a second one writes the weights and
encodes.  The smallest nonzero magnitude of a group is found on bit patterns like the largest.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit

from ...quant.coat import DEEPEST_BITS, LARGEST_BITS, RANGE_SIXTEENTHS
from .adamw import adam_moments, adam_move
from .bits import F32, I32, KERNEL_OPTIONS, U32, bits_float, float_bits, load
from .masters import read_master, write_master
from .rows import padded, rows, scale_of
from .scratch import TILE, tile_pointer

#: Elements that share a power, and groups that are worked on at a time (they fit the cache).
BLOCK = 128
BLOCKS = TILE // BLOCK

_LARGEST = I32(LARGEST_BITS)
_RANGE = F32(RANGE_SIXTEENTHS)
_DEEPEST = F32(DEEPEST_BITS)


@njit(**KERNEL_OPTIONS)
def e4m3_value(code: Any) -> Any:
    """Return the value of a pattern without its sign; subnormals are exact."""
    pattern = U32(U32(code & np.uint8(0x7F)) << U32(20))
    return F32(bits_float(pattern) * F32(1.329227995784916e36))  # 2^120 moves the bias


@njit(**KERNEL_OPTIONS)
def e4m3_code(value: Any) -> Any:
    """Round 0 .. 448 to a pattern, ties to even."""
    bits = float_bits(value)
    odd = U32(U32(bits >> U32(20)) & U32(1))
    normal = U32(U32(U32(bits + U32(0x7FFFF)) + odd) >> U32(20)) - U32(120 << 3)
    # The last bit of a number near 2^14 is the subnormals' step, 2^-9.
    subnormal = U32(float_bits(F32(value + F32(16384.0))) - U32(0x46800000))
    return U32(normal) if value >= F32(0.015625) else U32(subnormal)


@njit(**KERNEL_OPTIONS)
def decode(code: Any, absmax_bits: Any, inverse: Any) -> Any:
    """Return the magnitude that a pattern stands for, zero for zero."""
    below = F32(F32(_LARGEST - I32(float_bits(e4m3_value(code)))) * inverse)
    bits = I32(absmax_bits - I32(min(below, F32(1073741824.0))))
    value = bits_float(U32(max(bits, I32(0))))
    return value if U32(code & np.uint8(0x7F)) != U32(0) else F32(0.0)


@njit(**KERNEL_OPTIONS)
def encode(bits: Any, absmax_bits: Any, power: Any) -> Any:
    """Return the pattern of a magnitude given by its bits; only zero becomes zero."""
    depth = min(F32(F32(I32(absmax_bits - I32(bits))) * power), _DEEPEST)
    code = e4m3_code(bits_float(U32(_LARGEST - I32(depth))))
    return max(code, U32(1)) if bits != U32(0) else U32(0)


@njit(**KERNEL_OPTIONS)
def power_of(absmax: Any, smallest: Any) -> Any:
    """Return sixteen times the power that spreads a group over the range."""
    span = F32(max(I32(I32(float_bits(absmax)) - I32(smallest)), I32(1)))
    return np.uint8(min(max(F32(math.floor(F32(_RANGE / span))), F32(1.0)), F32(255.0)))


@njit(**KERNEL_OPTIONS)
def adamw_blocks(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, m_power: Any, v_codes: Any,
    v_scale: Any, v_power: Any, scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update whole groups; ``offset`` is the first element's index, a multiple of the group."""
    m, v = carray(tile_pointer(), (BLOCKS, BLOCK)), carray(tile_pointer(), (BLOCKS, BLOCK))
    weights, extras, grads = rows(weight, BLOCK), rows(extra, BLOCK), rows(grad, BLOCK)
    m_rows, v_rows = rows(m_codes, BLOCK), rows(v_codes, BLOCK)
    count = m_scale.shape[0]
    for first in range(0, count, BLOCKS):
        blocks = min(BLOCKS, count - first)
        for b in range(blocks):
            row = first + b
            g, mc, vc, mb, vb = grads[row], m_rows[row], v_rows[row], m[b], v[b]
            m_bits, v_bits = I32(float_bits(m_scale[row])), I32(float_bits(v_scale[row]))
            # Nothing, or NaN: the bits of a group that is not finite are like any others.
            m_bad, v_bad = F32(m_scale[row] - m_scale[row]), F32(v_scale[row] - v_scale[row])
            m_inverse, v_inverse = (
                F32(F32(16.0) / F32(m_power[row])),
                F32(F32(16.0) / F32(v_power[row])),
            )
            m_worst, v_worst = U32(0), U32(0)
            m_least, v_least = U32(0x7F800000), U32(0x7F800000)
            for j in range(BLOCK):
                size = float_bits(decode(mc[j], m_bits, m_inverse))
                sign = U32(U32(mc[j] & np.uint8(0x80)) << U32(24))
                old_m = F32(bits_float(U32(size | sign)) + m_bad)
                old_v = F32(decode(vc[j], v_bits, v_inverse) + v_bad)
                new_m, new_v = adam_moments(load(g, j), old_m, old_v, scalars)
                mb[j], vb[j] = new_m, new_v
                size = U32(float_bits(new_m) & U32(0x7FFFFFFF))
                m_worst = max(m_worst, size)
                m_least = min(m_least, size if size != U32(0) else U32(0x7F800000))
                size = float_bits(new_v)  # no second moment is negative
                v_worst = max(v_worst, size)
                v_least = min(v_least, size if size != U32(0) else U32(0x7F800000))
            m_scale[row], v_scale[row] = scale_of(m_worst), scale_of(v_worst)
            m_power[row] = power_of(m_scale[row], m_least)
            v_power[row] = power_of(v_scale[row], v_least)
        for b in range(blocks):
            row = first + b
            # The high half of the 64-bit counter is constant in a block: 32-bit arithmetic.
            index = offset + row * BLOCK
            high_word, base = U32(U32(index >> 32) ^ high_key), U32(index & 4294967295)
            w, e, mc, vc, mb, vb = weights[row], extras[row], m_rows[row], v_rows[row], m[b], v[b]
            m_bits, v_bits = I32(float_bits(m_scale[row])), I32(float_bits(v_scale[row]))
            m_by = F32(F32(m_power[row]) * F32(0.0625))
            v_by = F32(F32(v_power[row]) * F32(0.0625))
            for j in range(BLOCK):
                p = adam_move(mb[j], vb[j], read_master(w, e, j), scalars)
                write_master(w, e, j, p, U32(base + U32(j)), low_key, high_word)
                bits = float_bits(mb[j])
                code = encode(U32(bits & U32(0x7FFFFFFF)), m_bits, m_by)
                sign = U32(U32(bits >> U32(24)) & U32(0x80))
                mc[j] = np.uint8(code | sign) if code != U32(0) else np.uint8(0)
                vc[j] = np.uint8(encode(float_bits(vb[j]), v_bits, v_by))


@njit(**KERNEL_OPTIONS)
def adamw_coat(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, m_power: Any, v_codes: Any,
    v_scale: Any, v_power: Any, scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update one range; ``offset`` is the first element's index, a multiple of the group."""
    blocks = weight.shape[0] // BLOCK
    end = blocks * BLOCK
    adamw_blocks(
        weight[:end], extra[:end], grad[:end], m_codes[:end], m_scale[:blocks], m_power[:blocks],
        v_codes[:end], v_scale[:blocks], v_power[:blocks], scalars, offset, low_key, high_key,
    )  # fmt: skip
    if end < weight.shape[0]:
        # A short last group is padded with zeros, which are neither largest nor smallest.
        w, e, g = padded(weight[end:], BLOCK), padded(extra[end:], BLOCK), padded(grad[end:], BLOCK)
        mc, vc = padded(m_codes[end:], BLOCK), padded(v_codes[end:], BLOCK)
        adamw_blocks(
            w, e, g, mc, m_scale[blocks:], m_power[blocks:], vc, v_scale[blocks:], v_power[blocks:],
            scalars, offset + end, low_key, high_key,
        )  # fmt: skip
        left = weight.shape[0] - end
        weight[end:], m_codes[end:], v_codes[end:] = w[:left], mc[:left], vc[:left]
        extra[end:] = e[: extra[end:].shape[0]]
