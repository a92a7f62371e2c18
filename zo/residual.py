"""A residual stream in fp32 over 16-bit weights: what a finite difference of losses needs.

With everything in bfloat16 the hidden states are rounded after every layer, and the difference of
two nearby losses drowns in it.  Here activations are fp32 from the embedding on; only the inputs
of matrix products with weights are rounded to the weights' dtype, so products run as fast as
before.  Activations take twice the memory; attention computes in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_NARROW = (torch.bfloat16, torch.float16)


@final
class Fp32Residual(TorchFunctionMode):
    """Inside it, 16-bit models compute with fp32 activations; fp32 models as they always do.

    Knows ``embedding``, ``linear``, ``addmm`` (GPT-2's Conv1D), ``layer_norm`` and ``rms_norm``;
    another operation that mixes the two dtypes and does not promote raises torch's own error.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func is functional.embedding:
            output = func(*args, **named)
            return output.float() if output.dtype in _NARROW else output
        if func is functional.linear:
            return _linear(*args, **named)
        if func is torch.addmm:
            return _addmm(*args, **named)
        if func is functional.layer_norm or func is functional.rms_norm:
            wide = args[0].dtype is torch.float32
            args = (args[0], *(_widened(value, wide) for value in args[1:]))
            named = {name: _widened(value, wide) for name, value in named.items()}
        return func(*args, **named)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.dtype is torch.float32 and weight.dtype in _NARROW:
        return functional.linear(input.to(weight.dtype), weight, bias).float()
    return functional.linear(input, weight, bias)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor:
    if mat1.dtype is torch.float32 and mat2.dtype in _NARROW:
        return torch.addmm(input, mat1.to(mat2.dtype), mat2, **scales).float()
    return torch.addmm(input, mat1, mat2, **scales)


def _widened(value: Any, wide: bool) -> Any:
    return value.float() if wide and isinstance(value, Tensor) and value.dtype in _NARROW else value
