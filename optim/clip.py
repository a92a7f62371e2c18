"""Bricks that limit a direction: by its root mean square, or by the growth of its norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .base import Brick, Kind, Slot, StepContext, float_slot
from .spec import Shape


@final
@dataclass(frozen=True)
class RmsClip(Brick):
    """Divide a direction by max(1, RMS / threshold), Adafactor's update clipping."""

    threshold: float = 1.0

    @property
    def elementwise(self) -> bool:
        return False

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {}

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        return grad.div_((rms(grad) / self.threshold).clamp(min=1.0))


@final
@dataclass(frozen=True)
class NormGrowthLimiter(Brick):
    """Let a direction's norm grow by at most ``growth`` a step (Fira, arXiv:2410.01623, 3.3).

    State: one number, the norm of the last direction.
    """

    growth: float = 1.01

    @property
    def elementwise(self) -> bool:
        return False

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {"limiter_norm": float_slot((), Kind.PLAIN)}

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        last = states["limiter_norm"]
        norm = torch.linalg.vector_norm(grad)
        ratio = norm / (last + 1e-8)
        limit = torch.where(last > 0, (ratio / self.growth).clamp(min=1.0), torch.ones_like(norm))
        last.copy_(norm / limit)
        return grad.div_(limit)


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of a tensor; zero if it is empty."""
    return x.square().mean().sqrt() if x.numel() else x.new_zeros(())
