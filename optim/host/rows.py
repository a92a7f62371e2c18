"""Views and padding that the block-wise kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .bits import KERNEL_OPTIONS, U32, bits_float


@njit(**KERNEL_OPTIONS)
def rows(values: Any, block: Any) -> Any:
    """View a flat array of whole blocks as (blocks, block).

    Rows instead of slices spare the inner loops the clamping of bounds.  An empty array (the
    absent half of a stochastically rounded master) has no rows, and none of them is read.
    """
    return values.reshape(values.shape[0] // block, block)


@njit(**KERNEL_OPTIONS)
def padded(part: Any, block: Any) -> Any:
    """Return a short run followed by zeros up to a whole block."""
    whole = np.zeros(block, part.dtype)
    whole[: part.shape[0]] = part
    return whole


@njit(**KERNEL_OPTIONS)
def scale_of(worst: Any) -> Any:
    """Return a block's scale from the largest bit pattern of a magnitude; NaN if not finite."""
    return bits_float(U32(worst) if worst < U32(0x7F800000) else U32(0x7FC00000))
