"""Loading and storing encoded moments in device kernels, whatever the encoding.

A tile is (rows, block): each row is a quantisation block.  Bytes and names are those that
``storage`` keeps, so that a checkpoint does not tell which path wrote it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import companded, floats, tables
from .bits import bf16_stochastic, float_bits, scale_of, uniform_of, widened


@triton.jit
def _packed(rows: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return index and mask of the bytes of 4-bit codes (rows, block / 2)."""
    index = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    return index, index * 2 < count


@triton.jit
def _load_codes(
    codes: tl.tensor, index: tl.tensor, mask: tl.tensor, rows: tl.tensor, count: tl.tensor,
    BITS: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return int32 codes (rows, block); ``HIGH``: the even element is in the high half."""
    if BITS == 8:
        code = tl.load(codes + index, mask=mask, other=0).to(tl.int32)
    else:
        at, inside = _packed(rows, count, BLOCK)
        byte = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
        first, second = byte & 15, byte >> 4
        pairs = tl.join(second, first) if HIGH else tl.join(first, second)
        code = tl.reshape(pairs, (pairs.shape[0], BLOCK))
    return code


@triton.jit
def _store_codes(
    codes: tl.tensor, code: tl.tensor, index: tl.tensor, mask: tl.tensor, rows: tl.tensor,
    count: tl.tensor, BITS: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    if BITS == 8:
        tl.store(codes + index, code.to(tl.uint8), mask=mask)
    else:
        at, inside = _packed(rows, count, BLOCK)
        code = tl.where(mask, code, 0)
        even, odd = tl.split(tl.reshape(code, (code.shape[0], BLOCK // 2, 2)))
        byte = (even << 4) | odd if HIGH else (odd << 4) | even
        tl.store(codes + at, byte.to(tl.uint8), mask=inside)


@triton.jit
def load_moment(
    codes: tl.tensor, scale: tl.tensor, power: tl.tensor, values: tl.tensor, index: tl.tensor,
    mask: tl.tensor, rows: tl.tensor, row_mask: tl.tensor, count: tl.tensor,
    ENCODING: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a moment's fp32 values (rows, block)."""
    if ENCODING == "fp32":
        value = tl.load(codes + index, mask=mask, other=0)
    elif ENCODING == "bf16":
        value = widened(tl.load(codes + index, mask=mask, other=0))
    else:
        step = tl.load(scale + rows, mask=row_mask, other=0)[:, None]
        if ENCODING == "int4" or ENCODING == "int4_torchao":
            high: tl.constexpr = ENCODING == "int4_torchao"
            code = _load_codes(codes, index, mask, rows, count, 4, high, BLOCK)
        else:
            code = _load_codes(codes, index, mask, rows, count, 8, False, BLOCK)
        if ENCODING == "int8":
            value = companded.decode(code, step, 8, SIGNED)
        elif ENCODING == "int4":
            value = companded.decode(code, step, 4, SIGNED)
        elif ENCODING == "fp8":
            value = floats.decode_plain(code, step)
        elif ENCODING == "coat":
            own = tl.load(power + rows, mask=row_mask, other=16)[:, None]
            value = floats.decode_expanded(code, step, own)
        else:
            value = tables.decode(code, step, values)
        # Codes of zero decode to more than zero in some formats; beyond the end is nothing.
        value = tl.where(mask, value, 0.0)
    return value


@triton.jit
def store_moment(
    codes: tl.tensor, scale: tl.tensor, power: tl.tensor, middles: tl.tensor, value: tl.tensor,
    noise: tl.tensor, index: tl.tensor, mask: tl.tensor, rows: tl.tensor, row_mask: tl.tensor,
    count: tl.tensor, ENCODING: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Encode a moment's fp32 values (rows, block); ``noise``: for stochastic encodings only."""
    if ENCODING == "fp32":
        tl.store(codes + index, value, mask=mask)
    elif ENCODING == "bf16":
        tl.store(codes + index, bf16_stochastic(float_bits(value), noise).to(tl.int16), mask=mask)
    else:
        value = tl.where(mask, value, 0.0)
        largest = scale_of(value)
        step = largest[:, None]
        if ENCODING == "int8":
            code = companded.encode(value, step, value, 8, SIGNED, False)
        elif ENCODING == "int4":
            code = companded.encode(value, step, uniform_of(noise), 4, SIGNED, True)
        elif ENCODING == "fp8":
            largest = tl.div_rn(largest, 448.0)
            code = floats.encode_plain(value, largest[:, None], uniform_of(noise), SIGNED)
        elif ENCODING == "coat":
            own = floats.power_of(value, largest)
            code = floats.encode_expanded(value, step, own[:, None])
            tl.store(power + rows, own.to(tl.int32).to(tl.uint8), mask=row_mask)
        elif ENCODING == "int8_dynamic":
            short = ((rows + 1) * BLOCK > count)[:, None]
            code = tables.encode(value, step, short, middles, 256)
            if not SIGNED:
                code = tl.where((value > 0) & (code == 0), 1, code)
        else:
            code = tables.encode(value, step, False, middles, 16)
        tl.store(scale + rows, largest, mask=row_mask)
        if ENCODING == "int4" or ENCODING == "int4_torchao":
            high: tl.constexpr = ENCODING == "int4_torchao"
            _store_codes(codes, code, index, mask, rows, count, 4, high, BLOCK)
        else:
            _store_codes(codes, code, index, mask, rows, count, 8, False, BLOCK)
