"""Scalars and roots with the same fp32 bits in torch operations and in the host kernels."""

from __future__ import annotations

import numpy as np

from ..quant.exact import exact_sqrt

__all__ = ["exact_sqrt", "fp32"]


def fp32(x: float) -> float:
    """Round a Python number to fp32: torch then multiplies by the same number as the kernels."""
    return float(np.float32(x))
