"""Fused AdamW and Lion with power-companded 8-bit states (``quant.companded``): one pass.

Eight blocks of 128 elements are decoded into scratch that stays in the first-level cache, updated,
and encoded again.  One simple loop a stage, so that each becomes SIMD code, with a constant inner
length, so that no time goes into remainders; largest magnitudes are found on integer bit
patterns, because float maxima do not vectorise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from .adamw import adam_root_step
from .bits import F32, I32, KERNEL_OPTIONS, U32, bits_float, float_bits, load
from .masters import read_master, write_master

#: Elements that share a scale, and blocks that are worked on at a time (they fit the cache).
BLOCK = 128
BLOCKS = 8


@njit(**KERNEL_OPTIONS)
def decode_signed(codes: Any, scales: Any, out: Any) -> None:
    """Decode (blocks, 128) int8 patterns: sign(c) (c/127)^2 times each block's scale."""
    step = F32(1.0) / F32(127 * 127)
    for b in range(codes.shape[0]):
        row, into, scale = codes[b], out[b], scales[b]
        for j in range(BLOCK):
            c = max(F32(np.int8(row[j])), F32(-127.0))  # -128 is never written and reads as -127
            into[j] = F32(F32(F32(c * abs(c)) * step) * scale)


@njit(**KERNEL_OPTIONS)
def decode_positive(codes: Any, scales: Any, out: Any) -> None:
    """Decode (blocks, 128) uint8 codes: (c/255)^4 times each block's scale."""
    step = F32(1.0) / F32(255 * 255)
    for b in range(codes.shape[0]):
        row, into, scale = codes[b], out[b], scales[b]
        for j in range(BLOCK):
            c = F32(row[j])
            r = F32(F32(c * c) * step)
            into[j] = F32(F32(r * r) * scale)


@njit(**KERNEL_OPTIONS)
def largest(row: Any) -> Any:
    """Return the largest magnitude of a block; NaN if any value is not finite."""
    worst = I32(0)
    for j in range(BLOCK):
        worst = max(worst, I32(float_bits(row[j]) & U32(0x7FFFFFFF)))
    return bits_float(U32(worst) if worst < I32(0x7F800000) else U32(0x7FC00000))


@njit(**KERNEL_OPTIONS)
def encode_signed(values: Any, codes: Any, scales: Any) -> None:
    """Encode (blocks, 128) signed values."""
    for b in range(codes.shape[0]):
        row, into = values[b], codes[b]
        scale = largest(row)
        scales[b] = scale
        inverse = F32(1.0) / F32(max(scale, F32(1e-30)))
        for j in range(BLOCK):
            x = F32(row[j] * inverse)
            c = I32(min(F32(F32(F32(math.sqrt(abs(x))) * F32(127.0)) + F32(0.5)), F32(127.0)))
            into[j] = np.uint8(-c if x < F32(0.0) else c)


@njit(**KERNEL_OPTIONS)
def encode_positive(values: Any, roots: Any, codes: Any, scales: Any) -> None:
    """Encode (blocks, 128) values >= 0 by their roots; those above zero never become code 0."""
    for b in range(codes.shape[0]):
        row, into = roots[b], codes[b]
        scale = largest(values[b])
        scales[b] = scale
        inverse = F32(1.0) / F32(math.sqrt(max(scale, F32(1e-30))))
        for j in range(BLOCK):
            root = F32(math.sqrt(F32(row[j] * inverse)))
            c = min(F32(F32(root * F32(255.0)) + F32(0.5)), F32(255.0))
            least = F32(1.0) if row[j] > F32(0.0) else F32(0.0)
            into[j] = np.uint8(I32(max(c, least)))


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
    """Do Adam's arithmetic on fp32 scratch and leave sqrt(v) in ``x``.

    Four arrays are few enough for LLVM to vectorise.
    """
    for j in range(count):
        m[j], v[j], p[j], x[j] = adam_root_step(x[j], m[j], v[j], p[j], scalars)


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
def widen(part: Any, padded: Any) -> None:
    """Copy a short run of codes into zeroed whole blocks."""
    padded[:] = 0
    for j in range(part.shape[0]):
        padded[j] = part[j]


