"""Per-block scales: largest magnitudes, safe division, the rule for not-a-number.

One rule for all formats: a block whose largest magnitude is not finite gets the scale NaN, so
that all of it decodes to NaN.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: Types a scale may be stored in, by name.
SCALE_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

#: Smallest subnormal of each of those types.
SMALLEST_SUBNORMAL: Final = {
    "float32": 2.0**-149,
    "bfloat16": 2.0**-133,
    "float16": 2.0**-24,
}


def check_scale_dtype(name: str) -> None:
    """Refuse the name of a type that scales cannot be stored in."""
    if name not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype {name!r} is not known; choose one of {list(SCALE_DTYPES)}")


def block_amax(blocks: Tensor) -> Tensor:
    """Return the largest magnitude of each row of fp32 (blocks, width); NaN if not finite."""
    amax = blocks.abs().amax(dim=1) if blocks.shape[1] else blocks.new_zeros(blocks.shape[0])
    return poison(amax)


def poison(scale: Tensor) -> Tensor:
    """Replace infinities by NaN."""
    return torch.where(torch.isfinite(scale), scale, torch.full_like(scale, float("nan")))


def quotient(x: Tensor, number: float) -> Tensor:
    """Divide a tensor by a number, correctly rounded on every device.

    Accelerators multiply by the rounded reciprocal of a Python number, which misses the quotient
    by one unit now and then: scales, and with them codes, would depend on the device.

    >>> quotient(torch.tensor([7.0]), 7.0)
    tensor([1.])
    """
    return x / x.new_full((), number)


def divide(blocks: Tensor, scale: Tensor) -> Tensor:
    """Divide (blocks, width) by (blocks,), giving zeros where the scale is zero."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where((scale == 0)[:, None], torch.zeros_like(blocks), blocks / safe[:, None])


def to_codes(values: Tensor) -> Tensor:
    """Cast whole-number fp32 values to int32 codes; NaN becomes 0 (its block is NaN anyway)."""
    return torch.nan_to_num(values, nan=0.0).to(torch.int32)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2 ** exponent as exact fp32 for int32 exponents in -149 .. 127."""
    normal = (exponent.clamp(min=-126) + 127) << 23
    subnormal = torch.ones_like(exponent) << (exponent + 149).clamp(0, 22)
    return torch.where(exponent >= -126, normal, subnormal).view(torch.float32)
