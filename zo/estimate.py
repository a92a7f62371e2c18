"""Estimators: which weights a step probes, and what the losses say about each direction.

An estimator is a pure function of losses.  It names the *members* of a step (a direction and a
sign each; sign 0 is the unperturbed centre) and turns their losses into one scalar a direction, the
*projected grad*: an estimate of the loss's derivative along that direction.  The gradient estimate
of a step is the mean over directions of ``projected_grad * direction``.

Estimators know nothing of how directions are made (``perturb``, ``lowrank``) nor of what is done
to the scalars afterwards (``control``), so any of each goes with any other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    """One evaluation of a step: weights at ``w + sign * eps * direction``."""

    direction: int
    sign: int


class Estimator(ABC):
    """Turns the losses of a step's members into projected grads."""

    @property
    @abstractmethod
    def directions(self) -> int:
        """Number of directions that a step probes."""

    @property
    def parts(self) -> int:
        """Equal parts of a batch that have members of their own; 1: a member sees all rows."""
        return 1

    @property
    def copies(self) -> int:
        """How often a step evaluates the batch: its forwards."""
        return len(self.members()) // self.parts

    @abstractmethod
    def members(self) -> tuple[Member, ...]:
        """Evaluations of a step, in the order in which losses are given: copies, then parts."""

    @abstractmethod
    def projected_grads(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """Derivative estimates, one a direction, from the losses of ``members()``."""

    def check(self, losses: Sequence[float], eps: float) -> None:
        """Refuse a wrong number of losses or a probe scale that cannot be divided by."""
        expected = len(self.members())
        if len(losses) != expected:
            shape = f" ({self.copies} copies of {self.parts} parts)" if self.parts > 1 else ""
            raise ValueError(f"a step has {expected} members{shape}, got {len(losses)} losses")
        check_eps(eps)


def check_eps(eps: float) -> None:
    """Refuse a probe scale that is not a positive finite number."""
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be positive and finite, got {eps}")


def check_directions(directions: int, least: int) -> None:
    """Refuse a number of directions outside ``least .. 4096``."""
    if not least <= directions <= 4096:
        raise ValueError(f"directions must be in {least} .. 4096, got {directions}")


def all_finite(values: Sequence[float]) -> bool:
    """Whether no value is inf or NaN; a step with such a loss is skipped whole."""
    return all(math.isfinite(value) for value in values)
