"""Two-point SPSA: both signs of every direction, central differences (MeZO).

Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", 1992; Malladi et al., "Fine-tuning language models with just forward passes", 2023
(MeZO), whose step this is.  Error of the derivative O(eps^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from .estimate import Estimator, Member, check_directions


@final
@dataclass(frozen=True, slots=True)
class TwoPoint(Estimator):
    """``g_d = (l(+eps z_d) - l(-eps z_d)) / (2 eps)`` for each of ``count`` directions.

    >>> TwoPoint().projected_grads([1.5, 1.0], eps=0.5)
    (0.5,)
    """

    count: int = 1

    def __post_init__(self) -> None:
        check_directions(self.count, 1)

    @property
    def directions(self) -> int:
        return self.count

    def members(self) -> tuple[Member, ...]:
        return tuple(Member(d, sign) for d in range(self.count) for sign in (1, -1))

    def projected_grads(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        self.check(losses, eps)
        pairs = zip(losses[0::2], losses[1::2], strict=True)
        return tuple((plus - minus) / (2 * eps) for plus, minus in pairs)
