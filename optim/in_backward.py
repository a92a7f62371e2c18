"""Updating parameters inside backward, so that one gradient exists at a time.

Each parameter is updated by its hook as soon as its gradient is complete, and the gradient is
freed.  What needs all gradients at once cannot work then, and is refused instead of being lost:

* global-norm clipping (``max_grad_norm``): refused when the mode is switched on;
* gradient accumulation: a second gradient before ``optimizer.step()`` is refused;
* skipping a whole step: inf or NaN in a gradient raises, since others may be updated already.

Clipping done by somebody else between backward and ``step`` (the Trainer's ``max_grad_norm``)
finds no gradients; set it to 0 there.  Loss scaling (``GradScaler``) is not supported.
"""

from __future__ import annotations

from types import TracebackType
from typing import final

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .torch_api import RuleOptimizer


@final
class StepInBackward:
    """Context: while it is open, ``backward`` updates the optimizer's parameters.

    ``optimizer.step()`` still ends every step (schedulers count it).  States, param groups and
    checkpoints stay the optimizer's own.

    >>> from headrace.optim import adamw
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = adamw(model)
    >>> with StepInBackward(optimizer):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> model.weight.grad is None, int(optimizer.state[model.weight]["step"])
    (True, 1)
    """

    def __init__(self, optimizer: RuleOptimizer) -> None:
        if optimizer.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={optimizer.max_grad_norm} needs all gradients at once, but they "
                f"are freed one by one inside backward; build the optimizer without it, or call "
                f"step() after backward as usual"
            )
        if optimizer.has_hosts:
            raise ValueError(
                "the model streams its parameters and updates them itself; choose when with "
                "update='backward' where it is loaded"
            )
        self._optimizer = optimizer
        self._done: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> StepInBackward:
        for parameter in self._optimizer.parameters():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._update))
        self._handles.append(self._optimizer.register_step_post_hook(self._end_step))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._done.clear()

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter), "hooks sit on parameters only"
        name = self._optimizer.param_name(parameter)
        if id(parameter) in self._done:
            raise ValueError(
                f"parameter {name!r} got a second gradient before optimizer.step(): gradients "
                f"cannot be accumulated while backward updates the weights; use a larger "
                f"micro-batch, or step after backward"
            )
        if not self._optimizer.update_parameter(parameter):
            raise ValueError(
                f"the gradient of {name!r} holds inf or NaN, and parameters before it in backward "
                f"are updated already: the step cannot be skipped whole. Resume from a "
                f"checkpoint, or step after backward, where such steps are skipped"
            )
        self._done.add(id(parameter))
        parameter.grad = None

    def _end_step(self, *_: object) -> None:
        self._done.clear()
