"""Base-2 logarithm and power in fp32 from exactly rounded operations only.

Library versions of these functions differ in the last bits between devices, and on one CPU
between the vector loop and its scalar remainder, so that results would depend on how a tensor is
cut.  These use additions, multiplications, divisions and bit moves alone: an element's result
depends on its value only, anywhere.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from .scales import power_of_two

_LN2: Final = math.log(2.0)


def log2(x: Tensor) -> Tensor:
    """Return log2 of non-negative fp32 values, within 2^-23 of max(1, |log2 x|).

    0 gives -inf, inf gives inf, NaN gives NaN.

    >>> log2(torch.tensor([0.25, 1.0, 8.0])).tolist()
    [-2.0, 0.0, 3.0]
    """
    mantissa, exponent = torch.frexp(x)
    # Centre the mantissa on one: [sqrt(1/2), sqrt(2)).
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    whole = (exponent - small.to(exponent.dtype)).to(torch.float32)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    # 2 atanh(s) / ln 2, |s| < 0.1716.
    series = torch.full_like(s, 1.0 / 9.0)
    for term in (1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0):
        series = series * square + term
    result = whole + s * series * (2.0 / _LN2)
    result = torch.where(x == 0, torch.full_like(x, -math.inf), result)
    return torch.where(torch.isinf(x), x, result)


def exp2(x: Tensor) -> Tensor:
    """Return 2^x of fp32 values, relative error below 2^-22 (plus that of a subnormal result).

    -inf gives 0, NaN gives NaN.

    >>> exp2(torch.tensor([-2.0, 0.0, 3.0])).tolist()
    [0.25, 1.0, 8.0]
    """
    x = x.clamp(-160.0, 160.0)
    whole = torch.round(x)
    y = (x - whole) * _LN2
    series = torch.full_like(y, 1.0 / 5040.0)
    for divisor in (720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0):
        series = series * y + 1.0 / divisor
    exponent = torch.nan_to_num(whole, nan=0.0).to(torch.int32)
    half = exponent >> 1
    return series * power_of_two(half) * power_of_two(exponent - half)
