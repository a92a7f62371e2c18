"""Fused AdamW with fp32 moments: one pass over memory, one kernel per master format.

All kernels take flat views of one range of a parameter and the same tuple of fp32 scalars:
``lr``; ``decay`` = 1 - lr*weight_decay; ``b1``; ``b2``; ``o1`` = 1 - b1; ``o2`` = 1 - b2;
``c1`` = 1 / (1 - b1**step); ``c2`` = 1 / sqrt(1 - b2**step); ``eps``; ``sign`` = -1 to maximize.
The order of operations, one rounding each, is

    m = b1*m + o1*g;  v = b2*v + (o2*g)*g;  p = p*decay - lr * ((m*c1) / (sqrt(v)*c2 + eps))

which the Adam brick repeats in torch operations.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit

from .bits import (
    F32,
    I16,
    I32,
    KERNEL_OPTIONS,
    U16,
    U32,
    bf16_stochastic,
    bf16_untied,
    bits_float,
    float_bits,
    load,
    settle,
    untie,
)


@njit(**KERNEL_OPTIONS)
def adam_moments(g: Any, m: Any, v: Any, scalars: Any) -> Any:
    """Return (m, v) after one step on one element; g is fp32."""
    _lr, _decay, b1, b2, o1, o2, _c1, _c2, _eps, sign = scalars
    m = F32(F32(b1 * m) + F32(F32(sign * o1) * g))
    return m, F32(F32(b2 * v) + F32(F32(o2 * g) * g))


@njit(**KERNEL_OPTIONS)
def adam_move(m: Any, v: Any, p: Any, scalars: Any) -> Any:
    """Return the master of one element, moved by its new moments."""
    lr, decay, _b1, _b2, _o1, _o2, c1, c2, eps, _sign = scalars
    d = F32(F32(m * c1) / F32(F32(F32(math.sqrt(v)) * c2) + eps))
    return F32(F32(p * decay) - F32(lr * d))


@njit(**KERNEL_OPTIONS)
def adam_step(g: Any, m: Any, v: Any, p: Any, scalars: Any) -> Any:
    """Return (m, v, p) after one step on one element; g is fp32."""
    m, v = adam_moments(g, m, v, scalars)
    return m, v, adam_move(m, v, p, scalars)


@njit(**KERNEL_OPTIONS)
def adamw_weight(weight: Any, grad: Any, m: Any, v: Any, scalars: Any) -> None:
    """Update an fp32 weight that is its own master."""
    for i in range(weight.shape[0]):
        m[i], v[i], weight[i] = adam_step(load(grad, i), m[i], v[i], weight[i], scalars)


@njit(**KERNEL_OPTIONS)
def adamw_master(weight: Any, grad: Any, master: Any, m: Any, v: Any, scalars: Any) -> None:
    """Update an fp32 master and round it to a 16-bit weight."""
    for i in range(weight.shape[0]):
        m[i], v[i], p = adam_step(load(grad, i), m[i], v[i], master[i], scalars)
        master[i] = settle(weight, i, p)


@njit(**KERNEL_OPTIONS)
def adamw_split(weight: Any, grad: Any, remainder: Any, m: Any, v: Any, scalars: Any) -> None:
    """Update the exact fp32 master kept as a bf16 weight and a 16-bit remainder."""
    for i in range(weight.shape[0]):
        p = bits_float(U32(U32(U32(U16(weight[i])) << U32(16)) + U32(I32(remainder[i]))))
        m[i], v[i], p = adam_step(load(grad, i), m[i], v[i], p, scalars)
        bits = untie(float_bits(p))
        high = bf16_untied(bits)
        weight[i] = I16(high)
        # A NaN's remainder is zero: adding its low bits back could carry it out of the NaNs.
        low = U32(bits - U32(high << U32(16)))
        remainder[i] = I16(low) if p == p else I16(0)


@njit(**KERNEL_OPTIONS)
def adamw_stochastic(
    weight: Any, grad: Any, m: Any, v: Any, scalars: Any, offset: Any, low_key: Any, high_key: Any
) -> None:
    """Update a bf16 weight without a master, rounding stochastically.

    ``offset`` is the index of the range's first element in the whole parameter.
    """
    # The high half of the 64-bit counter is constant between multiples of 2**32: cut there, so
    # that the inner loop is 32-bit arithmetic only.
    start = 0
    while start < weight.shape[0]:
        first = offset + start
        stop = min(weight.shape[0], start + (4294967296 - (first & 4294967295)))
        high_word = U32(U32(first >> 32) ^ high_key)
        base = U32(first & 4294967295)
        ws, gs, ms, vs = weight[start:stop], grad[start:stop], m[start:stop], v[start:stop]
        for i in range(ws.shape[0]):
            p = bits_float(U32(U32(U16(ws[i])) << U32(16)))
            ms[i], vs[i], p = adam_step(load(gs, i), ms[i], vs[i], p, scalars)
            ws[i] = I16(bf16_stochastic(float_bits(p), U32(base + U32(i)), low_key, high_word))
        start = stop
