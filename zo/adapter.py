"""The low-rank fine-tune of a weight that is never written: closed windows, kept side by side.

An encoded weight cannot take a merge: its codes are coarser than any step.  What closed windows of
factored directions would have merged, ``L R^T`` each, is kept in fp32 and added to activations, so
that nothing is ever rounded away and nothing is written.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from .factored import merge


@final
class Adapter:
    """``sum_w L_w R_w^T`` of one matrix [p, d], as two factors.

    Host memory: fp32 ``(p + d) * k`` numbers a window of rank k, and every forward does that much
    more work: give encoded weights long windows (``steps=`` the whole run keeps one).
    """

    def __init__(self) -> None:
        self._left: Tensor | None = None
        self._right: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """L: fp32 [p, K] and R: fp32 [d, K]; None before the first window has closed."""
        if self._left is None or self._right is None:
            return None
        return self._left, self._right

    def add(self, left: Tensor, right: Tensor) -> None:
        """Take the factors of a window that has closed."""
        if self._left is not None and self._right is not None:
            left = torch.cat([self._left, left], dim=1)
            right = torch.cat([self._right, right], dim=1)
        self._left, self._right = left.contiguous(), right.contiguous()

    def merge_into(self, weight: Tensor) -> None:
        """Write ``weight + L R^T`` to a decoded copy of the weight; one rounding."""
        if self._left is not None and self._right is not None:
            merge(weight, self._left, self._right)
