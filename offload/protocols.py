"""What the engine asks of optimizers and codecs, as protocols: offload imports neither.

An ``UpdateRule`` turns (weight, gradient, states) into new weights and states, in place, on CPU
tensors.  It declares its states before any step, so that they can be sized, placed, streamed
and saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor that does not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


@runtime_checkable
class UpdateRule(Protocol):
    """One optimizer's arithmetic on one parameter (or on a range of its elements).

    ``elementwise`` rules may be given any contiguous range of a parameter whose start and
    length are multiples of ``granule`` elements (the last range of a parameter may be shorter):
    the engine streams large parameters tile by tile and the bits do not depend on the tiling.
    Other rules are always given whole parameters in their own shape.
    """

    @property
    def elementwise(self) -> bool:
        """Whether ranges of a parameter may be updated apart from each other."""
        ...

    @property
    def granule(self) -> int:
        """Ranges start and end at multiples of this many elements (1 unless states are blocked)."""
        ...

    def state_spec(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Any]:
        """States (master included) of a parameter or range of this shape: name -> TensorSpec."""
        ...

    def init_states(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fill freshly zeroed states in place from the initial weight."""
        ...

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        states: Mapping[str, Tensor],
        *,
        step: int,
        hyper: Mapping[str, Any],
        seed: int,
        element_offset: int,
    ) -> None:
        """Do one step in place.

        ``step`` counts this parameter's updates from 1; ``hyper`` is its torch.optim param
        group (``lr``, ``betas``, ...); ``seed`` is a 64-bit number of the parameter's name and
        the run; ``element_offset`` is the first element's index within the whole parameter.
        ``grad`` may be overwritten.  Must release the GIL in bulk work and use no global RNG.
        """
        ...
