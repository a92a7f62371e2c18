"""One-sided populations: every direction once, against a baseline of the same batch.

With the leave-one-out baseline the estimate is unbiased for the smoothed loss and the centre's
forward is not needed for it; with the centre as baseline it is the forward difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from .estimate import Estimator, Member, check_directions

Baseline = Literal["leave_one_out", "centre"]


@final
@dataclass(frozen=True, slots=True)
class OneSided(Estimator):
    """``g_d = (l_d - baseline_d) / eps`` for each of ``count`` directions.

    ``baseline="leave_one_out"``: the mean loss of the other members (at least 2 directions).
    ``baseline="centre"``: the loss at the stored weights, one more forward, member 0.

    >>> OneSided(2).projected_grads([1.5, 1.0], eps=0.5)
    (1.0, -1.0)
    """

    count: int = 15
    baseline: Baseline = "leave_one_out"

    def __post_init__(self) -> None:
        if self.baseline not in ("leave_one_out", "centre"):
            raise ValueError(f"baseline must be 'leave_one_out' or 'centre', got {self.baseline!r}")
        check_directions(self.count, 2 if self.baseline == "leave_one_out" else 1)

    @property
    def directions(self) -> int:
        return self.count

    def members(self) -> tuple[Member, ...]:
        probes = tuple(Member(d, 1) for d in range(self.count))
        return probes if self.baseline == "leave_one_out" else (Member(0, 0), *probes)

    def projected_grads(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        self.check(losses, eps)
        if self.baseline == "centre":
            return tuple((loss - losses[0]) / eps for loss in losses[1:])
        mean = sum(losses) / self.count
        widen = self.count / (self.count - 1)
        return tuple(widen * (loss - mean) / eps for loss in losses)
