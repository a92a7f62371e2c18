"""Fused AdamW with bitsandbytes' 8-bit states (``quant.int8_blockwise``): one pass.

Codes are found by arithmetic, not by search: the map is seven decades, each cut evenly, so that
comparisons find the decade and one multiplication the place in it.  A value within 2^-20 of
the middle between two codes may get either: there, and only there, this path may differ from the
reference codec, by one code.  Second moments that are not zero
never get code 0, as in the ``int8_dynamic`` encoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from ...quant.tables import dynamic_map
from .adamw import adam_step
from .bits import F32, I32, KERNEL_OPTIONS, U32, float_bits, load
from .masters import read_master, write_master
from .rows import padded, rows, scale_of
from .scratch import TILE, tile_pointer

#: Elements that share a scale, and blocks that are worked on at a time (they fit the cache).
BLOCK = 256
BLOCKS = TILE // BLOCK


def _tables(signed: bool) -> tuple[Any, Any, Any]:
    """Return the map, the middles that bound decades 0 .. 7, and the scale of each decade."""
    values = np.array(dynamic_map(signed=signed), dtype=np.float32)
    positive = values[values >= 0]
    middles = (positive[:-1] + positive[1:]) / np.float32(2)
    first = 1 if signed else 2
    bounds = [middles[0]] + [middles[(first << i) - (first - 1) - 1] for i in range(1, 7)]
    scales = [np.float32(10.0 ** (6 - i) * (first << i) / 0.9) for i in range(7)]
    return values, (*bounds, middles[-1]), tuple(scales)


_SIGNED, _SIGNED_BOUNDS, _SIGNED_SCALES = _tables(True)
_POSITIVE, _POSITIVE_BOUNDS, _POSITIVE_SCALES = _tables(False)


@njit(**KERNEL_OPTIONS)
def rank_of(x: Any, bounds: Any, scales: Any, first: Any) -> Any:
    """Return first - 1 + the rank of the value nearest to x in 0 .. 1 among those not negative."""
    t0, t1, t2, t3, t4, t5, t6, t7 = bounds
    s0, s1, s2, s3, s4, s5, s6 = scales
    high = x > t4
    pair = x > (t6 if high else t2)
    # Decade 7 does not exist: nothing is beyond its bound.
    odd = x > ((F32(2.0) if pair else t5) if high else (t3 if pair else t1))
    scale = (
        (s6 if pair else (s5 if odd else s4))
        if high
        else ((s3 if odd else s2) if pair else (s1 if odd else s0))
    )
    low = F32(16.0) * first if high else first
    low = F32(low * F32(4.0)) if pair else low
    low = F32(low * F32(2.0)) if odd else low
    place = F32(F32(x * scale) + F32(low * F32(8.0 / 9.0)))
    # Above the decade's last interval, but below the middle to the next decade's first value.
    rank = I32(min(place, F32(F32(low + low) - F32(0.5))))
    rank = I32(rank + I32(1)) if x > t7 else rank
    return rank if x > t0 else I32(first - F32(1.0))


@njit(**KERNEL_OPTIONS)
def encode_signed(value: Any, factor: Any) -> Any:
    """Return the code of a value; the map is symmetric but for its last value, one."""
    rank = rank_of(abs(F32(value * factor)), _SIGNED_BOUNDS, _SIGNED_SCALES, F32(1.0))
    below = I32(I32(127) - min(rank, I32(127)))
    return np.uint8(below if value < F32(0.0) else I32(I32(127) + rank))


@njit(**KERNEL_OPTIONS)
def encode_positive(value: Any, factor: Any) -> Any:
    """Return the code of a value that is not negative; zero alone gets code 0."""
    rank = rank_of(F32(value * factor), _POSITIVE_BOUNDS, _POSITIVE_SCALES, F32(2.0))
    code = I32(rank - I32(1))
    return np.uint8(max(code, I32(1)) if value > F32(0.0) else code)


@njit(**KERNEL_OPTIONS)
def into_unit(scale: Any) -> Any:
    """Return the factor that scales a block's values to one."""
    return F32(F32(1.0) / (scale if not scale < F32(1e-38) else F32(1e-38)))


