"""Where the trained weights of a step are, and how members and updates reach them.

``ZOStep`` knows traces and scalars; a ``Weights`` knows tensors.  ``ResidentWeights`` is the plain
case; ``streamed.StreamedWeights`` has them pass through a device slot.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor, nn

from .dense import DenseTrace
from .directions import Trace
from .estimate import Member
from .factored import FactoredTrace
from .perturb import StepUpdate


class Weights(ABC):
    """The trained weights of one run."""

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Trained parameters by name; what ``.data`` holds is the implementation's business."""

    @abstractmethod
    def attach(self, traces: Mapping[str, Trace]) -> None:
        """Take the traces of all parameters; called once, before anything else."""

    @abstractmethod
    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The stored weights (for factored directions: without what is not merged)."""

    @abstractmethod
    def evaluating(
        self, members: Sequence[Member], *, seed: int, eps: float
    ) -> AbstractContextManager[None]:
        """Let the model compute with these members' weights, as far as they are dense."""

    @abstractmethod
    def apply(self, name: str, updates: list[StepUpdate]) -> None:
        """Take updates of consecutive steps to one parameter."""

    @abstractmethod
    def settle(self, step: int) -> None:
        """End windows that end before ``step``."""

    @abstractmethod
    def finish(self, name: str, weight: Tensor) -> None:
        """Turn a copy from ``stored`` into the weight as trained so far."""

    @abstractmethod
    def merged(self) -> AbstractContextManager[None]:
        """Let the parameters hold the weights as trained so far."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model."""


@final
class ResidentWeights(Weights):
    """Weights in ordinary parameters.  Dense members compute with a scratch copy of them all."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._traces: Mapping[str, Trace] = {}
        self._copies: dict[str, Tensor] = {}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._parameters

    def attach(self, traces: Mapping[str, Trace]) -> None:
        self._traces = traces

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield name, parameter.detach()

    @contextlib.contextmanager
    def evaluating(self, members: Sequence[Member], *, seed: int, eps: float) -> Iterator[None]:
        dense = {name: t for name, t in self._traces.items() if isinstance(t, DenseTrace)}
        if dense and len(members) != 1:
            raise ValueError(
                f"dense directions evaluate one member at a time, got {len(members)}; use step(), "
                "or low-rank directions"
            )
        if not dense or not members[0].sign:
            yield
            return
        stored = {name: self._parameters[name].data for name in dense}
        try:
            for name, trace in dense.items():
                copy = self._copies.get(name)
                if copy is None:
                    copy = self._copies[name] = torch.empty_like(stored[name])
                trace.perturb(copy, stored[name], members[0], seed=seed, eps=eps)
                self._parameters[name].data = copy
            yield
        finally:
            for name, weight in stored.items():
                self._parameters[name].data = weight

    def apply(self, name: str, updates: list[StepUpdate]) -> None:
        self._traces[name].apply(self._parameters[name].data, updates)

    def settle(self, step: int) -> None:
        for name, trace in self._traces.items():
            if isinstance(trace, FactoredTrace):
                trace.settle(self._parameters[name].data, step)

    def finish(self, name: str, weight: Tensor) -> None:
        self._traces[name].finish(weight)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        stored = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, weight in stored.items():
                copy = weight.clone()
                self._traces[name].finish(copy)
                self._parameters[name].data = copy
            yield
        finally:
            for name, weight in stored.items():
                self._parameters[name].data = weight

    def close(self) -> None:
        self._copies.clear()
