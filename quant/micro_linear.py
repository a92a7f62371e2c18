"""Linear layers in MXFP8, MXFP4 or NVFP4, emulated: for studying a recipe, not for speed.

All operands of all three products are encoded along the axis that the product sums over, as the
hardware of those formats wants it (so each of input, weight and gradient is encoded twice), and
the decoded values are multiplied in fp32.  No device of this library's tests has such units, so
there is no other product; ``emulated`` says so, in the layer's text too.

Rouhani et al., 2023 (MX); NVIDIA, 2025, "Recipes for Pre-training LLMs with MXFP8".
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .blocks import RowCodec
from .rounding import CounterGenerator


@final
class MicroscaledLinear(nn.Linear):
    """``nn.Linear`` whose operands are rounded to small blocks along each product's sum.

    ``codec``: of inputs and weights, such as ``Mxfp8Codec()``, ``Mxfp4Codec()``, ``Nvfp4Codec()``.
    ``gradient_codec``: of gradients (None: the same).  ``seed`` rounds gradients stochastically
    (4-bit gradients need it); give another for each step.  Parameters stay in their own type.

    >>> from .mxfp8 import Mxfp8Codec
    >>> MicroscaledLinear(32, 8, codec=Mxfp8Codec()).emulated
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        codec: RowCodec,
        gradient_codec: RowCodec | None = None,
        seed: int | None = None,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.codec, self.gradient_codec = codec, gradient_codec or codec
        self.seed = seed

    @property
    def emulated(self) -> bool:
        """Whether the arithmetic units of the device are *not* used: always."""
        return True

    def forward(self, input: Tensor) -> Tensor:
        """Return the output in the input's type."""
        out: Tensor = _MicroProduct.apply(
            input, self.weight, self.codec, self.gradient_codec, self.seed
        )
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.codec.name}=emulated"


def rounded_rows(x: Tensor, codec: RowCodec, generator: CounterGenerator | None = None) -> Tensor:
    """Return the fp32 values that a matrix has after encoding along its last axis."""
    return codec.decode(codec.encode(x.contiguous(), generator=generator), tuple(x.shape))


@final
class _MicroProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        codec: RowCodec,
        gradient_codec: RowCodec,
        seed: int | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        ctx.codec, ctx.gradient_codec, ctx.seed, ctx.shape = codec, gradient_codec, seed, x.shape
        out = rounded_rows(rows, codec) @ rounded_rows(weight, codec).t()
        return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        along = None if ctx.seed is None else CounterGenerator(2 * ctx.seed)
        across = None if ctx.seed is None else CounterGenerator(2 * ctx.seed + 1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = rounded_rows(weight.t(), ctx.codec)
            grad_x = rounded_rows(grad, ctx.gradient_codec, along) @ turned.t()
            grad_x = grad_x.to(rows.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            turned = rounded_rows(rows.t(), ctx.codec)
            grad_weight = rounded_rows(grad.t(), ctx.gradient_codec, across) @ turned.t()
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None, None, None
