"""Numba kernels that make noise, perturb weights and apply updates, element range by range.

Serial, GIL-free loops for the caller's own threads.  No fast-math and no fused multiply-add, so
bits are those of ``zo.philox`` on every CPU.  Elements are made in groups of 256 (64 counter blocks
in structure-of-arrays form, which is what lets LLVM use the vector units); every stage is a loop
over small arrays that stay in the first-level cache.

Weights come as float32 arrays, or as uint16 arrays that hold bfloat16 bits.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from numba import njit

from .. import philox

KIND_CODES = MappingProxyType({"gaussian": 0, "irwin_hall": 1, "rademacher": 2})

_GROUP = 256
_BLOCKS = 64
_u4, _i4, _f4, _u8, _i8 = np.uint32, np.int32, np.float32, np.uint64, np.int64

_M0, _M1 = _u8(philox.MULTIPLIER_0), _u8(philox.MULTIPLIER_1)
_W0, _W1 = _u4(philox.WEYL_0), _u4(philox.WEYL_1)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (_f4(value) for value in philox.LOG_COEFFICIENTS)
_S0, _S1, _S2, _S3 = (_f4(value) for value in philox.SIN_COEFFICIENTS)
_C0, _C1, _C2, _C3 = (_f4(value) for value in philox.COS_COEFFICIENTS)
_LN2, _INV_2_32 = _f4(philox.LN2), _f4(philox.INV_2_32)
_SQRT_HALF = _i4(philox.SQRT_HALF_BITS)
_SUM_MEAN, _SUM_SCALE = _i4(philox.BYTE_SUM_MEAN), _f4(philox.BYTE_SUM_SCALE)

_options = {"nogil": True, "error_model": "numpy", "cache": True}


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    for _ in range(10):
        p0 = _u8(c0) * _M0
        p1 = _u8(c2) * _M1
        h0 = _u4(p0 >> _u8(32))
        h1 = _u4(p1 >> _u8(32))
        l0 = _u4(p0)
        l1 = _u4(p1)
        c0 = _u4(_u4(h1 ^ c1) ^ k0)
        c1 = l1
        c2 = _u4(_u4(h0 ^ c3) ^ k1)
        c3 = l0
        k0 = _u4(k0 + _W0)
        k1 = _u4(k1 + _W1)
    return c0, c1, c2, c3


@njit(inline="always")
def _box_muller(a, b):  # type: ignore[no-untyped-def]
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
    quarter = _u4(_u4(b + _u4(1 << 29)) >> _u4(30))
    turns = (_f4(_i4(_u4(b - _u4(quarter << _u4(30))))) + _f4(0.5)) * _INV_2_32
    s2 = turns * turns
    sine = (((_S3 * s2 + _S2) * s2 + _S1) * s2 + _S0) * turns
    cosine = ((_C3 * s2 + _C2) * s2 + _C1) * s2 + _C0
    odd = (quarter & _u4(1)) != _u4(0)
    s = cosine if odd else sine
    c = sine if odd else cosine
    s = -s if (quarter & _u4(2)) != _u4(0) else s
    c = -c if (_u4(quarter + _u4(1)) & _u4(2)) != _u4(0) else c
    return radius * c, radius * s


@njit(inline="always")
def _byte_sum(word):  # type: ignore[no-untyped-def]
    total = (
        _i4(word & _u4(255))
        + _i4((word >> _u4(8)) & _u4(255))
        + _i4((word >> _u4(16)) & _u4(255))
        + _i4(word >> _u4(24))
    )
    return _f4(_i4(total - _SUM_MEAN)) * _SUM_SCALE


@njit(inline="always")
def _signs(lanes, word):  # type: ignore[no-untyped-def]
    for bit in range(32):
        lanes[bit] = _f4(_i4(1) - _i4(_i4(_u4(word >> _u4(bit)) & _u4(1)) << _i4(1)))


@njit(**_options)
def _words(x, first_block, k0, k1, stream, direction):  # type: ignore[no-untyped-def]
    """Fill x[4, 64] with the words of 64 blocks; first_block is a multiple of 64."""
    low, high = _u4(first_block), _u4(first_block >> _u8(32))
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for lane in range(_BLOCKS):
        a, b, c, d = _philox(_u4(low + _u4(lane)), high, stream, direction, k0, k1)
        x0[lane], x1[lane], x2[lane], x3[lane] = a, b, c, d


@njit(**_options)
def _group(z, x, y, kind, group, k0, k1, stream, direction):  # type: ignore[no-untyped-def]
    """Fill z[256] with the noise of elements 256 * group and on; x, y are scratch [4, 64]."""
    if kind == 2:
        for half in range(2):
            block = _u8(2) * group + _u8(half)
            a, b, c, d = _philox(_u4(block), _u4(block >> _u8(32)), stream, direction, k0, k1)
            _signs(z[half * 128 : half * 128 + 32], a)
            _signs(z[half * 128 + 32 : half * 128 + 64], b)
            _signs(z[half * 128 + 64 : half * 128 + 96], c)
            _signs(z[half * 128 + 96 : half * 128 + 128], d)
        return
    _words(x, _u8(_BLOCKS) * group, k0, k1, stream, direction)
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    if kind == 0:
        for lane in range(_BLOCKS):
            y0[lane], y1[lane] = _box_muller(x0[lane], x1[lane])
            y2[lane], y3[lane] = _box_muller(x2[lane], x3[lane])
    else:
        for lane in range(_BLOCKS):
            y0[lane], y1[lane] = _byte_sum(x0[lane]), _byte_sum(x1[lane])
            y2[lane], y3[lane] = _byte_sum(x2[lane]), _byte_sum(x3[lane])
    for lane in range(_BLOCKS):
        z[4 * lane] = y0[lane]
        z[4 * lane + 1] = y1[lane]
        z[4 * lane + 2] = y2[lane]
        z[4 * lane + 3] = y3[lane]


@njit(**_options)
def _fill(out, kind, start, k0, k1, stream, direction):  # type: ignore[no-untyped-def]
    z = np.empty(_GROUP, np.float32)
    x = np.empty((4, _BLOCKS), np.uint32)
    y = np.empty((4, _BLOCKS), np.float32)
    count = out.shape[0]
    first = start // _GROUP
    last = (start + count + _GROUP - 1) // _GROUP
    for group in range(first, last):
        offset = group * _GROUP - start
        if offset >= 0 and offset + _GROUP <= count:
            whole = out[offset : offset + _GROUP]
            _group(whole, x, y, kind, _u8(group), k0, k1, stream, direction)
            continue
        _group(z, x, y, kind, _u8(group), k0, k1, stream, direction)
        low, high = max(0, -offset), min(_GROUP, count - offset)
        out[offset + low : offset + high] = z[low:high]


@njit(**_options)
def _fill_directions(out, kind, k0, k1, stream):  # type: ignore[no-untyped-def]
    for direction in range(out.shape[0]):
        _fill(out[direction], kind, 0, k0, k1, stream, _u4(direction))


def fill_directions(out: npt.NDArray[np.float32], kind: int, seed: int, stream: int) -> None:
    """Write directions 0, 1, ... of a noise tensor to the rows of a contiguous fp32 array."""
    if out.size:
        k0, k1 = split_seed(seed)
        _fill_directions(out, _i8(kind), k0, k1, _u4(stream))


def fill(
    out: npt.NDArray[np.float32], kind: int, start: int, seed: int, stream: int, direction: int
) -> None:
    """Write elements ``start ..`` of a noise tensor to a contiguous fp32 array."""
    if out.shape[0]:
        k0, k1 = split_seed(seed)
        _fill(out, _i8(kind), _i8(start), k0, k1, _u4(stream), _u4(direction))


def split_seed(seed: int) -> tuple[np.uint32, np.uint32]:
    """The two key words of a 64-bit seed, low word first."""
    return _u4(seed & philox.MASK), _u4(seed >> 32)


@njit(inline="always")
def _round_bfloat16(value):  # type: ignore[no-untyped-def]
    """Nearest bfloat16, ties to even, as float32; NaN stays NaN."""
    bits = _f4(value).view(np.uint32)
    rounded = _u4(_u4(bits + _u4(0x7FFF)) + _u4(_u4(bits >> _u4(16)) & _u4(1)))
    rounded = _u4(rounded & _u4(0xFFFF0000))
    return value if value != value else rounded.view(np.float32)


@njit(inline="always")
def _round_bfloat16_up(value, random):  # type: ignore[no-untyped-def]
    """Add 16 random bits below the last kept one and truncate; inf and NaN stay."""
    bits = _f4(value).view(np.uint32)
    rounded = _u4(_u4(bits + _u4(random)) & _u4(0xFFFF0000))
    finite = _u4(bits & _u4(0x7F800000)) != _u4(0x7F800000)
    return rounded.view(np.float32) if finite else value


@njit(**_options)
def _halves(h, group, k0, k1, stream):  # type: ignore[no-untyped-def]
    """Fill h[256] with the 16-bit halves of elements 256 * group and on (8 a counter block)."""
    for lane in range(32):
        block = _u8(32) * group + _u8(lane)
        a, b, c, d = _philox(_u4(block), _u4(block >> _u8(32)), stream, _u4(0), k0, k1)
        part = h[8 * lane : 8 * lane + 8]
        part[0], part[1] = a & _u4(0xFFFF), a >> _u4(16)
        part[2], part[3] = b & _u4(0xFFFF), b >> _u4(16)
        part[4], part[5] = c & _u4(0xFFFF), c >> _u4(16)
        part[6], part[7] = d & _u4(0xFFFF), d >> _u4(16)


@njit(**_options)
def _load(w, weight, bfloat16):  # type: ignore[no-untyped-def]
    """Copy weight (float32, or bfloat16 bits in uint16) to the front of the float32 array w."""
    if bfloat16:
        bits = w.view(np.uint32)
        for index in range(weight.shape[0]):
            bits[index] = _u4(_u4(weight[index]) << _u4(16))
    else:
        for index in range(weight.shape[0]):
            w[index] = weight[index]


@njit(**_options)
def _store(weight, w, bfloat16):  # type: ignore[no-untyped-def]
    """The reverse of ``_load``; w already holds values that bfloat16 represents."""
    if bfloat16:
        bits = w.view(np.uint32)
        for index in range(weight.shape[0]):
            weight[index] = _u4(bits[index] >> _u4(16))
    else:
        for index in range(weight.shape[0]):
            weight[index] = w[index]


@njit(**_options)
def _perturb(out, weight, bfloat16, scale, kind, start, k0, k1, stream, direction):  # type: ignore[no-untyped-def]
    z = np.empty(_GROUP, np.float32)
    w = np.empty(_GROUP, np.float32)
    x = np.empty((4, _BLOCKS), np.uint32)
    y = np.empty((4, _BLOCKS), np.float32)
    count = weight.shape[0]
    for group in range(start // _GROUP, (start + count + _GROUP - 1) // _GROUP):
        _group(z, x, y, kind, _u8(group), k0, k1, stream, direction)
        offset = group * _GROUP - start
        low, high = max(0, -offset), min(_GROUP, count - offset)
        part, noise = w[: high - low], z[low:high]
        _load(part, weight[offset + low : offset + high], bfloat16)
        if bfloat16:
            for index in range(high - low):
                part[index] = _round_bfloat16(_f4(part[index] + _f4(scale * noise[index])))
        else:
            for index in range(high - low):
                part[index] = part[index] + scale * noise[index]
        _store(out[offset + low : offset + high], part, bfloat16)


@njit(**_options)
def _update(
    weight, bfloat16, stochastic, kind, start, k0, k1, stream, rounding, directions, scales, decays
):  # type: ignore[no-untyped-def]
    z = np.empty(_GROUP, np.float32)
    w = np.empty(_GROUP, np.float32)
    total = np.empty(_GROUP, np.float32)
    h = np.empty(_GROUP, np.uint32)
    x = np.empty((4, _BLOCKS), np.uint32)
    y = np.empty((4, _BLOCKS), np.float32)
    count = weight.shape[0]
    steps, probes = scales.shape
    for group in range(start // _GROUP, (start + count + _GROUP - 1) // _GROUP):
        offset = group * _GROUP - start
        low, high = max(0, -offset), min(_GROUP, count - offset)
        size = high - low
        tile = weight[offset + low : offset + high]
        part, sums, random = w[:size], total[low:high], h[low:high]
        _load(part, tile, bfloat16)
        for step in range(steps):
            for index in range(_GROUP):
                total[index] = _f4(0.0)
            for probe in range(probes):
                _group(z, x, y, kind, _u8(group), k0[step], k1[step], stream, directions[probe])
                scale = scales[step, probe]
                for index in range(_GROUP):
                    total[index] = total[index] + scale * z[index]
            decay = decays[step]
            for index in range(size):
                part[index] = part[index] * decay - sums[index]
            if bfloat16 and stochastic:
                _halves(h, _u8(group), k0[step], k1[step], rounding)
                for index in range(size):
                    part[index] = _round_bfloat16_up(part[index], random[index])
            elif bfloat16:
                for index in range(size):
                    part[index] = _round_bfloat16(part[index])
        _store(tile, part, bfloat16)


def perturb(
    out: npt.NDArray[np.generic],
    weight: npt.NDArray[np.generic],
    *,
    scale: float,
    kind: int,
    start: int,
    seed: int,
    stream: int,
    direction: int,
) -> None:
    """``out = round(weight + scale * z)``, both float32 or both bfloat16 bits in uint16."""
    k0, k1 = split_seed(seed)
    _perturb(
        out, weight, weight.dtype == np.uint16, _f4(scale), _i8(kind), _i8(start),
        k0, k1, _u4(stream), _u4(direction),
    )  # fmt: skip


def update(
    weight: npt.NDArray[np.generic],
    *,
    stochastic: bool,
    kind: int,
    start: int,
    seeds: npt.NDArray[np.uint64],
    stream: int,
    rounding_stream: int,
    directions: npt.NDArray[np.uint32],
    scales: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
) -> None:
    """Apply steps in order: ``weight = round(weight * decay - sum_d scale_d z_d)``, in place.

    ``scales`` is [steps, directions]; all arithmetic is fp32 and each step rounds once.
    """
    _update(
        weight, weight.dtype == np.uint16, stochastic, _i8(kind), _i8(start),
        (seeds & _u8(philox.MASK)).astype(np.uint32), (seeds >> _u8(32)).astype(np.uint32),
        _u4(stream), _u4(rounding_stream), directions, scales, decays,
    )  # fmt: skip
