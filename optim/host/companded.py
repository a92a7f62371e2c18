"""Fused AdamW and Lion with power-companded 8-bit states (``quant.companded``): one pass.

Eight blocks of 128 elements at a time: one loop decodes and computes the new moments, leaving them
in scratch that stays in the first-level cache; a second one writes the weights and encodes.  Two
loops, because a block's scale is known only when all of it has been stepped; so cut, because the
second one's divisions and roots take as long as the codes beside them.  Inner lengths are
constant, so that no time goes into remainders; largest magnitudes are found on integer bit
patterns, because float maxima do not vectorise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from ...quant.companded import Law, law_of
from .adamw import adam_moments, adam_move
from .bits import F32, I32, KERNEL_OPTIONS, U32, bits_float, float_bits, load
from .masters import read_master, write_master
from .rows import padded, rows, scale_of
from .scratch import TILE, tile_pointer

#: Elements that share a scale, and blocks that are worked on at a time (they fit the cache).
BLOCK = 128
BLOCKS = TILE // BLOCK

_SIGNED: Law = law_of(8, signed=True)
_POSITIVE: Law = law_of(8, signed=False)
_LEAD = F32(_SIGNED.lead)
_UNLEAD = F32(_SIGNED.unlead)
_SIGNED_OUT = U32(_SIGNED.out)
#: What is taken off a positive code's bits, before they are shifted by two.
_POSITIVE_OUT = U32(_POSITIVE.out >> 2)
assert _POSITIVE.out % 4 == 0, "taken off before or after the shift, it is the same"
#: Added to a root as it comes out of the shift, these round it to a code, half to even, and leave
#: the code in the low bits: 2^23 divided by the power of two that is still missing in the root.
_SIGNED_ROUNDER = F32(2.0 ** (23 - (_SIGNED.into >> 23)))
_POSITIVE_ROUNDER = F32(2.0 ** (23 - (_POSITIVE.into >> 23)))
assert not (_SIGNED.into | _POSITIVE.into) & 0x7FFFFF, "only the exponent is missing"
assert _SIGNED.lead == _POSITIVE.lead, "the kernels share one lead"


@njit(**KERNEL_OPTIONS)
def decode_signed(code: Any, step: Any) -> Any:
    """Return the value of an int8 pattern; ``step`` is the block's scale over the lead."""
    bits = float_bits(F32(np.int8(code)))
    # All codes' bits are above what is taken off, but those of zero, which becomes zero.
    squared = U32(max(U32(bits << U32(1)), _SIGNED_OUT) - _SIGNED_OUT)
    return F32(bits_float(U32(squared | U32(bits & U32(0x80000000)))) * step)


@njit(**KERNEL_OPTIONS)
def decode_positive(code: Any, step: Any) -> Any:
    """Return the value of a uint8 code."""
    bits = max(float_bits(F32(code)), _POSITIVE_OUT)
    return F32(bits_float(U32(U32(bits - _POSITIVE_OUT) << U32(2))) * step)


@njit(**KERNEL_OPTIONS)
def into_unit(scale: Any) -> Any:
    """Return the factor that scales a block's values to the lead."""
    return F32(_LEAD / (scale if not scale < F32(1e-30) else F32(1e-30)))


@njit(**KERNEL_OPTIONS)
def encode_signed(value: Any, factor: Any) -> Any:
    """Return the int8 pattern of a value."""
    x = F32(bits_float(U32(float_bits(value) & U32(0x7FFFFFFF))) * factor)
    root = bits_float(U32(float_bits(x) >> U32(1)))
    code = I32(float_bits(F32(root + _SIGNED_ROUNDER)))
    return np.uint8(I32(I32(0) - code) if value < F32(0.0) else code)


@njit(**KERNEL_OPTIONS)
def encode_positive(value: Any, factor: Any) -> Any:
    """Return the uint8 code of a value; one that is not zero never gets code 0."""
    x = F32(value * factor)
    root = bits_float(U32(float_bits(x) >> U32(2)))
    code = float_bits(F32(root + _POSITIVE_ROUNDER))
    least = U32(float_bits(_POSITIVE_ROUNDER) + U32(1))
    return np.uint8(max(code, least) if value > F32(0.0) else code)


