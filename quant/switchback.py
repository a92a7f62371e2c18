"""SwitchBack: the two large products of a linear layer in INT8, the weight gradient in its type.

Wortsman et al., 2023, "Stable and low-precision training for large-scale vision-language models".
Forward: rows of x in INT8 times the weight in INT8 with one scale; input gradient: rows of the
gradient in INT8 times the same weight; weight gradient, where noise hurts: 16-bit operands.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .scales import block_amax, divide, poison, to_codes

_LEVELS = 127.0


@final
class SwitchBackLinear(nn.Linear):
    """``nn.Linear`` with INT8 products; weight and bias stay in their own type.

    Integer accumulation is exact, so results do not depend on the order of sums.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the output in the input's type."""
        out = switchback_product(input, self.weight)
        return out if self.bias is None else out + self.bias


def switchback_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x Wᵀ, x (..., in), W (out, in), by INT8 products in forward and input gradient."""
    result: Tensor = _SwitchBack.apply(x, weight)
    return result


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to INT8 with a scale a row: codes (m, k), scales (m,) fp32."""
    values = x.detach().to(torch.float32)
    scale = block_amax(values) / _LEVELS
    return to_codes(divide(values, scale).round()).clamp(-127, 127).to(torch.int8), scale


def int8_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to INT8 with one scale: codes (m, k), scale () fp32."""
    values = x.detach().to(torch.float32)
    amax = values.abs().amax() if values.numel() else values.new_zeros(())
    scale = poison(amax) / _LEVELS
    codes = to_codes(divide(values, scale.expand(values.shape[0])).round())
    return codes.clamp(-127, 127).to(torch.int8), scale


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a bᵀ in exact int32, a (m, k) and b (n, k) int8.

    Pads to the shapes that the device's integer units take (m > 16, k and n multiples of 8).
    """
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    short_m, short_k, short_n = max(17 - m, 0), -k % 8, -n % 8
    a = nn.functional.pad(a, (0, short_k, 0, short_m))
    b = nn.functional.pad(b, (0, short_k, 0, short_n))
    return torch._int_mm(a, b.t())[:m, :n]


@final
class _SwitchBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        x8, x_scale = int8_rows(rows)
        w8, w_scale = int8_tensor(weight)
        ctx.save_for_backward(rows, weight)
        ctx.input_shape = x.shape
        out = int8_product(x8, w8).to(torch.float32) * (x_scale[:, None] * w_scale)
        return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            g8, g_scale = int8_rows(grad)
            w8, w_scale = int8_tensor(weight)
            product = int8_product(g8, w8.t().contiguous()).to(torch.float32)
            grad_x = (product * (g_scale[:, None] * w_scale)).to(rows.dtype).view(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ rows
        return grad_x, grad_weight
