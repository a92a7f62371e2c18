"""What may be asked of a tensor that stands in for bytes kept elsewhere, without fetching them.

Gradient handles, lazy logits and entries of a streamed state dict are wrapper subclasses: torch
answers these questions from what the wrapper was made with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

#: Functions as ``__torch_function__`` receives them.
METADATA: Final[frozenset[Callable[..., Any]]] = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,  # type: ignore[attr-defined]
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor.is_floating_point,
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.element_size,
    }
)
