"""Copies of single streamed modules: in memory, with real weights, and no longer streamed.

PEFT's ``modules_to_save`` deep-copies a module (a classifier's head, say) and trains the copy.
A plain deep copy of a streamed module would copy its placeholder, and call the original.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from headrace.offload.runtime import Runtime
from headrace.offload.schedule import Phase

from .pretrained import begin_reading
from .structure import ModuleChunk

_OURS = frozenset({"forward", "__deepcopy__"})


def make_copyable(runtime: Runtime, chunks: Sequence[ModuleChunk]) -> None:
    """Let ``copy.deepcopy`` of each chunk's modules give modules in memory."""
    for chunk in chunks:
        for module in chunk.modules:
            module.__deepcopy__ = partial(_in_memory, runtime, chunk.name, module)  # type: ignore[assignment]


def _in_memory(runtime: Runtime, chunk: str, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    own = {id(parameter) for parameter in module.parameters()}
    begin_reading(runtime)
    with runtime.engine.use_host(chunk, Phase.FORWARD) as views:
        for slot, parameter in runtime.bound[chunk].parameters.items():
            if id(parameter) in own:
                memo[id(parameter)] = nn.Parameter(
                    views[slot].to(runtime.device, copy=True),
                    requires_grad=parameter.requires_grad,
                )
    made = type(module).__new__(type(module))
    memo[id(module)] = made
    for name, value in module.__dict__.items():
        if name not in _OURS:
            made.__dict__[name] = copy.deepcopy(value, memo)
    return made