@njit(**KERNEL_OPTIONS)
def adamw_companded(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any, v_codes: Any, v_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update one range; ``offset`` is the first element's index, a multiple of the block."""
    tile = BLOCK * BLOCKS
    m, v = np.zeros((BLOCKS, BLOCK), np.float32), np.zeros((BLOCKS, BLOCK), np.float32)
    p, x = np.zeros(tile, np.float32), np.zeros(tile, np.float32)
    m_tail, v_tail = np.zeros(tile, np.uint8), np.zeros(tile, np.uint8)
    count = weight.shape[0]
    start = 0
    while start < count:
        first = offset + start
        # The high half of the 64-bit counter is constant between multiples of 2**32: cut there.
        stop = min(start + tile, count, start + (4294967296 - (first & 4294967295)))
        blocks = (stop - start + BLOCK - 1) // BLOCK
        high_word = U32(U32(first >> 32) ^ high_key)
        base = U32(first & 4294967295)
        w, e, g = weight[start:stop], extra[start:stop], grad[start:stop]
        ms = m_scale[start // BLOCK : start // BLOCK + blocks]
        vs = v_scale[start // BLOCK : start // BLOCK + blocks]
        whole = stop - start == blocks * BLOCK
        if whole:
            mc, vc = m_codes[start:stop], v_codes[start:stop]
        else:
            # A short last block is padded with zeros, which change neither scale.
            mc, vc = m_tail[: blocks * BLOCK], v_tail[: blocks * BLOCK]
            widen(m_codes[start:stop], mc)
            widen(v_codes[start:stop], vc)
            x[:] = F32(0.0)
        mc2, vc2 = mc.reshape(blocks, BLOCK), vc.reshape(blocks, BLOCK)
        decode_signed(mc2, ms, m)
        decode_positive(vc2, vs, v)
        load_block(g, x)
        read_masters(w, e, p)
        adam_block(x, m.reshape(tile), v.reshape(tile), p, blocks * BLOCK, scalars)
        write_masters(w, e, p, base, low_key, high_word)
        encode_signed(m, mc2, ms)
        encode_positive(v, x.reshape(BLOCKS, BLOCK), vc2, vs)
        if not whole:
            m_codes[start:stop] = mc[: stop - start]
            v_codes[start:stop] = vc[: stop - start]
        start = stop


@njit(**KERNEL_OPTIONS)
def lion_companded(
    weight: Any, extra: Any, grad: Any, m_codes: Any, m_scale: Any,
    scalars: Any, offset: Any, low_key: Any, high_key: Any,
) -> None:  # fmt: skip
    """Update one range by Lion; ``scalars`` as for AdamW, of which eps and corrections rest."""
    tile = BLOCK * BLOCKS
    m = np.zeros((BLOCKS, BLOCK), np.float32)
    p, x = np.zeros(tile, np.float32), np.zeros(tile, np.float32)
    m_tail = np.zeros(tile, np.uint8)
    count = weight.shape[0]
    start = 0
    while start < count:
        first = offset + start
        # The high half of the 64-bit counter is constant between multiples of 2**32: cut there.
        stop = min(start + tile, count, start + (4294967296 - (first & 4294967295)))
        blocks = (stop - start + BLOCK - 1) // BLOCK
        high_word = U32(U32(first >> 32) ^ high_key)
        base = U32(first & 4294967295)
        w, e, g = weight[start:stop], extra[start:stop], grad[start:stop]
        ms = m_scale[start // BLOCK : start // BLOCK + blocks]
        whole = stop - start == blocks * BLOCK
        if whole:
            mc = m_codes[start:stop]
        else:
            mc = m_tail[: blocks * BLOCK]
            widen(m_codes[start:stop], mc)
            x[:] = F32(0.0)
        mc2 = mc.reshape(blocks, BLOCK)
        decode_signed(mc2, ms, m)
        load_block(g, x)
        read_masters(w, e, p)
        lion_block(x, m.reshape(tile), p, blocks * BLOCK, scalars)
        write_masters(w, e, p, base, low_key, high_word)
        encode_signed(m, mc2, ms)
        if not whole:
            m_codes[start:stop] = mc[: stop - start]
        start = stop
