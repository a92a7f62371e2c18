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
from torch import Tensor

from ..quant.encoded import EncodedTensor
from .adapter import Adapter
from .dense import DenseTrace
from .directions import Trace
from .estimate import Member
from .factored import FactoredTrace
from .perturb import StepUpdate
from .replay import fingerprint


class Weights(ABC):
    """The trained weights of one run."""

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, Tensor]:
        """Trained parameters by name; what ``.data`` holds is the implementation's business.

        An ``EncodedTensor`` among them is trained as a low-rank difference beside its codes.
        """

    def fingerprint(self) -> str:
        """Fingerprint of the weights that the run begins with; reads them all."""
        return fingerprint(self.stored())

    def adapter_of(self, name: str) -> Adapter | None:
        """The difference that is kept beside a parameter which is never written."""
        return None

    def rows_of(self, name: str) -> Tensor | None:
        """Which rows of a table its ``.data`` holds at present (int64); None: all of them."""
        return None

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

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._traces: Mapping[str, Trace] = {}
        self._copies: dict[str, Tensor] = {}
        self._adapters = {
            name: Adapter()
            for name, parameter in parameters.items()
            if isinstance(parameter, EncodedTensor)
        }

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._parameters

    def adapter_of(self, name: str) -> Adapter | None:
        return self._adapters.get(name)

    def attach(self, traces: Mapping[str, Trace]) -> None:
        for name in self._adapters:
            check_encoded(name, traces[name])
        self._traces = traces

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            if isinstance(parameter, EncodedTensor):
                yield name, parameter.decode()
            else:
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
        adapter, trace = self._adapters.get(name), self._traces[name]
        if adapter is None:
            trace.apply(self._parameters[name].data, updates)
            return
        assert isinstance(trace, FactoredTrace)
        for update in updates:
            keep_closed(adapter, trace, update.step)
            trace.window(update.step).accumulate(update)

    def settle(self, step: int) -> None:
        for name, trace in self._traces.items():
            if not isinstance(trace, FactoredTrace):
                continue
            if (adapter := self._adapters.get(name)) is not None:
                keep_closed(adapter, trace, step)
            else:
                trace.settle(self._parameters[name].data, step)

    def finish(self, name: str, weight: Tensor) -> None:
        if (adapter := self._adapters.get(name)) is not None:
            adapter.merge_into(weight)
        self._traces[name].finish(weight)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        if self._adapters:
            raise ValueError(
                f"{next(iter(self._adapters))} is encoded and takes no merge; write "
                "ZOStep.export() (decoded weights) or the factors of adapter_of() to a folder"
            )
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


def keep_closed(adapter: Adapter, trace: FactoredTrace, step: int) -> None:
    """Move the factors of a window that has ended before ``step`` to the adapter."""
    retired = trace.retire(step)
    if retired is not None:
        adapter.add(*retired)


def check_encoded(name: str, trace: Trace) -> None:
    """Refuse dense directions for a weight whose codes stay as they are."""
    if not isinstance(trace, FactoredTrace):
        raise ValueError(
            f"{name} is encoded and its codes are fixed: train it with low-rank directions, or "
            "train its scales (quantised.scale_parameters)"
        )
