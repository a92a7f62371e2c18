"""Stochastic gradient descent, with momentum if the param group asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .arithmetic import fp32
from .base import Brick, Kind, Slot, StepContext, float_slot
from .spec import Shape


@final
@dataclass(frozen=True)
class Sgd(Brick):
    """Heavy-ball momentum as torch.optim.SGD defines it (no dampening).

    Reads ``momentum``; ``nesterov`` looks one step ahead.  ``momentum_buffer`` costs 4 bytes a
    parameter in fp32, nothing with ``with_momentum=False``.
    """

    with_momentum: bool = True
    nesterov: bool = False

    @property
    def elementwise(self) -> bool:
        return True

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {"momentum_buffer": float_slot(shape, Kind.SIGNED)} if self.with_momentum else {}

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        if not self.with_momentum:
            return grad
        momentum = fp32(context.number("momentum"))
        buffer = states["momentum_buffer"]
        buffer.mul_(momentum).add_(grad)
        return grad.add_(buffer * momentum) if self.nesterov else buffer.clone()
