"""Is every element of a gradient finite?  One read, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.extending import overload

from .bits import I32, KERNEL_OPTIONS, U32, float_bits


def exponent_excess(values: Any, i: Any) -> Any:
    """Return a non-negative number for infinities and NaN, else a negative one (compiled only)."""
    raise TypeError("exponent_excess() exists in compiled kernels only")


@overload(exponent_excess, strict=False)
def _exponent_excess(values: Any, i: Any) -> Callable[..., Any] | None:
    if values.dtype == types.int16:
        return lambda values, i: I32(I32(values[i]) & I32(0x7FFF)) - I32(0x7F80)
    if values.dtype == types.uint16:
        return lambda values, i: I32(I32(values[i]) & I32(0x7FFF)) - I32(0x7C00)
    if values.dtype == types.float32:
        return lambda values, i: I32(float_bits(values[i]) & U32(0x7FFFFFFF)) - I32(0x7F800000)
    return None


@njit(**KERNEL_OPTIONS)
def all_finite(values: Any) -> Any:
    """Return whether a tagged flat array holds neither infinities nor NaN."""
    worst = I32(-1)
    for i in range(values.shape[0]):
        worst = max(worst, I32(exponent_excess(values, i)))
    return worst < I32(0)
