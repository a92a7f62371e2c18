"""Directions for every example: each row of a batch has probes of its own.

``copies`` evaluations of each of ``examples`` parts of a batch (single rows, usually) give
``copies * examples`` directions for the price of ``copies`` forwards of the batch.  A part's losses
are compared with each other only (leave-one-out), so that the differences between examples cancel.
One direction that all rows share measures the batch's slope once; here every row measures its own
along another direction, and the mean over rows averages out what a random direction misses.

GRZO ("per-example directions", 2026) perturbs both ways; here populations are one-sided, which
costs ``copies / (copies - 1)`` evaluations a degree of freedom instead of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from .estimate import Estimator, Member, check_directions


@final
@dataclass(frozen=True, slots=True)
class PerExample(Estimator):
    """``g = (l - mean of the part's other losses) / eps``, one for each of all members.

    Members are ordered copy by copy, in each of them part by part: the order of the rows of a
    batch that is repeated ``copies`` times.  The batch must split into ``examples`` equal parts.
    For objectives that give one loss a part (``ZOStep.step_together``); an objective that is one
    number for the whole batch takes ``OneSided``.

    >>> rule = PerExample(copies=2, examples=2)
    >>> rule.directions
    4
    >>> rule.projected_grads([1.5, 7.0, 1.0, 7.5], eps=0.5)
    (1.0, -1.0, -1.0, 1.0)
    """

    copies: int = 4
    examples: int = 16

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError(f"examples must be positive, got {self.examples}")
        if self.copies < 2:
            raise ValueError(
                f"copies must be at least 2 (an example's losses are compared with each other), "
                f"got {self.copies}"
            )
        check_directions(self.directions, 2)

    @property
    def directions(self) -> int:
        return self.copies * self.examples

    @property
    def parts(self) -> int:
        return self.examples

    def members(self) -> tuple[Member, ...]:
        return tuple(Member(d, 1) for d in range(self.directions))

    def projected_grads(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        self.check(losses, eps)
        widen = self.copies / (self.copies - 1)
        means = [sum(losses[part :: self.examples]) / self.copies for part in range(self.examples)]
        return tuple(
            widen * (loss - means[member % self.examples]) / eps
            for member, loss in enumerate(losses)
        )
