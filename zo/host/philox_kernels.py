"""Numba kernels of the generator: Philox4x32-10 words and the maps from words to noise.

Bits are those of ``zo.philox`` on every CPU: no fast-math, no fused multiply-add.  Blocks are made
many at a time in structure-of-arrays form, words ``x[4 n, LANES]`` (four rows a group of LANES
blocks), which is what lets LLVM use the vector units; several groups in one call share its set-up.
Gaussian and byte-sum noise keeps that form, *planes* ``[4 n, LANES]``: element ``4 * lane + plane``
of a group.  Signs are made in the order of elements, 128 a block.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from numba import njit

from .. import philox

KIND_CODES = MappingProxyType({"gaussian": 0, "irwin_hall": 1, "rademacher": 2})

#: Blocks made at a time; a compile-time constant, without which loops are not vectorised.
LANES = 128

OPTIONS = MappingProxyType({"nogil": True, "error_model": "numpy", "cache": True})

_u4, _i4, _f4, _u8 = np.uint32, np.int32, np.float32, np.uint64

_M0, _M1 = _u8(philox.MULTIPLIER_0), _u8(philox.MULTIPLIER_1)
_W0, _W1 = _u8(philox.WEYL_0), _u8(philox.WEYL_1)
_LOW, _HALF = _u8(philox.MASK), _u8(32)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (_f4(value) for value in philox.LOG_COEFFICIENTS)
_S0, _S1, _S2, _S3 = (_f4(value) for value in philox.SIN_COEFFICIENTS)
_C0, _C1, _C2, _C3 = (_f4(value) for value in philox.COS_COEFFICIENTS)
_LN2, _INV_2_32 = _f4(philox.LN2), _f4(philox.INV_2_32)
_SQRT_HALF = _i4(philox.SQRT_HALF_BITS)
_SUM_MEAN, _SUM_SCALE = _i4(philox.BYTE_SUM_MEAN), _f4(philox.BYTE_SUM_SCALE)


def split_seed(seed: int) -> tuple[np.uint32, np.uint32]:
    """The two key words of a 64-bit seed, low word first."""
    return _u4(seed & philox.MASK), _u4(seed >> 32)


@njit(**OPTIONS)
def words(x, first_block, k0, k1, stream, direction):  # type: ignore[no-untyped-def]
    """Fill x[4 n, LANES] with the words of consecutive blocks, LANES of them in every four rows.

    ``first_block`` is a multiple of the number of blocks, a power of two.
    """
    # Words live in 64-bit lanes whose upper halves hold rubbish: a multiplication reads the lower
    # halves only, so that a round is two multiplications, two shifts and two xors.  Two blocks
    # (a, b) take turns, because a round waits for the one before it.
    high = _u8(first_block) >> _HALF
    for group in range(x.shape[0] // 4):
        x0, x1, x2, x3 = x[4 * group], x[4 * group + 1], x[4 * group + 2], x[4 * group + 3]
        low = (_u8(first_block) & _LOW) + _u8(group) * _u8(LANES)
        for lane in range(LANES // 2):
            other = lane + LANES // 2
            a0, a1, a2, a3 = low + _u8(lane), high, _u8(stream), _u8(direction)
            b0, b1, b2, b3 = low + _u8(other), high, _u8(stream), _u8(direction)
            q0, q1 = _u8(k0), _u8(k1)
            for _ in range(10):
                a_low = (a0 & _LOW) * _M0
                b_low = (b0 & _LOW) * _M0
                a_high = (a2 & _LOW) * _M1
                b_high = (b2 & _LOW) * _M1
                a0 = (a_high >> _HALF) ^ a1 ^ q0
                b0 = (b_high >> _HALF) ^ b1 ^ q0
                a1, b1 = a_high, b_high
                a2 = (a_low >> _HALF) ^ a3 ^ q1
                b2 = (b_low >> _HALF) ^ b3 ^ q1
                a3, b3 = a_low, b_low
                q0 = q0 + _W0
                q1 = q1 + _W1
            x0[lane], x1[lane], x2[lane], x3[lane] = _u4(a0), _u4(a1), _u4(a2), _u4(a3)
            x0[other], x1[other], x2[other], x3[other] = _u4(b0), _u4(b1), _u4(b2), _u4(b3)


@njit(inline="always")
def _with_sign(value, word):  # type: ignore[no-untyped-def]
    """``value``, negated if the upper bit of ``word`` is set."""
    return _u4(_f4(value).view(np.uint32) ^ _u4(word & _u4(1 << 31))).view(np.float32)


@njit(inline="always")
def box_muller(a, b):  # type: ignore[no-untyped-def]
    """Two normals from two words."""
    bits = _f4(_f4(a) + _f4(0.5)).view(np.int32)
    exponent = _i4(_i4(bits - _SQRT_HALF) >> _i4(23))
    t = _f4(_i4(bits - _i4(exponent << _i4(23))).view(np.float32) - _f4(1.0))
    q = _L7 * t + _L6
    q = q * t + _L5
    q = q * t + _L4
    q = q * t + _L3
    q = q * t + _L2
    q = q * t + _L1
    q = q * t + _L0
    log_u = _f4(_i4(exponent - _i4(32))) * _LN2 + (q * t * t + t)
    square = log_u * _f4(-2.0)
    radius = np.sqrt(square if square > _f4(0.0) else _f4(0.0))
    # The upper two bits of ``moved`` are the nearest quarter turn: odd ones swap sine and cosine,
    # the upper bit is the sign of the sine, and that of ``moved`` and a quarter more the cosine's.
    moved = _u4(b + _u4(1 << 29))
    turns = (_f4(_i4(_u4(b - _u4(moved & _u4(3 << 30))))) + _f4(0.5)) * _INV_2_32
    s2 = turns * turns
    sine = (((_S3 * s2 + _S2) * s2 + _S1) * s2 + _S0) * turns
    cosine = ((_C3 * s2 + _C2) * s2 + _C1) * s2 + _C0
    odd = _u4(moved & _u4(1 << 30)) != _u4(0)
    s = _with_sign(cosine if odd else sine, moved)
    c = _with_sign(sine if odd else cosine, _u4(moved + _u4(1 << 30)))
    return radius * c, radius * s


@njit(inline="always")
def byte_sum(word):  # type: ignore[no-untyped-def]
    """One nearly normal value from one word."""
    total = (
        _i4(word & _u4(255))
        + _i4((word >> _u4(8)) & _u4(255))
        + _i4((word >> _u4(16)) & _u4(255))
        + _i4(word >> _u4(24))
    )
    return _f4(_i4(total - _SUM_MEAN)) * _SUM_SCALE


@njit(inline="always")
def signed(value, word, bit):  # type: ignore[no-untyped-def]
    """``value`` times the sign that a bit of a word stands for (1 -> -1)."""
    flip = _u4(_u4(word >> _u4(bit)) << _u4(31))
    return _u4(_f4(value).view(np.uint32) ^ flip).view(np.float32)


@njit(**OPTIONS)
def planes(y, x, kind):  # type: ignore[no-untyped-def]
    """Fill y[4 n, LANES] with the Gaussian or byte-sum noise of the words x[4 n, LANES]."""
    if kind == 0:
        for pair in range(0, x.shape[0], 2):
            a, b, c, d = x[pair], x[pair + 1], y[pair], y[pair + 1]
            for lane in range(LANES):
                c[lane], d[lane] = box_muller(a[lane], b[lane])
    else:
        for plane in range(x.shape[0]):
            a, c = x[plane], y[plane]
            for lane in range(LANES):
                c[lane] = byte_sum(a[lane])


@njit(**OPTIONS)
def signs(z, x):  # type: ignore[no-untyped-def]
    """Fill z[128 n] with the signs that the words x[4, n] hold, in the order of elements."""
    for block in range(z.shape[0] // 128):
        for plane in range(4):
            word = x[plane, block]
            part = z[128 * block + 32 * plane : 128 * block + 32 * plane + 32]
            for bit in range(32):
                part[bit] = signed(_f4(1.0), word, bit)


@njit(inline="always")
def _add_normals(c, d, a, b, scale, first):  # type: ignore[no-untyped-def]
    if first:
        for lane in range(LANES):
            z0, z1 = box_muller(a[lane], b[lane])
            c[lane] = _f4(0.0) + scale * z0
            d[lane] = _f4(0.0) + scale * z1
    else:
        for lane in range(LANES):
            z0, z1 = box_muller(a[lane], b[lane])
            c[lane] = c[lane] + scale * z0
            d[lane] = d[lane] + scale * z1


@njit(**OPTIONS)
def add_gaussian(total, x, scale, first):  # type: ignore[no-untyped-def]
    """``total[4 n, LANES] += scale * z`` (``= 0 + scale * z`` if first); z is never stored."""
    for row in range(0, x.shape[0], 2):
        _add_normals(total[row], total[row + 1], x[row], x[row + 1], scale, first)


@njit(**OPTIONS)
def add_byte_sums(total, x, scale, first):  # type: ignore[no-untyped-def]
    """``add_gaussian`` for byte sums."""
    for plane in range(x.shape[0]):
        a, c = x[plane], total[plane]
        if first:
            for lane in range(LANES):
                c[lane] = _f4(0.0) + scale * byte_sum(a[lane])
        else:
            for lane in range(LANES):
                c[lane] = c[lane] + scale * byte_sum(a[lane])


@njit(**OPTIONS)
def add_signs(total, x, scale, first):  # type: ignore[no-untyped-def]
    """``add_gaussian`` for signs: total[128 n], in the order of elements."""
    for block in range(total.shape[0] // 128):
        for plane in range(4):
            word = x[plane, block]
            part = total[128 * block + 32 * plane : 128 * block + 32 * plane + 32]
            if first:
                for bit in range(32):
                    part[bit] = _f4(0.0) + signed(scale, word, bit)
            else:
                for bit in range(32):
                    part[bit] = part[bit] + signed(scale, word, bit)
