"""Rules on a step's projected grads: clipping, normalisation, step-size control.

A rule maps the scalars of a step and its own memory (a few floats) to new scalars and new memory.
It is a pure function, so that the memory of a resumed run is rebuilt from the losses in the log.
Rules are applied in the order in which they are listed.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

Grads = tuple[float, ...]
Memory = tuple[float, ...]


class Control(ABC):
    """One rule on projected grads."""

    @abstractmethod
    def initial(self) -> Memory:
        """Memory before the first step."""

    @abstractmethod
    def apply(self, grads: Grads, memory: Memory) -> tuple[Grads, Memory]:
        """New scalars and new memory; neither argument is changed."""


@final
@dataclass(frozen=True, slots=True)
class Clip(Control):
    """Clamp every projected grad to ``[-bound, bound]`` (QZO's directional-derivative clipping).

    >>> Clip(1.0).apply((3.0, -0.5), ())
    ((1.0, -0.5), ())
    """

    bound: float

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}")

    def initial(self) -> Memory:
        return ()

    def apply(self, grads: Grads, memory: Memory) -> tuple[Grads, Memory]:
        return tuple(min(max(grad, -self.bound), self.bound) for grad in grads), memory


@final
@dataclass(frozen=True, slots=True)
class Standardize(Control):
    """Divide by the standard deviation over directions; eps cancels (FZOO).

    A step whose losses are all equal keeps its scalars (they are then zero or one constant).

    >>> from headrace.zo import Standardize
    >>> Standardize().apply((1.0, -1.0), ())
    ((0.7071067811865475, -0.7071067811865475), ())
    """

    def initial(self) -> Memory:
        return ()

    def apply(self, grads: Grads, memory: Memory) -> tuple[Grads, Memory]:
        if len(grads) < 2:
            raise ValueError("Standardize needs at least 2 directions; use RmsScale for one")
        deviation = statistics.stdev(grads)
        return tuple(grad / deviation for grad in grads) if deviation else grads, memory


@final
@dataclass(frozen=True, slots=True)
class RmsScale(Control):
    """Divide by the running root mean square of all projected grads (MEAZO's one scalar of state).

    ``v <- beta v + (1 - beta) mean(g^2)``; ``g <- g / sqrt(v / (1 - beta^t))``.  Removes the scale
    of the loss from the learning rate.

    >>> from headrace.zo import RmsScale
    >>> rule = RmsScale(beta=0.9)
    >>> grads, memory = rule.apply((2.0, -2.0), rule.initial())
    >>> [round(g, 3) for g in grads]
    [1.0, -1.0]
    """

    beta: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}")

    def initial(self) -> Memory:
        return (0.0, 0.0)

    def apply(self, grads: Grads, memory: Memory) -> tuple[Grads, Memory]:
        mean_square = sum(grad * grad for grad in grads) / len(grads)
        square = self.beta * memory[0] + (1 - self.beta) * mean_square
        steps = memory[1] + 1
        root = math.sqrt(square / (1 - self.beta**steps))
        return tuple(grad / root for grad in grads) if root else grads, (square, steps)


def apply_controls(
    controls: Sequence[Control], grads: Grads, memories: Sequence[Memory]
) -> tuple[Grads, tuple[Memory, ...]]:
    """Apply rules in order; returns the scalars and every rule's new memory."""
    after = []
    for control, memory in zip(controls, memories, strict=True):
        grads, new_memory = control.apply(grads, memory)
        after.append(new_memory)
    return grads, tuple(after)
