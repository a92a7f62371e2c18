"""Numba kernel that merges low-rank updates into weights, row by row, in a fixed order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from .philox_kernels import OPTIONS
from .weight_kernels import load, round_bfloat16, store


@njit(**OPTIONS)
def _merge(weight, bfloat16, left, rows):  # type: ignore[no-untyped-def]
    columns = weight.shape[1]
    w = np.empty(columns, np.float32)
    total = np.empty(columns, np.float32)
    for row in range(weight.shape[0]):
        tile = weight[row]
        load(w, tile, bfloat16)
        for index in range(columns):
            total[index] = np.float32(0.0)
        for rank in range(rows.shape[0]):
            scale = left[row, rank]
            factor = rows[rank]
            for index in range(columns):
                total[index] = total[index] + scale * factor[index]
        if bfloat16:
            for index in range(columns):
                w[index] = round_bfloat16(np.float32(w[index] + total[index]))
        else:
            for index in range(columns):
                w[index] = w[index] + total[index]
        store(tile, w, bfloat16)


def merge(
    weight: npt.NDArray[np.generic],
    left: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
) -> None:
    """``weight = round(weight + left @ rows)``: float32 or bfloat16 bits [p, d], [p, k], [k, d]."""
    _merge(weight, weight.dtype == np.uint16, left, rows)
