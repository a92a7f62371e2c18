"""Fused AdamW with bitsandbytes' 8-bit states (``quant.int8_blockwise``): one pass.

Codes are estimated by arithmetic, not searched: the map is seven decades, each cut evenly, so that
comparisons find the decade and one multiplication the place in it.  The estimate is the code or
the one below it; comparing the value with the middle between the two decides, exactly as the
codec does.  Second moments that are not zero never get code 0, as in the ``int8_dynamic`` encoding.

There are two paths with the same bits: loops that any processor runs, and ``dynamic_lanes`` for
those that permute bytes.  The type of ``tables`` picks one: uint8 for the latter; an empty float32
array for the loops, whose tables are constants: the compiler knows that no argument points there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import overload

from ...quant.tables import code_table, dynamic_map
from .adamw import adam_step
from .bits import F32, I32, KERNEL_OPTIONS, U32, float_bits, load
from .dynamic_lanes import (
    LOWERED,
    decode_positive_row,
    decode_signed_row,
    encode_positive_row,
    encode_signed_row,
    lane_tables,
)
from .masters import read_master, write_master
from .rows import padded, rows, scale_of
from .scratch import TILE, tile_pointer

#: Elements that share a scale, and blocks that are worked on at a time (they fit the cache).
BLOCK = 256
BLOCKS = TILE // BLOCK

#: The decades' lower edges but the first's, and codes of the lowest decade over its width.
_EDGES = tuple(F32(10.0 ** (decade - 7)) for decade in range(1, 7))
_PER_UNIT = tuple(F32(10.0 ** (6 - decade) * (1 << decade) / 0.9) for decade in range(7))


def _maps() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the values of the signed and the positive map, and the middles above zero of each."""
    tables = [
        code_table(dynamic_map(signed=signed), torch.device("cpu")) for signed in (True, False)
    ]
    middles = [table.midpoints.numpy() for table in tables]
    return [table.values.numpy() for table in tables], [one[one > 0] for one in middles]


(_SIGNED, _POSITIVE), (_SIGNED_MIDDLES, _POSITIVE_MIDDLES) = (
    # Any uint8 is an index.
    [np.pad(one, (0, 256 - one.shape[0])) for one in kind]
    for kind in _maps()
)


@functools.cache
def dynamic_tables(*, wide: bool) -> np.ndarray:
    """Return the argument that picks a path, and holds its tables if it is the wide one.

    ``wide``: the path for processors that permute bytes (``machine.permutes_bytes``).
    """
    return lane_tables(*_maps()) if wide else np.empty(0, np.float32)


@njit(**KERNEL_OPTIONS)
def estimated_rank(x: Any, first: Any) -> Any:
    """Return the rank of 0 .. 1 among the values that are not negative, or the rank below it.

    ``first``: how many values the lowest decade has.
    """
    e1, e2, e3, e4, e5, e6 = _EDGES
    s0, s1, s2, s3, s4, s5, s6 = _PER_UNIT
    high = x > e4
    pair = x > (e6 if high else e2)
    # Decade 7 does not exist: nothing is beyond its edge.
    odd = x > ((F32(2.0) if pair else e5) if high else (e3 if pair else e1))
    scale = (
        (s6 if pair else (s5 if odd else s4))
        if high
        else ((s3 if odd else s2) if pair else (s1 if odd else s0))
    )
    low = F32(16.0) * first if high else first
    low = F32(low * F32(4.0)) if pair else low
    low = F32(low * F32(2.0)) if odd else low
    place = F32(F32(F32(x * scale) * first) + F32(low * F32(8.0 / 9.0)))
    return np.uint8(U32(I32(F32(place - F32(first - F32(1.0 - LOWERED))))))


@njit(**KERNEL_OPTIONS)
def signed_code(x: Any, rank: Any, middle: Any) -> Any:
    """Return the code of -1 .. 1, given the rank or the one below it, and the middle above that.

    The map is symmetric but for its last value, one; ties go to the lower value.
    """
    magnitude = abs(x)
    below = I32(I32(126) - I32(rank) if magnitude >= middle else I32(127) - I32(rank))
    above = I32(I32(128) + I32(rank) if magnitude > middle else I32(127) + I32(rank))
    return np.uint8(max(below, I32(0)) if x < F32(0.0) else above)


