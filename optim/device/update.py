"""The fused update kernel: weights, gradients and states through the chip once.

One source for every elementwise brick, encoding and master; the constants of a launch choose, so
that a recipe gets a kernel of its own.  The order of operations is that of the bricks, one
rounding each; scalars are arguments, so that no value of theirs compiles anything anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import load, noise_of
from .masters import read_master, write_master
from .states import load_moment, store_moment


@triton.jit
def _sign(x: tl.tensor) -> tl.tensor:
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "offset_low", "offset_high", "low_key", "high_key", "m_low_key", "m_high_key",
        "v_low_key", "v_high_key",
    ]
)  # fmt: skip
def update(
    weight: tl.tensor, extra: tl.tensor, grad: tl.tensor, m_codes: tl.tensor, m_scale: tl.tensor,
    m_power: tl.tensor, v_codes: tl.tensor, v_scale: tl.tensor, v_power: tl.tensor,
    m_values: tl.tensor, m_middles: tl.tensor, v_values: tl.tensor, v_middles: tl.tensor,
    lr: tl.tensor, decay: tl.tensor, b1: tl.tensor, b2: tl.tensor, o1: tl.tensor, o2: tl.tensor,
    c1: tl.tensor, c2: tl.tensor, eps: tl.tensor, sign: tl.tensor, count: tl.tensor,
    offset_low: tl.tensor, offset_high: tl.tensor, low_key: tl.tensor, high_key: tl.tensor,
    m_low_key: tl.tensor, m_high_key: tl.tensor, v_low_key: tl.tensor, v_high_key: tl.tensor,
    BRICK: tl.constexpr, ENCODING: tl.constexpr, MASTER: tl.constexpr, WEIGHT: tl.constexpr,
    GRAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Update ``ROWS`` blocks of ``BLOCK`` elements; offset words are those of element 0's index.

    Words (offsets, keys) are 32 bits in an int32.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows * BLOCK < count
    index = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = index < count
    low = offset_low.to(tl.uint32, bitcast=True).to(tl.int64)
    counter = (offset_high.to(tl.int64) << 32) + low + index
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)

    p = read_master(weight, extra, index, mask, WEIGHT, MASTER)
    g = load(grad, index, mask, GRAD) * sign
    m, v = g, g
    if BRICK == "adam":
        m = load_moment(
            m_codes, m_scale, m_power, m_values, index, mask, rows, row_mask, count, ENCODING,
            True, BLOCK,
        )  # fmt: skip
        v = load_moment(
            v_codes, v_scale, v_power, v_values, index, mask, rows, row_mask, count, ENCODING,
            False, BLOCK,
        )  # fmt: skip
        m = m * b1 + g * o1
        v = v * b2 + (g * o2) * g
        root = tl.sqrt_rn(v) * c2
        direction = tl.div_rn(m * c1, root + eps)
    elif BRICK == "lion":
        m = load_moment(
            m_codes, m_scale, m_power, m_values, index, mask, rows, row_mask, count, ENCODING,
            True, BLOCK,
        )  # fmt: skip
        direction = _sign(m * b1 + g * o1)
        m = m * b2 + g * o2
    elif BRICK == "momentum" or BRICK == "nesterov":
        m = load_moment(
            m_codes, m_scale, m_power, m_values, index, mask, rows, row_mask, count, ENCODING,
            True, BLOCK,
        )  # fmt: skip
        m = m * b1 + g
        direction = g + m * b1 if BRICK == "nesterov" else m
    elif BRICK == "sign":
        direction = _sign(g)
    else:
        direction = g
    noise = noise_of(low, high, low_key, high_key)
    write_master(weight, extra, index, mask, p * decay - direction * lr, noise, WEIGHT, MASTER)
    if BRICK != "sign" and BRICK != "plain":
        noise = noise_of(low, high, m_low_key, m_high_key)
        store_moment(
            m_codes, m_scale, m_power, m_middles, m, noise, index, mask, rows, row_mask, count,
            ENCODING, True, BLOCK,
        )  # fmt: skip
    if BRICK == "adam":
        noise = noise_of(low, high, v_low_key, v_high_key)
        store_moment(
            v_codes, v_scale, v_power, v_middles, v, noise, index, mask, rows, row_mask, count,
            ENCODING, False, BLOCK,
        )  # fmt: skip
