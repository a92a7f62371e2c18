"""Correctly rounded square roots.

``torch.sqrt`` on CPUs may go through a vector library that misses the nearest fp32 number for one
value in six, so formats and optimizers whose bits must agree with compiled kernels and with other
devices take square roots here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def exact_sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded square root of an fp32 tensor, as a new tensor.

    >>> exact_sqrt(torch.tensor([4.0, 2.0])).tolist()
    [2.0, 1.4142135381698608]
    """
    if x.device.type != "cpu":
        return x.sqrt()
    return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))