@njit(**KERNEL_OPTIONS)
def positive_code(value: Any, x: Any, rank: Any, middle: Any) -> Any:
    """Return the code of 0 .. 1, ``value`` before it was scaled; zero alone gets code 0."""
    code = I32(I32(rank) + I32(1) if x > middle else I32(rank))
    return np.uint8(max(code, I32(1)) if value > F32(0.0) else code)


def decode_signed(codes: Any, tables: Any, values: Any) -> None:
    """Write the values of a block's codes (compiled code only)."""
    raise TypeError("decode_signed() exists in compiled kernels only")


def decode_positive(codes: Any, tables: Any, values: Any) -> None:
    """Write the values of a block's codes, of the positive map (compiled code only)."""
    raise TypeError("decode_positive() exists in compiled kernels only")


def encode_signed(values: Any, factor: Any, tables: Any, codes: Any) -> None:
    """Write a block's codes, any ones for values not finite (compiled code only)."""
    raise TypeError("encode_signed() exists in compiled kernels only")


def encode_positive(values: Any, factor: Any, tables: Any, codes: Any) -> None:
    """Write a block's codes, none of whose values is negative (compiled code only)."""
    raise TypeError("encode_positive() exists in compiled kernels only")


@overload(decode_signed, strict=False)
def _decode_signed(codes: Any, tables: Any, values: Any) -> Callable[..., Any]:
    if tables.dtype == types.uint8:
        return lambda codes, tables, values: decode_signed_row(codes, tables, values)

    def one_by_one(codes: Any, tables: Any, values: Any) -> None:
        for j in range(BLOCK):
            values[j] = _SIGNED[codes[j]]

    return one_by_one


@overload(decode_positive, strict=False)
def _decode_positive(codes: Any, tables: Any, values: Any) -> Callable[..., Any]:
    if tables.dtype == types.uint8:
        return lambda codes, tables, values: decode_positive_row(codes, tables, values)

    def one_by_one(codes: Any, tables: Any, values: Any) -> None:
        for j in range(BLOCK):
            values[j] = _POSITIVE[codes[j]]

    return one_by_one


@overload(encode_signed, strict=False)
def _encode_signed(values: Any, factor: Any, tables: Any, codes: Any) -> Callable[..., Any]:
    if tables.dtype == types.uint8:
        return lambda values, factor, tables, codes: encode_signed_row(
            values, factor, tables, codes
        )

    def one_by_one(values: Any, factor: Any, tables: Any, codes: Any) -> None:
        for j in range(BLOCK):
            x = F32(values[j] * factor)
            rank = estimated_rank(abs(x), F32(1.0))
            codes[j] = signed_code(x, rank, _SIGNED_MIDDLES[rank])

    return one_by_one


@overload(encode_positive, strict=False)
def _encode_positive(values: Any, factor: Any, tables: Any, codes: Any) -> Callable[..., Any]:
    if tables.dtype == types.uint8:
        return lambda values, factor, tables, codes: encode_positive_row(
            values, factor, tables, codes
        )

    def one_by_one(values: Any, factor: Any, tables: Any, codes: Any) -> None:
        for j in range(BLOCK):
            x = F32(values[j] * factor)
            rank = estimated_rank(x, F32(2.0))
            codes[j] = positive_code(values[j], x, rank, _POSITIVE_MIDDLES[rank])

    return one_by_one


@njit(**KERNEL_OPTIONS)
def into_unit(scale: Any) -> Any:
    """Return the factor that scales a block's values to one."""
    return F32(F32(1.0) / (scale if not scale < F32(1e-38) else F32(1e-38)))


