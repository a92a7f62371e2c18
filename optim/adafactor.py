"""Adafactor: the second moment of a matrix as the product of a row and a column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .base import Brick, Kind, Slot, StepContext, float_slot
from .clip import rms
from .spec import Shape


@final
@dataclass(frozen=True)
class Adafactor(Brick):
    """Adafactor (Shazeer and Stern, arXiv:1804.04235) with an outer learning rate.

    The decay of step t is 1 - t^-``decay_power``; the update is clipped to RMS
    ``clip_threshold``.  ``scale_parameter`` multiplies the step by the weight's own RMS (at least
    1e-3).  A matrix m x n keeps m + n numbers; tensors of more axes factor the last two; vectors
    keep a full second moment.  The paper's relative step sizes are left to a scheduler.
    """

    decay_power: float = 0.8
    clip_threshold: float = 1.0
    scale_parameter: bool = False

    @property
    def elementwise(self) -> bool:
        return False

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        if len(shape) < 2:
            return {"exp_avg_sq": float_slot(shape, Kind.POSITIVE)}
        return {
            "exp_avg_sq_row": float_slot(shape[:-1], Kind.PLAIN),
            "exp_avg_sq_col": float_slot((*shape[:-2], shape[-1]), Kind.PLAIN),
        }

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        fresh = context.step**-self.decay_power
        squares = grad.square().add_(1e-30)
        if grad.ndim < 2:
            v = states["exp_avg_sq"]
            v.lerp_(squares, fresh)
            direction = grad.mul_(v.rsqrt())
        else:
            row, col = states["exp_avg_sq_row"], states["exp_avg_sq_col"]
            row.lerp_(squares.mean(dim=-1), fresh)
            col.lerp_(squares.mean(dim=-2), fresh)
            row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            direction = grad.mul_(row_factor).mul_(col.rsqrt().unsqueeze(-2))
        direction.div_((rms(direction) / self.clip_threshold).clamp(min=1.0))
        if self.scale_parameter:
            direction.mul_(rms(context.weight).clamp(min=1e-3))
        return direction