@njit(**KERNEL_OPTIONS)
def adamw_blocks(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, v_codes: Any, v_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update whole blocks; ``offset`` is the first element's index, a multiple of the block."""
    m, v = carray(tile_pointer(), (BLOCKS, BLOCK)), carray(tile_pointer(), (BLOCKS, BLOCK))
    count = m_scale.shape[0]
    weights, extras, grads = rows(weight, BLOCK), rows(extra, BLOCK), rows(grad, BLOCK)
    m_rows, v_rows = rows(m_codes, BLOCK), rows(v_codes, BLOCK)
    for first in range(0, count, BLOCKS):
        blocks = min(BLOCKS, count - first)
        for b in range(blocks):
            row = first + b
            g, mc, vc, mb, vb = grads[row], m_rows[row], v_rows[row], m[b], v[b]
            m_step, v_step = F32(m_scale[row] * _UNLEAD), F32(v_scale[row] * _UNLEAD)
            m_worst, v_worst = U32(0), U32(0)
            for j in range(BLOCK):
                old_m, old_v = decode_signed(mc[j], m_step), decode_positive(vc[j], v_step)
                new_m, new_v = adam_moments(load(g, j), old_m, old_v, scalars)
                mb[j], vb[j] = new_m, new_v
                m_worst = max(m_worst, U32(float_bits(new_m) & U32(0x7FFFFFFF)))
                v_worst = max(v_worst, float_bits(new_v))  # no second moment is negative
            m_scale[row], v_scale[row] = scale_of(m_worst), scale_of(v_worst)
        for b in range(blocks):
            row = first + b
            # The high half of the 64-bit counter is constant in a block: 32-bit arithmetic.
            index = offset + row * BLOCK
            high_word, base = U32(U32(index >> 32) ^ high_key), U32(index & 4294967295)
            w, e, mc, vc, mb, vb = weights[row], extras[row], m_rows[row], v_rows[row], m[b], v[b]
            m_factor, v_factor = into_unit(m_scale[row]), into_unit(v_scale[row])
            for j in range(BLOCK):
                p = adam_move(mb[j], vb[j], read_master(w, e, j), scalars)
                write_master(w, e, j, p, U32(base + U32(j)), low_key, high_word)
                mc[j] = encode_signed(mb[j], m_factor)
                vc[j] = encode_positive(vb[j], v_factor)


@njit(**KERNEL_OPTIONS)
def adamw_companded(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, v_codes: Any, v_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update one range; ``offset`` is the first element's index, a multiple of the block."""
    blocks = weight.shape[0] // BLOCK
    end = blocks * BLOCK
    adamw_blocks(
        weight[:end], extra[:end], grad[:end], m_codes[:end], m_scale[:blocks], v_codes[:end],
        v_scale[:blocks], scalars, offset, low_key, high_key,
    )  # fmt: skip
    if end < weight.shape[0]:
        # A short last block is padded with zeros, which change neither scale.
        w, e, mc, vc = (
            padded(weight[end:], BLOCK),
            padded(extra[end:], BLOCK),
            padded(m_codes[end:], BLOCK),
            padded(v_codes[end:], BLOCK),
        )
        adamw_blocks(
            w, e, padded(grad[end:], BLOCK), mc, m_scale[blocks:], vc, v_scale[blocks:], scalars,
            offset + end, low_key, high_key,
        )  # fmt: skip
        left = weight.shape[0] - end
        weight[end:], m_codes[end:], v_codes[end:] = w[:left], mc[:left], vc[:left]
        extra[end:] = e[: extra[end:].shape[0]]


@njit(**KERNEL_OPTIONS)
def lion_step(g: Any, m: Any, p: Any, scalars: Any) -> Any:
    """Return (m, p) after one step of Lion on one element; g is fp32."""
    lr, decay, b1, b2, o1, o2, _c1, _c2, _eps, sign = scalars
    g = F32(sign * g)
    c = F32(F32(b1 * m) + F32(o1 * g))
    # sign(c) * lr, with sign(0) = 0 and NaN kept
    d = lr if c > F32(0.0) else (F32(-lr) if c < F32(0.0) else F32(c * lr))
    return F32(F32(b2 * m) + F32(o2 * g)), F32(F32(p * decay) - d)


@njit(**KERNEL_OPTIONS)
def lion_blocks(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update whole blocks by Lion; as ``adamw_blocks``."""
    m = carray(tile_pointer(), (BLOCKS, BLOCK))
    count = m_scale.shape[0]
    weights, extras, grads, m_rows = (
        rows(weight, BLOCK),
        rows(extra, BLOCK),
        rows(grad, BLOCK),
        rows(m_codes, BLOCK),
    )
    for first in range(0, count, BLOCKS):
        blocks = min(BLOCKS, count - first)
        for b in range(blocks):
            row = first + b
            index = offset + row * BLOCK
            high_word, base = U32(U32(index >> 32) ^ high_key), U32(index & 4294967295)
            w, e, g, mc, mb = weights[row], extras[row], grads[row], m_rows[row], m[b]
            m_step = F32(m_scale[row] * _UNLEAD)
            m_worst = U32(0)
            for j in range(BLOCK):
                p = read_master(w, e, j)
                new_m, p = lion_step(load(g, j), decode_signed(mc[j], m_step), p, scalars)
                write_master(w, e, j, p, U32(base + U32(j)), low_key, high_word)
                mb[j] = new_m
                m_worst = max(m_worst, U32(float_bits(new_m) & U32(0x7FFFFFFF)))
            m_scale[row] = scale_of(m_worst)
        for b in range(blocks):
            row = first + b
            mc, mb = m_rows[row], m[b]
            m_factor = into_unit(m_scale[row])
            for j in range(BLOCK):
                mc[j] = encode_signed(mb[j], m_factor)


@njit(**KERNEL_OPTIONS)
def lion_companded(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update one range by Lion; ``scalars`` as for AdamW, of which eps and corrections rest."""
    blocks = weight.shape[0] // BLOCK
    end = blocks * BLOCK
    lion_blocks(
        weight[:end], extra[:end], grad[:end], m_codes[:end], m_scale[:blocks], scalars, offset,
        low_key, high_key,
    )  # fmt: skip
    if end < weight.shape[0]:
        w, e, mc = (
            padded(weight[end:], BLOCK),
            padded(extra[end:], BLOCK),
            padded(m_codes[end:], BLOCK),
        )
        lion_blocks(
            w,
            e,
            padded(grad[end:], BLOCK),
            mc,
            m_scale[blocks:],
            scalars,
            offset + end,
            low_key,
            high_key,
        )
        left = weight.shape[0] - end
        weight[end:], m_codes[end:] = w[:left], mc[:left]
        extra[end:] = e[: extra[end:].shape[0]]
