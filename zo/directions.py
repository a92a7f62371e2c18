"""What every way of making directions can do: probe weights and apply updates, tensor by tensor.

A ``Directions`` is a frozen description (it goes into the log's header).  ``open`` binds it to one
parameter and gives that parameter's ``Trace``: the little state that updates need between steps
(none for dense noise, factors for low rank).  A trace is driven the same way by a live resident
step, by a streamed visit and by the replay of a log, which is why all three give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .perturb import StepUpdate


@dataclass(frozen=True, slots=True)
class Place:
    """Which parameter of which run: all that noise depends on besides seeds of steps."""

    name: str
    stream: int
    run_seed: int
    shape: tuple[int, ...]


class Trace(ABC):
    """One parameter's state between steps."""

    @abstractmethod
    def apply(self, weight: Tensor, updates: list[StepUpdate]) -> None:
        """Take the updates of consecutive steps, in order; may write ``weight`` in place."""

    @abstractmethod
    def finish(self, weight: Tensor) -> None:
        """Write into ``weight`` what the trace still holds back; the trace is not changed.

        For exporting a copy of the weights as they stand; never called on weights that train on.
        """


class Directions(ABC):
    """How the directions of a step are made."""

    @abstractmethod
    def open(self, place: Place) -> Trace:
        """State of one parameter before the first step."""

    @abstractmethod
    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether parameters of this shape can be trained."""

    @abstractmethod
    def check(self, *, directions: int, weight_decay: float) -> None:
        """Refuse settings that these directions cannot honour."""
