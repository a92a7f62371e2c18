"""signSGD: the sign of the gradient, without any state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .base import Brick, Slot, StepContext
from .spec import Shape


@final
@dataclass(frozen=True)
class Sign(Brick):
    """signSGD (Bernstein et al., arXiv:1802.04434); 0 bytes a parameter."""

    @property
    def elementwise(self) -> bool:
        return True

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {}

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        return torch.sign(grad)
