"""APOLLO: a plain gradient, scaled by how Adam would stretch its random projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from .base import Slot, StepContext
from .clip import NormGrowthLimiter
from .projected import Projected, channel_ratio, uncorrected

Scaling = Literal["channel", "tensor"]


@final
@dataclass(frozen=True)
class Apollo(Projected):
    """APOLLO and APOLLO-Mini (Zhu et al., arXiv:2412.05270), from the paper's equations.

    The gradient is multiplied by |inner(R)| / |R| for every channel of the long side, or once for
    the tensor (Mini), and by sqrt(``scale``); its norm may grow by
    ``growth`` a step (None: freely).  With a
    random projector the state is the moments alone, max(m, n) r each: the projection is made
    again from the seed.
    """

    scale: float = 1.0
    scaling: Scaling = "channel"
    growth: float | None = 1.01

    def extra_slots(self) -> dict[str, Slot]:
        return {} if self.growth is None else NormGrowthLimiter(self.growth).init_spec(())

    def combine(
        self,
        grad: Tensor,
        low_grad: Tensor,
        low_step: Tensor,
        basis: Tensor,
        states: Mapping[str, Tensor],
        context: StepContext,
    ) -> Tensor:
        if self.scaling == "channel":
            factor = channel_ratio(low_step, low_grad, self.projector, *grad.shape)
        else:
            norms = [torch.linalg.vector_norm(x) for x in (low_step, low_grad)]
            factor = norms[0] / (norms[1] + 1e-8)
        direction = grad * factor
        if self.growth is not None:
            raw = uncorrected(context)
            limiter = NormGrowthLimiter(self.growth)
            direction = limiter.update(direction.mul_(raw), states, context).div_(raw)
        return direction.mul_(math.sqrt(self.scale))
