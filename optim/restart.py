"""Restart an inner brick's moments at regular intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .base import Brick, Slot, StepContext
from .spec import Shape


@final
@dataclass(frozen=True)
class Restart(Brick):
    """Forget the moments every ``every`` steps (momentum reset, survey arXiv:2505.22922)."""

    inner: Brick
    every: int = 200

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1")

    @property
    def elementwise(self) -> bool:
        return self.inner.elementwise

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return self.inner.init_spec(shape)

    def init(self, states: Mapping[str, Tensor]) -> None:
        self.inner.init(states)

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        age = (context.step - 1) % self.every
        if age == 0 and context.step > 1:
            for name in self.inner.init_spec(tuple(grad.shape)):
                states[name].zero_()
            self.inner.init(states)
        return self.inner.update(grad, states, context.at_step(age + 1))
