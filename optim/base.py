"""The algebra of optimizers: a brick turns a gradient into a direction and keeps a flat state.

A brick declares its states for a shape before any step (``init_spec``), fills them (``init``) and
maps fp32 gradient to fp32 direction (``update``), changing the states in place.  A rule then does
``weight = weight * (1 - lr * weight_decay) - lr * direction`` (``brick_rule``).  Bricks are plain
torch operations that run on any device, without global state and without global randomness; they
are the specification that fused kernels are held to.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from .spec import Shape, TensorSpec


class Kind(enum.Enum):
    """What a state's values are like, which decides how it may be encoded."""

    SIGNED = "signed"  # a first moment
    POSITIVE = "positive"  # never negative, and divided by: a second moment
    PLAIN = "plain"  # never encoded: projectors, counters, norms


@final
@dataclass(frozen=True, slots=True)
class Slot:
    """A state before it exists: its shape, dtype and kind."""

    spec: TensorSpec
    kind: Kind


@final
@dataclass(frozen=True, slots=True)
class StepContext:
    """What a brick may know about the step besides the gradient.

    ``step`` counts from 1; ``hyper`` is the param group; ``seed`` is the parameter's 64-bit noise
    seed; ``weight`` is the fp32 master before the step, read-only, in the parameter's shape (also
    for bricks that run inside a projection).
    """

    step: int
    hyper: Mapping[str, Any]
    seed: int
    element_offset: int
    weight: Tensor

    def at_step(self, step: int) -> StepContext:
        """Return the same context for another step number (bricks that restart inner ones)."""
        return replace(self, step=step)

    def betas(self) -> tuple[float, float]:
        """Return the param group's two decay rates."""
        first, second = self.hyper["betas"]
        return float(first), float(second)

    def number(self, key: str) -> float:
        """Return one number of the param group."""
        return float(self.hyper[key])


@final
@dataclass(frozen=True, slots=True)
class BasisChange:
    """A change of low-rank coordinates from an old basis to a new one.

    ``mix`` maps a direction; ``mix_squares`` maps variances of uncorrelated coordinates.
    """

    mix: Callable[[Tensor], Tensor]
    mix_squares: Callable[[Tensor], Tensor]


class Brick(ABC):
    """One piece of an optimizer; a frozen dataclass of its structural settings."""

    @property
    @abstractmethod
    def elementwise(self) -> bool:
        """Whether the direction of an element depends on that element alone."""

    @abstractmethod
    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        """Return name -> slot of every state of a parameter (or range) of this shape."""

    @abstractmethod
    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        """Return the direction of descent in fp32; change states in place.

        ``grad`` is fp32 and may be overwritten; the result may alias it, never a state.
        """

    def init(self, states: Mapping[str, Tensor]) -> None:
        """Fill freshly zeroed states in place (zeros unless a brick says otherwise)."""
        return

    def rotate(
        self, states: Mapping[str, Tensor], shape: Shape, change: BasisChange, context: StepContext
    ) -> None:
        """Carry the states of a gradient of this shape into a new basis.

        ``context.step`` is the coming step.
        """
        for name, slot in self.init_spec(shape).items():
            if slot.kind is Kind.SIGNED:
                states[name].copy_(change.mix(states[name]))
            elif slot.kind is Kind.POSITIVE:
                states[name].copy_(change.mix_squares(states[name]).clamp_(min=0.0))


def float_slot(shape: Shape, kind: Kind) -> Slot:
    """Return the slot of an fp32 state."""
    return Slot(TensorSpec(tuple(shape), torch.float32), kind)


def count_slot() -> Slot:
    """Return the slot of a whole number."""
    return Slot(TensorSpec((), torch.int64), Kind.PLAIN)


@final
@dataclass(frozen=True)
class Chain(Brick):
    """Bricks one after another: each one's direction is the next one's gradient.

    State names of the links must differ, so that the flat state stays readable.
    """

    links: tuple[Brick, ...]

    @property
    def elementwise(self) -> bool:
        return all(link.elementwise for link in self.links)

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        for link in self.links:
            own = link.init_spec(shape)
            clash = sorted(set(own) & set(slots))
            if clash:
                raise ValueError(
                    f"two links of a chain keep states of the same name {clash}; "
                    f"a chain may hold one brick of a kind"
                )
            slots |= own
        return slots

    def init(self, states: Mapping[str, Tensor]) -> None:
        for link in self.links:
            link.init(states)

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        for link in self.links:
            grad = link.update(grad, states, context)
        return grad

    def rotate(
        self, states: Mapping[str, Tensor], shape: Shape, change: BasisChange, context: StepContext
    ) -> None:
        for link in self.links:
            link.rotate(states, shape, change, context)


def chain(*links: Brick) -> Chain:
    """Return the bricks one after another.

    >>> from headrace.optim.clip import RmsClip
    >>> from headrace.optim.adam import Adam
    >>> sorted(chain(Adam(), RmsClip(1.0)).init_spec((2,)))
    ['exp_avg', 'exp_avg_sq']
    """
    return Chain(links)
