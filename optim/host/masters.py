"""Reading and writing master weights in compiled kernels, one source for every format.

``weight`` is a tagged array; ``extra`` tells the format by its type: fp32 beside a 16-bit weight
is the full master, int16 the remainder of a split one, uint8 (empty) means stochastic rounding;
an fp32 weight is its own master and ignores ``extra``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .bits import (
    I16,
    I32,
    U16,
    U32,
    bf16_stochastic,
    bf16_untied,
    bits_float,
    float_bits,
    load,
    settle,
    untie,
)


def no_extra() -> np.ndarray:
    """Return the empty array that stands for stochastic rounding."""
    return np.empty(0, dtype=np.uint8)


def read_master(weight: Any, extra: Any, i: Any) -> Any:
    """Return the fp32 master of element ``i`` (compiled code only)."""
    raise TypeError("read_master() exists in compiled kernels only")


def write_master(
    weight: Any, extra: Any, i: Any, value: Any, index: Any, low_key: Any, high_word: Any
) -> None:
    """Set master and weight of element ``i``; ``index`` is its counter (compiled code only)."""
    raise TypeError("write_master() exists in compiled kernels only")


@overload(read_master, strict=False)
def _read(weight: Any, extra: Any, i: Any) -> Callable[..., Any] | None:
    if weight.dtype == types.float32:
        return lambda weight, extra, i: weight[i]
    if extra.dtype == types.float32:
        return lambda weight, extra, i: extra[i]
    if extra.dtype == types.int16:
        return lambda weight, extra, i: bits_float(
            U32(U32(U32(U16(weight[i])) << U32(16)) + U32(I32(extra[i])))
        )
    return lambda weight, extra, i: load(weight, i)


@overload(write_master, strict=False)
def _write(
    weight: Any, extra: Any, i: Any, value: Any, index: Any, low_key: Any, high_word: Any
) -> Callable[..., Any] | None:
    if weight.dtype == types.float32:

        def own(
            weight: Any, extra: Any, i: Any, value: Any, index: Any, low_key: Any, high_word: Any
        ) -> None:
            weight[i] = value

        return own
    if extra.dtype == types.float32:

        def full(
            weight: Any, extra: Any, i: Any, value: Any, index: Any, low_key: Any, high_word: Any
        ) -> None:
            extra[i] = settle(weight, i, value)

        return full
    if extra.dtype == types.int16:

        def split(
            weight: Any, extra: Any, i: Any, value: Any, index: Any, low_key: Any, high_word: Any
        ) -> None:
            bits = untie(float_bits(value))
            high = bf16_untied(bits)
            weight[i] = I16(high)
            low = U32(bits - U32(high << U32(16)))
            # A NaN's remainder is zero: adding its low bits back could carry it out of the NaNs.
            extra[i] = I16(low) if value == value else I16(0)

        return split

    def stochastic(
        weight: Any, extra: Any, i: Any, value: Any, index: Any, low_key: Any, high_word: Any
    ) -> None:
        weight[i] = I16(bf16_stochastic(float_bits(value), index, low_key, high_word))

    return stochastic