@njit(**KERNEL_OPTIONS)
def adamw_blocks(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, v_codes: Any, v_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any, tables: Any, short: Any,
) -> None:  # fmt: skip
    """Update whole blocks; ``offset`` is the first element's index, a multiple of the block.

    ``short``: a padded last block, which the format divides instead of multiplying.
    """
    m, v = carray(tile_pointer(), (BLOCKS, BLOCK)), carray(tile_pointer(), (BLOCKS, BLOCK))
    count = m_scale.shape[0]
    weights, extras, grads = rows(weight, BLOCK), rows(extra, BLOCK), rows(grad, BLOCK)
    m_rows, v_rows = rows(m_codes, BLOCK), rows(v_codes, BLOCK)
    for first in range(0, count, BLOCKS):
        blocks = min(BLOCKS, count - first)
        for b in range(blocks):
            row = first + b
            # The high half of the 64-bit counter is constant in a block: 32-bit arithmetic.
            index = offset + row * BLOCK
            high_word, base = U32(U32(index >> 32) ^ high_key), U32(index & 4294967295)
            w, e, g, mb, vb = weights[row], extras[row], grads[row], m[b], v[b]
            m_step, v_step = m_scale[row], v_scale[row]
            m_worst, v_worst = U32(0), U32(0)
            decode_signed(m_rows[row], tables, mb)
            decode_positive(v_rows[row], tables, vb)
            for j in range(BLOCK):
                old_m, old_v = F32(mb[j] * m_step), F32(vb[j] * v_step)
                p = read_master(w, e, j)
                new_m, new_v, p = adam_step(load(g, j), old_m, old_v, p, scalars)
                write_master(w, e, j, p, U32(base + U32(j)), low_key, high_word)
                mb[j], vb[j] = new_m, new_v
                m_worst = max(m_worst, U32(float_bits(new_m) & U32(0x7FFFFFFF)))
                v_worst = max(v_worst, float_bits(new_v))  # no second moment is negative
            m_scale[row], v_scale[row] = scale_of(m_worst), scale_of(v_worst)
        for b in range(blocks):
            row = first + b
            mc, vc, mb, vb = m_rows[row], v_rows[row], m[b], v[b]
            if short:
                m_floor, v_floor = max(m_scale[row], F32(1e-38)), max(v_scale[row], F32(1e-38))
                for j in range(BLOCK):
                    # Divided here, so that the factor is one: x / floor is not x * (1 / floor).
                    quotient = F32(vb[j] / v_floor)
                    lost = vb[j] > F32(0.0) and quotient == F32(0.0)
                    mb[j] = F32(mb[j] / m_floor)
                    vb[j] = F32(1e-45) if lost else quotient
            m_factor = F32(1.0) if short else into_unit(m_scale[row])
            v_factor = F32(1.0) if short else into_unit(v_scale[row])
            encode_signed(mb, m_factor, tables, mc)
            encode_positive(vb, v_factor, tables, vc)


@njit(**KERNEL_OPTIONS)
def mark_lost(codes: Any, scale: Any) -> None:
    """Give blocks that are not finite the codec's code of NaN; their values are NaN anyway."""
    for row in range(scale.shape[0]):
        if not scale[row] == scale[row]:
            codes[row * BLOCK : (row + 1) * BLOCK] = np.uint8(255)


@njit(**KERNEL_OPTIONS)
def adamw_dynamic(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, v_codes: Any, v_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any, tables: Any,
) -> None:  # fmt: skip
    """Update one range; ``offset`` is the first element's index, a multiple of the block."""
    blocks = weight.shape[0] // BLOCK
    end = blocks * BLOCK
    adamw_blocks(
        weight[:end], extra[:end], grad[:end], m_codes[:end], m_scale[:blocks], v_codes[:end],
        v_scale[:blocks], scalars, offset, low_key, high_key, tables, False,
    )  # fmt: skip
    if end < weight.shape[0]:
        # A short last block is padded with zeros, which change neither scale.
        w, e, g = padded(weight[end:], BLOCK), padded(extra[end:], BLOCK), padded(grad[end:], BLOCK)
        mc, vc = padded(m_codes[end:], BLOCK), padded(v_codes[end:], BLOCK)
        mc[weight.shape[0] - end :] = np.uint8(127)  # the signed map's zero
        adamw_blocks(
            w, e, g, mc, m_scale[blocks:], vc, v_scale[blocks:], scalars, offset + end, low_key,
            high_key, tables, True,
        )  # fmt: skip
        left = weight.shape[0] - end
        weight[end:], m_codes[end:], v_codes[end:] = w[:left], mc[:left], vc[:left]
        extra[end:] = e[: extra[end:].shape[0]]
    mark_lost(m_codes, m_scale)
    mark_lost(v_codes, v_scale)
