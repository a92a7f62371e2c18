"""Fira: GaLore, with the rest of the gradient scaled like the part that was projected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .base import Slot, StepContext
from .clip import NormGrowthLimiter
from .projected import Projected, channel_ratio, uncorrected


@final
@dataclass(frozen=True)
class Fira(Projected):
    """Fira (Chen et al., arXiv:2410.01623): direction = scale * lift(N) + limited(phi * E).

    E = G - lift(project(G)) is the residual (of the full projection; ``scale`` applies to the
    lifted step only), phi = |N| / |R| for every channel of the long side.  State: GaLore's and
    one number.
    """

    scale: float = 0.25
    growth: float = 1.01

    def extra_slots(self) -> dict[str, Slot]:
        return NormGrowthLimiter(self.growth).init_spec(())

    def combine(
        self,
        grad: Tensor,
        low_grad: Tensor,
        low_step: Tensor,
        basis: Tensor,
        states: Mapping[str, Tensor],
        context: StepContext,
    ) -> Tensor:
        rows, cols = grad.shape
        factor = channel_ratio(low_step, low_grad, self.projector, rows, cols)
        residual = grad - self.projector.up(low_grad, basis, rows, cols)
        raw = uncorrected(context)
        limiter = NormGrowthLimiter(self.growth)
        limited = limiter.update(residual.mul_(factor).mul_(raw), states, context).div_(raw)
        lifted = self.projector.up(low_step, basis, rows, cols)
        return lifted.mul_(self.scale).add_(limited)
