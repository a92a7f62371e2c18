"""StableAdamW: AdamW whose step shrinks when the second moment lags behind the gradient."""

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
class StableAdam(Brick):
    """The AdamW-Adafactor hybrid of Wortsman et al. (arXiv:2304.13013): update clipping by RMS.

    The direction is Adam's divided by max(1, RMS(g / sqrt(v))).  Debiasing is in the decay rates,
    beta_t = beta (1 - beta^(t-1)) / (1 - beta^t), which equals Adam's bias correction.  Reads
    ``betas`` and ``eps``; 8 bytes a parameter in fp32.
    """

    @property
    def elementwise(self) -> bool:
        return False

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {
            "exp_avg": float_slot(shape, Kind.SIGNED),
            "exp_avg_sq": float_slot(shape, Kind.POSITIVE),
        }

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        step, eps = context.step, context.number("eps")
        b1, b2 = ((b - b**step) / (1.0 - b**step) for b in context.betas())
        m, v = states["exp_avg"], states["exp_avg_sq"]
        m.lerp_(grad, 1.0 - b1)
        v.lerp_(grad.square(), 1.0 - b2)
        surprise = rms(grad.square_().div_(v.clamp(min=eps * eps)).sqrt_())
        return (m / v.sqrt().add_(eps)).div_(surprise.clamp(min=1.0))
