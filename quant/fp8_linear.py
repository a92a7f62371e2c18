"""Linear layers computed in FP8: E4M3 forward, E5M2 gradients, current scaling.

The recipe of FP8-LM (Peng et al., 2023) and COAT (Xi et al., 2024) for one layer: inputs and
weights are rounded to E4M3 with one scale a tensor, gradients to E5M2, and all three products
run on those.  What is kept for backward is the 8-bit input (half of bf16).  The scales are those
of the current values, not delayed ones.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .minifloat import E4M3, E5M2
from .scaled_matmul import Fp8Matrix, ScaledMatmul


@final
class Fp8Linear(nn.Linear):
    """``nn.Linear`` whose three products run in FP8; weight and bias stay in their own type.

    ``matmul`` says where: ``scaled_matmul_for(device)``, and its ``emulated`` says what that is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        matmul: ScaledMatmul,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.matmul = matmul

    def forward(self, input: Tensor) -> Tensor:
        """Return the output in the input's type."""
        out = fp8_product(input, self.weight, self.matmul)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8={'emulated' if self.matmul.emulated else 'device'}"


def fp8_product(x: Tensor, weight: Tensor, matmul: ScaledMatmul) -> Tensor:
    """Return x Wᵀ, x (..., in), W (out, in), through FP8 in both directions."""
    result: Tensor = _Fp8Product.apply(x, weight, matmul)
    return result


@final
class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, matmul: ScaledMatmul) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        x8 = Fp8Matrix.from_values(rows, E4M3, by_row=False)
        w8 = Fp8Matrix.from_values(weight, E4M3, by_row=False)
        ctx.save_for_backward(x8.codes, x8.scale, weight)
        ctx.matmul = matmul
        ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
        out = matmul.multiply(x8, w8, x.dtype, fast_accumulation=True)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, scale, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, weight.shape[0])
        g8 = Fp8Matrix.from_values(rows, E5M2, by_row=False)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            w8 = Fp8Matrix.from_values(weight, E4M3, by_row=False)
            turned = Fp8Matrix(w8.codes.t().contiguous(), w8.scale, E4M3)
            grad_x = ctx.matmul.multiply(g8, turned, ctx.input_dtype, fast_accumulation=False)
            grad_x = grad_x.view(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            g_turned = Fp8Matrix(g8.codes.t().contiguous(), g8.scale, E5M2)
            x_turned = Fp8Matrix(codes.t().contiguous(), scale, E4M3)
            grad_weight = ctx.matmul.multiply(
                g_turned, x_turned, weight.dtype, fast_accumulation=False
            )
        return grad_x, grad_weight, None
