"""Numba kernels that perturb weights and apply updates, element range by range.

Serial, GIL-free loops for the caller's own threads.  Weights come as float32 arrays, or as uint16
arrays that hold bfloat16 bits.  A group of weights is brought into the order in which noise is made
once, and stays in the first-level cache while all steps of a call are applied to it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from .. import philox
from .noise_kernels import group_elements, group_noise
from .philox_kernels import (
    LANES,
    OPTIONS,
    add_byte_sums,
    add_gaussian,
    add_signs,
    split_seed,
    words,
)

_u4, _f4, _u8, _i8 = np.uint32, np.float32, np.uint64, np.int64


@njit(inline="always")
def round_bfloat16(value):  # type: ignore[no-untyped-def]
    """Nearest bfloat16, ties to even, as float32; NaN stays NaN."""
    bits = _f4(value).view(np.uint32)
    rounded = _u4(_u4(bits + _u4(0x7FFF)) + _u4(_u4(bits >> _u4(16)) & _u4(1)))
    rounded = _u4(rounded & _u4(0xFFFF0000))
    return value if value != value else rounded.view(np.float32)


@njit(inline="always")
def _round_quiet(value):  # type: ignore[no-untyped-def]
    """``round_bfloat16`` of what arithmetic on a bfloat16 gives: its NaN survive without a test.

    Such a NaN is quiet and its lower 16 bits are zero, so that rounding carries nothing upwards.
    """
    bits = _f4(value).view(np.uint32)
    rounded = _u4(_u4(bits + _u4(0x7FFF)) + _u4(_u4(bits >> _u4(16)) & _u4(1)))
    return _u4(rounded & _u4(0xFFFF0000)).view(np.float32)


@njit(inline="always")
def _round_bfloat16_up(value, random):  # type: ignore[no-untyped-def]
    """Add 16 random bits below the last kept one and truncate; inf and NaN stay."""
    bits = _f4(value).view(np.uint32)
    rounded = _u4(_u4(bits + _u4(random)) & _u4(0xFFFF0000))
    finite = _u4(bits & _u4(0x7F800000)) != _u4(0x7F800000)
    return rounded.view(np.float32) if finite else value


@njit(**OPTIONS)
def load(w, weight, bfloat16):  # type: ignore[no-untyped-def]
    """Copy weight (float32, or bfloat16 bits in uint16) to the front of the float32 array w."""
    if bfloat16:
        bits = w.view(np.uint32)
        for index in range(weight.shape[0]):
            bits[index] = _u4(_u4(weight[index]) << _u4(16))
    else:
        for index in range(weight.shape[0]):
            w[index] = weight[index]


@njit(**OPTIONS)
def store(weight, w, bfloat16):  # type: ignore[no-untyped-def]
    """The reverse of ``load``; w already holds values that bfloat16 represents."""
    if bfloat16:
        bits = w.view(np.uint32)
        for index in range(weight.shape[0]):
            weight[index] = _u4(bits[index] >> _u4(16))
    else:
        for index in range(weight.shape[0]):
            weight[index] = w[index]


@njit(**OPTIONS)
def _halves(h, first_block, k0, k1, stream, x):  # type: ignore[no-untyped-def]
    """Fill h with the 16-bit halves of consecutive elements, 8 a counter block; x is scratch."""
    for part in range((h.shape[0] + 8 * LANES - 1) // (8 * LANES)):
        # A group of 4 a block is half of what the generator makes at a time.
        first = (first_block // _u8(LANES)) * _u8(LANES) + _u8(part * LANES)
        skip = _i8(first_block % _u8(LANES))
        words(x[:4], first, k0, k1, stream, _u4(0))
        for lane in range(skip, min(LANES, skip + h.shape[0] // 8)):
            at = 8 * (part * LANES + lane - skip)
            for plane in range(4):
                h[at + 2 * plane] = x[plane, lane] & _u4(0xFFFF)
                h[at + 2 * plane + 1] = x[plane, lane] >> _u4(16)


@njit(**OPTIONS)
def _to_planes(w, natural):  # type: ignore[no-untyped-def]
    for plane in range(w.shape[0]):
        row, part = w[plane], natural[4 * LANES * (plane // 4) + plane % 4 :]
        for lane in range(LANES):
            row[lane] = part[4 * lane]


@njit(**OPTIONS)
def _from_planes(natural, w):  # type: ignore[no-untyped-def]
    for plane in range(w.shape[0]):
        row, part = w[plane], natural[4 * LANES * (plane // 4) + plane % 4 :]
        for lane in range(LANES):
            part[4 * lane] = row[lane]


@njit(**OPTIONS)
def _perturb(out, weight, bfloat16, scale, kind, start, k0, k1, stream, direction):  # type: ignore[no-untyped-def]
    size = group_elements(kind)
    z = np.empty(size, np.float32)
    w = np.empty(size, np.float32)
    x = np.empty((4, LANES), np.uint32)
    y = np.empty((4, LANES), np.float32)
    count = weight.shape[0]
    for group in range(start // size, (start + count + size - 1) // size):
        group_noise(z, x, y, kind, _u8(group), k0, k1, stream, direction)
        offset = group * size - start
        low, high = max(0, -offset), min(size, count - offset)
        part, noise = w[: high - low], z[low:high]
        load(part, weight[offset + low : offset + high], bfloat16)
        if bfloat16:
            for index in range(high - low):
                part[index] = round_bfloat16(_f4(part[index] + _f4(scale * noise[index])))
        else:
            for index in range(high - low):
                part[index] = part[index] + scale * noise[index]
        store(out[offset + low : offset + high], part, bfloat16)


@njit(**OPTIONS)
def _take(w, total, decay, bfloat16):  # type: ignore[no-untyped-def]
    """``w = round(w * decay - total)``, all finite but perhaps w."""
    if bfloat16 and decay == _f4(1.0):
        for index in range(w.shape[0]):
            w[index] = _round_quiet(_f4(w[index] - total[index]))
    elif bfloat16:
        for index in range(w.shape[0]):
            w[index] = _round_quiet(_f4(w[index] * decay - total[index]))
    else:
        for index in range(w.shape[0]):
            w[index] = w[index] * decay - total[index]


@njit(**OPTIONS)
def _update(
    weight, bfloat16, stochastic, kind, start, k0, k1, stream, rounding, directions, scales, decays
):  # type: ignore[no-untyped-def]
    count = weight.shape[0]
    # Small tensors would make more noise than they need.
    together = 4 if kind != 2 and count >= 16 * group_elements(kind) else 1
    size = together * group_elements(kind)
    x = np.empty((4 * together, LANES), np.uint32)
    h = np.empty(size, np.uint32)
    natural = np.zeros(size, np.float32)
    total = np.empty(size, np.float32)
    w = np.empty(size, np.float32)
    rows = size // LANES if kind != 2 else 4
    w_planes = w.reshape((rows, size // rows))
    total_planes = total.reshape((rows, size // rows))
    h_planes = np.empty(size, np.uint32).reshape((rows, size // rows))
    steps, probes = scales.shape
    for group in range(start // size, (start + count + size - 1) // size):
        offset = group * size - start
        low, high = max(0, -offset), min(size, count - offset)
        tile = weight[offset + low : offset + high]
        load(natural[low:high], tile, bfloat16)
        if kind == 2:
            w[:] = natural
        else:
            _to_planes(w_planes, natural)
        for step in range(steps):
            for probe in range(probes):
                at = _u8(together * LANES) * _u8(group)
                words(x, at, k0[step], k1[step], stream, directions[probe])
                if kind == 0:
                    add_gaussian(total_planes, x, scales[step, probe], probe == 0)
                elif kind == 2:
                    add_signs(total, x, scales[step, probe], probe == 0)
                else:
                    add_byte_sums(total_planes, x, scales[step, probe], probe == 0)
            if bfloat16 and stochastic:
                at = _u8(size // 8) * _u8(group)
                _halves(h, at, k0[step], k1[step], rounding, x)
                if kind != 2:
                    _to_planes(h_planes, h)
                    h[:] = h_planes.reshape(size)
                for index in range(size):
                    value = _f4(w[index] * decays[step] - total[index])
                    w[index] = _round_bfloat16_up(value, h[index])
            else:
                _take(w, total, decays[step], bfloat16)
        if kind == 2:
            natural[:] = w
        else:
            _from_planes(natural, w_planes)
        store(tile, natural[low:high], bfloat16)


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
