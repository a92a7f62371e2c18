"""Torch arithmetic whose fp32 bits are the same on every device and in the host kernels.

Sums, products and quotients of tensors are single IEEE operations everywhere.  ``torch.sqrt`` is
not: on CPUs it may go through a vector library that misses the nearest number in a sixth of the
cases, so square roots go through here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def exact_sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded square root of an fp32 tensor, as a new tensor."""
    if x.device.type != "cpu":
        return x.sqrt()
    return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))


def fp32(x: float) -> float:
    """Round a Python number to fp32: torch then multiplies by the same number as the kernels."""
    return float(np.float32(x))
