"""Numba kernels that fill arrays with noise, any range of a tensor's elements at a time.

Serial, GIL-free loops for the caller's own threads; every stage is a loop over small arrays that
stay in the first-level cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from .philox_kernels import KIND_CODES, LANES, OPTIONS, planes, signs, split_seed, words

__all__ = ["KIND_CODES", "fill", "fill_directions", "group_elements", "group_noise", "split_seed"]

_u4, _f4, _u8, _i8 = np.uint32, np.float32, np.uint64, np.int64


@njit(**OPTIONS)
def group_elements(kind):  # type: ignore[no-untyped-def]
    """Elements that are made at a time."""
    return 128 * LANES if kind == 2 else 4 * LANES


@njit(**OPTIONS)
def group_noise(z, x, y, kind, group, k0, k1, stream, direction):  # type: ignore[no-untyped-def]
    """Fill z with a whole group, elements in order; x and y, both [4, LANES], are scratch."""
    words(x, _u8(LANES) * group, k0, k1, stream, direction)
    if kind == 2:
        signs(z, x)
        return
    planes(y, x, kind)
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    for lane in range(LANES):
        z[4 * lane] = y0[lane]
        z[4 * lane + 1] = y1[lane]
        z[4 * lane + 2] = y2[lane]
        z[4 * lane + 3] = y3[lane]


@njit(**OPTIONS)
def _fill(out, kind, start, k0, k1, stream, direction):  # type: ignore[no-untyped-def]
    size = group_elements(kind)
    z = np.empty(size, np.float32)
    x = np.empty((4, LANES), np.uint32)
    y = np.empty((4, LANES), np.float32)
    count = out.shape[0]
    for group in range(start // size, (start + count + size - 1) // size):
        offset = group * size - start
        if offset >= 0 and offset + size <= count:
            whole = out[offset : offset + size]
            group_noise(whole, x, y, kind, _u8(group), k0, k1, stream, direction)
            continue
        group_noise(z, x, y, kind, _u8(group), k0, k1, stream, direction)
        low, high = max(0, -offset), min(size, count - offset)
        out[offset + low : offset + high] = z[low:high]


@njit(**OPTIONS)
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
    if out.size:
        k0, k1 = split_seed(seed)
        _fill(out, _i8(kind), _i8(start), k0, k1, _u4(stream), _u4(direction))
