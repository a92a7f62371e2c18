"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .arithmetic import fp32
from .base import Brick, Kind, Slot, StepContext, float_slot
from .spec import Shape


@final
@dataclass(frozen=True)
class Lion(Brick):
    """Lion (Chen et al., arXiv:2302.06675); reads ``betas``; 4 bytes a parameter in fp32."""

    @property
    def elementwise(self) -> bool:
        return True

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {"exp_avg": float_slot(shape, Kind.SIGNED)}

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        b1, b2 = context.betas()
        m = states["exp_avg"]
        direction = torch.sign((m * fp32(b1)).add_(grad * fp32(1.0 - b1)))
        m.mul_(fp32(b2)).add_(grad * fp32(1.0 - b2))
        return direction
