"""Numba kernel that merges low-rank updates into weights, row by row, in a fixed order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from .noise_kernels import _load, _options, _round_bfloat16, _store


@njit(**_options)
def _merge(weight, bfloat16, left, rows):  # type: ignore[no-untyped-def]
    columns = weight.shape[1]
    w = np.empty(columns, np.float32)
    total = np.empty(columns, np.float32)
    for row in range(weight.shape[0]):
        tile = weight[row]
        _load(w, tile, bfloat16)
        for index in range(columns):
            total[index] = np.float32(0.0)
        for rank in range(rows.shape[0]):
            scale = left[row, rank]
            factor = rows[rank]
            for index in range(columns):
                total[index] = total[index] + scale * factor[index]
        if bfloat16:
            for index in range(columns):
                w[index] = _round_bfloat16(np.float32(w[index] + total[index]))
        else:
            for index in range(columns):
                w[index] = w[index] + total[index]
        _store(tile, w, bfloat16)


def merge(
    weight: npt.NDArray[np.generic],
    left: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
) -> None:
    """``weight = round(weight + left @ rows)``: float32 or bfloat16 bits [p, d], [p, k], [k, d]."""
    _merge(weight, weight.dtype == np.uint16, left, rows)
