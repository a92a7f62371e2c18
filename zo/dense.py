"""Dense directions: every element of every parameter has its own noise (MeZO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from .directions import Directions, Place, Trace
from .estimate import Member
from .noise import Kind
from .perturb import Rounding, StepUpdate, apply_update, write_perturbed


@final
@dataclass(frozen=True, slots=True)
class Dense(Directions):
    """Independent noise for every element; updates are written to the weights every step.

    ``kind`` Gaussian is MeZO.  Each member needs perturbed weights of its own, so a step costs its
    forwards plus about two passes of noise a direction.  ``minimum`` is a floor that updates
    respect (0 for scales of quantised weights).

    >>> from headrace.zo import Dense, Kind
    >>> Dense(Kind.RADEMACHER).accepts((3, 4))
    True
    """

    kind: Kind = Kind.GAUSSIAN
    rounding: Rounding = Rounding.NEAREST
    minimum: float | None = None

    def open(self, place: Place) -> DenseTrace:
        return DenseTrace(self, place)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return True

    def check(self, *, directions: int, weight_decay: float) -> None:
        if directions < 1 or weight_decay < 0:
            raise ValueError(
                f"directions must be positive and weight_decay not negative, got {directions} and "
                f"{weight_decay}"
            )


@final
class DenseTrace(Trace):
    """A parameter under dense noise: no state at all; any range of it can be handled alone."""

    def __init__(self, directions: Dense, place: Place) -> None:
        self._directions = directions
        self._place = place

    def perturb(
        self, out: Tensor, weight: Tensor, member: Member, *, seed: int, eps: float, start: int = 0
    ) -> None:
        """Write a member's weights to ``out``; ``start`` is the first element's index."""
        if member.sign == 0:
            out.copy_(weight)
            return
        write_perturbed(
            out,
            weight,
            scale=member.sign * eps,
            kind=self._directions.kind,
            seed=seed,
            stream=self._place.stream,
            direction=member.direction,
            start=start,
        )

    def apply(self, weight: Tensor, updates: list[StepUpdate]) -> None:
        self.apply_range(weight, updates, start=0)

    def apply_range(self, weight: Tensor, updates: list[StepUpdate], *, start: int) -> None:
        """``apply`` on a contiguous range of the parameter that starts at element ``start``."""
        floor = self._directions.minimum
        # A floor acts between steps, so that they cannot be fused into one pass.
        runs = [updates] if floor is None else [[update] for update in updates]
        for run in runs:
            apply_update(
                weight,
                run,
                kind=self._directions.kind,
                stream=self._place.stream,
                start=start,
                rounding=self._directions.rounding,
            )
            if floor is not None:
                weight.detach().clamp_(min=floor)

    def finish(self, weight: Tensor) -> None:
        """Nothing is held back."""
