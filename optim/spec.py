"""Names and sizes of optimizer states before they exist.

``TensorSpec`` has the fields that the streaming engine asks for (shape, dtype, nbytes), so that
states of any optimizer can be sized, placed and saved without being allocated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..quant.spec import TensorSpec

Shape = tuple[int, ...]
StateSpec = dict[str, TensorSpec]

__all__ = ["Shape", "StateSpec", "TensorSpec", "allocate", "spec_bytes"]


def allocate(spec: Mapping[str, TensorSpec], device: torch.device | str) -> dict[str, Tensor]:
    """Return zeroed tensors of the given specs.

    >>> allocate({"exp_avg": TensorSpec((2, 3), torch.float32)}, "cpu")["exp_avg"].shape
    torch.Size([2, 3])
    """
    return {
        name: torch.zeros(one.shape, dtype=one.dtype, device=device) for name, one in spec.items()
    }


def spec_bytes(spec: Mapping[str, TensorSpec]) -> int:
    """Return the bytes of all tensors of a spec, without padding."""
    return sum(one.nbytes for one in spec.values())
