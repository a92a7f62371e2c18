"""How an optimizer meets parameters that live elsewhere and are updated there.

A module may be a ``ParameterHost``: it keeps (some of) its parameters outside the device and
updates them tile by tile with the optimizer's own rules.  The optimizer then only waits for it.
Both sides are structural protocols: a host needs no import of this package.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .spec import Shape, StateSpec


class UpdateRule(Protocol):
    """One optimizer's arithmetic on one parameter, or on a range of its elements.

    Ranges of an ``elementwise`` rule start and end at multiples of ``granule`` elements, except
    that the last range of a parameter may be shorter; the states of a range are the matching
    ranges of the flattened states.  Other rules get whole parameters in their own shape.

    >>> from headrace.optim import UpdateRule
    >>> [n for n in ("elementwise", "granule", "state_spec", "update") if n in vars(UpdateRule)]
    ['elementwise', 'granule', 'state_spec', 'update']
    """

    @property
    def elementwise(self) -> bool:
        """Whether ranges of a parameter may be updated apart from each other."""
        ...

    @property
    def granule(self) -> int:
        """Ranges start and end at multiples of this many elements."""
        ...

    def state_spec(self, shape: Shape, dtype: torch.dtype) -> StateSpec:
        """Return name -> spec of the states of a parameter or range of this shape."""
        ...

    def init_states(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fill freshly zeroed states in place from the initial weight."""
        ...

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        states: Mapping[str, Tensor],
        *,
        step: int,
        hyper: Mapping[str, Any],
        seed: int,
        element_offset: int,
    ) -> None:
        """Do one step in place on contiguous tensors; ``step`` counts from 1."""
        ...


class StreamedUpdates(Protocol):
    """What a host gives an optimizer: the barrier of its streamed updates.

    >>> from headrace.optim import StreamedUpdates
    >>> sorted(name for name in vars(StreamedUpdates) if not name.startswith("_"))
    ['finish_step', 'load_state_dict', 'owns', 'state_dict']
    """

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether the host updates this parameter itself."""
        ...

    def finish_step(self) -> bool:
        """End the host's part of the step; False if the step was skipped (inf or NaN).

        Where a global norm is asked for (``max_grad_norm``), the host computes it over its own
        gradients and ``optimizer.resident_gradients()``, and scales the latter with
        ``optimizer.scale_resident_gradients(coefficient)`` before it returns.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return small state (step counters and the like): tensors, numbers, strings only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        ...


class ParameterHost(Protocol):
    """An ``nn.Module`` whose parameters live elsewhere and are updated there.

    >>> import headrace
    >>> from headrace.optim import ParameterHost, adamw
    >>> model = headrace.load("model-folder", train="all", store="host", device="cpu")
    >>> host: ParameterHost = model
    >>> optimizer = adamw(model)  # calls host.bind_optimizer(optimizer)
    >>> model.close()
    """

    def bind_optimizer(self, optimizer: Any) -> StreamedUpdates:
        """Take the optimizer whose rules the host will run; called once by its constructor."""
        ...


def parameter_hosts(model: nn.Module) -> list[ParameterHost]:
    """Return the hosts among a model's modules, wrappers (PEFT's and others) seen through.

    The look-up is static, because wrappers forward unknown attributes to the model inside and
    would otherwise answer for it a second time.
    """
    return [
        cast(ParameterHost, module)
        for module in model.modules()
        if inspect.getattr_static(module, "bind_optimizer", None) is not None
    ]
