"""Shape and dtype of a tensor that does not exist yet, so that sizes are known in advance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch


@final
@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor that does not exist yet.

    >>> TensorSpec((3, 5), torch.bfloat16).nbytes
    30
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return self.numel * self.dtype.itemsize