@njit(**KERNEL_OPTIONS)
def adamw_blocks(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, v_codes: Any, v_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any, short: Any,
) -> None:  # fmt: skip
    """Update whole blocks; ``offset`` is the first element's index, a multiple of the block.

    ``short``: a padded last block, which the format divides instead of multiplying.
    """
    m, v = carray(tile_pointer(), (BLOCKS, BLOCK)), carray(tile_pointer(), (BLOCKS, BLOCK))
    weights, extras, grads = rows(weight, BLOCK), rows(extra, BLOCK), rows(grad, BLOCK)
    m_rows, v_rows = rows(m_codes, BLOCK), rows(v_codes, BLOCK)
    for row in range(m_scale.shape[0]):
        # The high half of the 64-bit counter is constant in a block: 32-bit arithmetic.
        index = offset + row * BLOCK
        high_word, base = U32(U32(index >> 32) ^ high_key), U32(index & 4294967295)
        w, e, g, mc, vc = weights[row], extras[row], grads[row], m_rows[row], v_rows[row]
        mb, vb = m[0], v[0]
        m_step, v_step = m_scale[row], v_scale[row]
        m_worst, v_worst = U32(0), U32(0)
        for j in range(BLOCK):
            mb[j] = _SIGNED[mc[j]]
        for j in range(BLOCK):
            vb[j] = _POSITIVE[vc[j]]
        for j in range(BLOCK):
            old_m, old_v = F32(mb[j] * m_step), F32(vb[j] * v_step)
            p = read_master(w, e, j)
            new_m, new_v, p = adam_step(load(g, j), old_m, old_v, p, scalars)
            write_master(w, e, j, p, U32(base + U32(j)), low_key, high_word)
            mb[j], vb[j] = new_m, new_v
            m_worst = max(m_worst, U32(float_bits(new_m) & U32(0x7FFFFFFF)))
            v_worst = max(v_worst, float_bits(new_v))  # no second moment is negative
        m_scale[row], v_scale[row] = scale_of(m_worst), scale_of(v_worst)
        if short:
            m_floor, v_floor = max(m_scale[row], F32(1e-38)), max(v_scale[row], F32(1e-38))
            for j in range(BLOCK):
                # Divided here, so that the factor is one: x / floor is not x * (1 / floor).
                mb[j], vb[j] = F32(mb[j] / m_floor), F32(vb[j] / v_floor)
        m_factor = F32(1.0) if short else into_unit(m_scale[row])
        v_factor = F32(1.0) if short else into_unit(v_scale[row])
        for j in range(BLOCK):
            mc[j] = encode_signed(mb[j], m_factor)
        for j in range(BLOCK):
            vc[j] = encode_positive(vb[j], v_factor)


@njit(**KERNEL_OPTIONS)
def adamw_dynamic(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, v_codes: Any, v_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update one range; ``offset`` is the first element's index, a multiple of the block."""
    blocks = weight.shape[0] // BLOCK
    end = blocks * BLOCK
    adamw_blocks(
        weight[:end], extra[:end], grad[:end], m_codes[:end], m_scale[:blocks], v_codes[:end],
        v_scale[:blocks], scalars, offset, low_key, high_key, False,
    )  # fmt: skip
    if end < weight.shape[0]:
        # A short last block is padded with zeros, which change neither scale.
        w, e, g = padded(weight[end:], BLOCK), padded(extra[end:], BLOCK), padded(grad[end:], BLOCK)
        mc, vc = padded(m_codes[end:], BLOCK), padded(v_codes[end:], BLOCK)
        mc[weight.shape[0] - end :] = np.uint8(127)  # the signed map's zero
        adamw_blocks(
            w, e, g, mc, m_scale[blocks:], vc, v_scale[blocks:], scalars, offset + end, low_key,
            high_key, True,
        )  # fmt: skip
        left = weight.shape[0] - end
        weight[end:], m_codes[end:], v_codes[end:] = w[:left], mc[:left], vc[:left]
        extra[end:] = e[: extra[end:].shape[0]]
