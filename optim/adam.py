"""Adam's direction: the first moment over the root of the second, both bias-corrected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .arithmetic import exact_sqrt, fp32
from .base import BasisChange, Brick, Kind, Slot, StepContext, float_slot
from .spec import Shape


@final
@dataclass(frozen=True)
class Adam(Brick):
    """Adam (Kingma and Ba, arXiv:1412.6980); 8 bytes a parameter in fp32.

    Reads ``betas`` and ``eps``.  States ``exp_avg`` and ``exp_avg_sq`` interchange with torch's.
    """

    @property
    def elementwise(self) -> bool:
        return True

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {
            "exp_avg": float_slot(shape, Kind.SIGNED),
            "exp_avg_sq": float_slot(shape, Kind.POSITIVE),
        }

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        b1, b2 = context.betas()
        m, v = states["exp_avg"], states["exp_avg_sq"]
        m.mul_(fp32(b1)).add_(grad * fp32(1.0 - b1))
        v.mul_(fp32(b2)).add_((grad * fp32(1.0 - b2)).mul_(grad))
        root = exact_sqrt(v).mul_(fp32(1.0 / math.sqrt(1.0 - b2**context.step)))
        unbiased = m * fp32(1.0 / (1.0 - b1**context.step))
        return unbiased.div_(root.add_(fp32(context.number("eps"))))

    def rotate(
        self, states: Mapping[str, Tensor], shape: Shape, change: BasisChange, context: StepContext
    ) -> None:
        """Rotate mean and variance apart: E[(Cg)^2] = C^2 Var g + (C E g)^2.

        As in LDAdam (Robert et al., arXiv:2410.16103), with variances cut off at zero.
        """
        done = context.step - 1
        if done < 1:
            return
        b1, b2 = context.betas()
        m, v = states["exp_avg"], states["exp_avg_sq"]
        mean = m / (1.0 - b1**done)
        correction = 1.0 - b2**done
        variance = (v / correction).sub_(mean.square()).clamp_(min=0.0)
        rotated = change.mix(mean)
        v.copy_(
            change.mix_squares(variance).add_(rotated.square()).clamp_(min=0.0).mul_(correction)
        )
        m.copy_(change.mix(m))
