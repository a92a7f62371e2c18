"""Fused AdamW and Lion with power-companded 8-bit states (``quant.companded``): one pass.

A block (128 elements) is decoded into scratch that stays in the first-level cache, updated, and
encoded again.  One simple loop a stage, so that each becomes SIMD code; largest magnitudes are
found on integer bit patterns, because float maxima do not vectorise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from .adamw import adam_step
from .bits import F32, I32, KERNEL_OPTIONS, U32, bits_float, float_bits, load
from .masters import read_master, write_master


@njit(**KERNEL_OPTIONS)
def decode_signed(codes: Any, scale: Any, out: Any) -> None:
    """Decode int8 patterns: sign(c) (c/127)^2 times the block's scale."""
    step = F32(1.0) / F32(127 * 127)
    for j in range(codes.shape[0]):
        c = I32(np.int8(codes[j]))
        # The lowest pattern, -128, is never written and reads as -127.
        c = max(c, I32(-127))
        out[j] = F32(F32(F32(c * abs(c)) * step) * scale)


@njit(**KERNEL_OPTIONS)
def decode_positive(codes: Any, scale: Any, out: Any) -> None:
    """Decode uint8 codes: (c/255)^4 times the block's scale."""
    step = F32(1.0) / F32(255 * 255)
    for j in range(codes.shape[0]):
        c = I32(codes[j])
        r = F32(F32(c * c) * step)
        out[j] = F32(F32(r * r) * scale)


@njit(**KERNEL_OPTIONS)
def largest(values: Any, count: int) -> float:
    """Return the largest magnitude; NaN if any value is not finite."""
    worst = I32(0)
    for j in range(count):
        worst = max(worst, I32(float_bits(values[j]) & U32(0x7FFFFFFF)))
    return bits_float(U32(worst) if worst < I32(0x7F800000) else U32(0x7FC00000))


@njit(**KERNEL_OPTIONS)
def encode_signed(values: Any, codes: Any) -> float:
    """Encode a block of signed values; return its scale."""
    scale = largest(values, codes.shape[0])
    inverse = F32(1.0) / F32(max(scale, F32(1e-30)))
    for j in range(codes.shape[0]):
        x = F32(values[j] * inverse)
        c = I32(min(F32(F32(F32(math.sqrt(abs(x))) * F32(127.0)) + F32(0.5)), F32(127.0)))
        codes[j] = np.uint8(-c if x < F32(0.0) else c)
    return scale


@njit(**KERNEL_OPTIONS)
def encode_positive(values: Any, codes: Any) -> float:
    """Encode a block of values that are not negative; those above zero never become code 0."""
    scale = largest(values, codes.shape[0])
    inverse = F32(1.0) / F32(max(scale, F32(1e-30)))
    for j in range(codes.shape[0]):
        x = F32(values[j] * inverse)
        root = F32(math.sqrt(F32(math.sqrt(max(x, F32(0.0))))))
        c = I32(min(F32(F32(root * F32(255.0)) + F32(0.5)), F32(255.0)))
        least = I32(1) if values[j] > F32(0.0) else I32(0)
        codes[j] = np.uint8(max(c, least))
    return scale


@njit(**KERNEL_OPTIONS)
def load_block(grad: Any, out: Any) -> None:
    """Widen a block of gradients to fp32."""
    for j in range(grad.shape[0]):
        out[j] = load(grad, j)


@njit(**KERNEL_OPTIONS)
def read_masters(weight: Any, extra: Any, out: Any) -> None:
    """Read a block of masters."""
    for j in range(weight.shape[0]):
        out[j] = read_master(weight, extra, j)


@njit(**KERNEL_OPTIONS)
def write_masters(
    weight: Any, extra: Any, values: Any, base: Any, low_key: Any, high_word: Any
) -> None:
    """Write a block of masters and round them into the weight."""
    for j in range(weight.shape[0]):
        write_master(weight, extra, j, values[j], U32(base + U32(j)), low_key, high_word)


@njit(**KERNEL_OPTIONS)
def adam_block(x: Any, m: Any, v: Any, p: Any, count: Any, scalars: Any) -> None:
    """Do Adam's arithmetic on fp32 scratch; four arrays are few enough for LLVM to vectorise."""
    for j in range(count):
        m[j], v[j], p[j] = adam_step(x[j], m[j], v[j], p[j], scalars)


@njit(**KERNEL_OPTIONS)
def lion_block(x: Any, m: Any, p: Any, count: Any, scalars: Any) -> None:
    """Do Lion's arithmetic on fp32 scratch."""
    lr, decay, b1, b2, o1, o2, _c1, _c2, _eps, sign = scalars
    for j in range(count):
        g = F32(sign * x[j])
        c = F32(F32(b1 * m[j]) + F32(o1 * g))
        m[j] = F32(F32(b2 * m[j]) + F32(o2 * g))
        # sign(c) * lr, with sign(0) = 0 and NaN kept
        d = lr if c > F32(0.0) else (F32(-lr) if c < F32(0.0) else F32(c * lr))
        p[j] = F32(F32(p[j] * decay) - d)


@njit(**KERNEL_OPTIONS)
def adamw_companded(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, v_codes: Any, v_scale: Any,
    scalars: Any, block: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update one range; ``offset`` is the first element's index, a multiple of ``block``."""
    m, v = np.empty(block, np.float32), np.empty(block, np.float32)
    p, x = np.empty(block, np.float32), np.empty(block, np.float32)
    count = weight.shape[0]
    for b in range((count + block - 1) // block):
        start = b * block
        stop = min(start + block, count)
        first = offset + start
        high_word = U32(U32(first >> 32) ^ high_key)
        base = U32(first & 4294967295)
        w, e, g = weight[start:stop], extra[start:stop], grad[start:stop]
        mc, vc = m_codes[start:stop], v_codes[start:stop]
        decode_signed(mc, m_scale[b], m)
        decode_positive(vc, v_scale[b], v)
        load_block(g, x)
        read_masters(w, e, p)
        adam_block(x, m, v, p, w.shape[0], scalars)
        write_masters(w, e, p, base, low_key, high_word)
        m_scale[b] = encode_signed(m, mc)
        v_scale[b] = encode_positive(v, vc)


@njit(**KERNEL_OPTIONS)
def lion_companded(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any,
    scalars: Any, block: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update one range by Lion; ``scalars`` as for AdamW, of which eps and corrections rest."""
    m, p = np.empty(block, np.float32), np.empty(block, np.float32)
    x = np.empty(block, np.float32)
    count = weight.shape[0]
    for b in range((count + block - 1) // block):
        start = b * block
        stop = min(start + block, count)
        first = offset + start
        high_word = U32(U32(first >> 32) ^ high_key)
        base = U32(first & 4294967295)
        w, e, g = weight[start:stop], extra[start:stop], grad[start:stop]
        mc = m_codes[start:stop]
        decode_signed(mc, m_scale[b], m)
        load_block(g, x)
        read_masters(w, e, p)
        lion_block(x, m, p, w.shape[0], scalars)
        write_masters(w, e, p, base, low_key, high_word)
        m_scale[b] = encode_signed(m, mc)
