"""The other half of INT8 weights: after each step of an optimizer, its coordinates become weight.

Before a step the optimizer's moments follow the bases that backward changed; after it every
``Int8Linear`` lifts its coordinates into its weight and rounds.  All state is in the modules and
the optimizer: ``model.state_dict()`` and ``optimizer.state_dict()`` resume to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import distributed, nn

from ..quant.rounding import CounterGenerator
from .arithmetic import fp32
from .brick_rule import BrickRule
from .fused_rule import FusedRule
from .int8_weights import Int8Linear
from .seeds import fold_in
from .torch_api import RuleOptimizer

#: Keeps the noise of a weight apart from that of its coordinates.
_WEIGHT_NOISE = 1


@final
class Int8Updates:
    """Turn an optimizer's steps on coordinates into steps of INT8 weights; ``close()`` ends it.

    Any recipe of single elements drives it: ``adamw_8bit`` makes it Q-GaLore.  ``lr`` and
    ``weight_decay`` are those of the coordinates' param group; noise comes from the optimizer's
    seed, the layer's name, the step and the element.  A step that the optimizer skips leaves the
    weights alone.

    >>> from headrace.optim import adamw_8bit
    >>> from headrace.optim.int8_weights import Int8Settings, attach_int8
    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> names = attach_int8(model, Int8Settings(rank=8))
    >>> optimizer = adamw_8bit(model, lr=1e-2)
    >>> updates = Int8Updates(model, optimizer)
    >>> model(torch.ones(1, 64)).square().sum().backward()
    >>> optimizer.step()
    >>> int(model[0].steps), bool(model[0].coordinates.any())
    (1, False)
    >>> updates.close()
    """

    def __init__(self, model: nn.Module, optimizer: RuleOptimizer) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
        if not self._layers:
            raise ValueError("the model has no INT8 layers; call attach_int8(model) first")
        if distributed.is_available() and distributed.is_initialized():
            ranks = distributed.get_world_size()
            if ranks > 1:
                raise ValueError(
                    f"{ranks} ranks would each choose a basis from their own gradients, and "
                    f"averages over different bases mean nothing: INT8 weights train in one "
                    f"process. Use q_galore(model) with DistributedDataParallel"
                )
        self._rules = [_rule(optimizer, layer) for layer in self._layers]
        #: Steps that the optimizer had done when this one began, by layer.
        self._before = [0] * len(self._layers)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        """Let the optimizer run as before."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Any, *_: Any) -> None:
        for i, (layer, rule) in enumerate(zip(self._layers, self._rules, strict=True)):
            parameter = layer.coordinates
            if parameter.grad is None and bool(parameter.any()):
                raise ValueError(
                    f"{optimizer.param_name(parameter)!r} was updated before optimizer.step(), "
                    f"inside backward: its moments may not have followed the basis. Let step() "
                    f"update INT8 layers; their gradients are small already"
                )
            states = optimizer.state.get(parameter, {})
            self._before[i] = _steps(states)
            change = layer.pending_change()
            if change is None:
                continue
            if states:
                own = {name: value for name, value in states.items() if name != "step"}
                rule.rotate(
                    own, tuple(parameter.shape), change, step=self._before[i] + 1,
                    hyper=optimizer.hyper_for(parameter), seed=optimizer.noise_seed(parameter),
                )  # fmt: skip
            layer.moments_follow()

    @torch.no_grad()
    def _after_step(self, optimizer: Any, *_: Any) -> None:
        for layer, before in zip(self._layers, self._before, strict=True):
            parameter = layer.coordinates
            step = _steps(optimizer.state.get(parameter, {}))
            if step == before:
                continue  # no gradient, or the step was skipped
            hyper = optimizer.hyper_for(parameter)
            decay = fp32(1.0 - float(hyper["lr"]) * float(hyper["weight_decay"]))
            seed = fold_in(optimizer.noise_seed(parameter), step)
            layer.take_step(decay, CounterGenerator(fold_in(seed, _WEIGHT_NOISE)))


def _steps(states: Mapping[str, Any]) -> int:
    return int(states["step"]) if states else 0


def _rule(optimizer: RuleOptimizer, layer: Int8Linear) -> FusedRule | BrickRule:
    rule = optimizer.rule_for(layer.coordinates)
    name = optimizer.param_name(layer.coordinates)
    if not isinstance(rule, FusedRule | BrickRule):
        raise ValueError(
            f"{name!r} is updated by {type(rule).__name__}, whose moments cannot follow a change "
            f"of basis; use a recipe such as adamw_8bit(model)"
        )
    if not rule.elementwise:
        raise ValueError(
            f"the recipe looks beyond single elements of {name!r}, which are projected already; "
            f"use one that does not, such as adamw_8bit(model)"
        )
    return rule
