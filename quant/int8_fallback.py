"""INT8 in square blocks with fallback: blocks that hold outliers get a second INT8 product.

Zhang et al., 2025, "Accurate INT8 Training Through Dynamic Block-Level Fallback".  Both operands
are cut into square blocks with a scale each.  An outlier of the activations costs its block most
of its resolution, so a block whose largest magnitude exceeds a threshold is rounded a second time:
its rounding error, 254 times smaller, is multiplied too, which makes it nearly INT16.  The
threshold follows the activations so that the share of such blocks stays in a band.

Differs from the paper: the weight gradient is computed in the inputs' own type (as SwitchBack
does), and gradients have no fallback.
"""

from __future__ import annotations

from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .scales import poison, to_codes
from .switchback import int8_product

_LEVELS: Final = 127.0
_RESIDUAL: Final = 254.0  # half a step is 1 / 254 of a block's magnitude
_STEP: Final = 1.25  # by which the threshold moves


@final
class BlockInt8:
    """A matrix in INT8 blocks: ``codes`` (m, k), ``scale`` (m / block, k / block), and, where
    ``fallback`` (blocks, bool) says so, ``residual`` (m, k), 254 times finer."""

    __slots__ = ("block", "codes", "fallback", "residual", "scale")

    def __init__(self, x: Tensor, block: int, threshold: float | None = None) -> None:
        values = x.detach().to(torch.float32)
        self.block = block
        amax = _block_amax(values, block)
        self.scale = poison(amax) / _LEVELS
        wide = _wide(self.scale, values.shape, block)
        safe = torch.where(wide == 0, torch.ones_like(wide), wide)
        rounded = (values / safe).round().clamp(-_LEVELS, _LEVELS)
        self.codes = to_codes(rounded).to(torch.int8)
        self.fallback = torch.zeros_like(amax, dtype=torch.bool)
        self.residual: Tensor | None = None
        if threshold is not None:
            self.fallback = amax > threshold
            if bool(self.fallback.any()):
                rest = (values - rounded * safe) / safe * _RESIDUAL
                kept = torch.where(_wide(self.fallback, values.shape, block), rest, 0.0)
                self.residual = to_codes(kept.round().clamp(-_LEVELS, _LEVELS)).to(torch.int8)

    def decode(self) -> Tensor:
        """Return the fp32 values."""
        wide = _wide(self.scale, self.codes.shape, self.block)
        values = self.codes.to(torch.float32) * wide
        if self.residual is not None:
            values += self.residual.to(torch.float32) * (wide / _RESIDUAL)
        return values


def block_product(a: BlockInt8, b: BlockInt8) -> Tensor:
    """Return a bᵀ (m, n) in fp32, a (m, k) and b (n, k); integer sums within blocks are exact."""
    assert a.block == b.block, "operands are cut alike"
    m, k, n = a.codes.shape[0], a.codes.shape[1], b.codes.shape[0]
    out = torch.zeros(m, n, dtype=torch.float32, device=a.codes.device)
    rows = torch.arange(m, device=out.device) // a.block
    cols = torch.arange(n, device=out.device) // a.block
    for place, start in enumerate(range(0, k, a.block)):
        cut = slice(start, min(start + a.block, k))
        factor = a.scale[rows, place, None] * b.scale[cols, place]
        out += int8_product(a.codes[:, cut], b.codes[:, cut]).to(torch.float32) * factor
        chosen = a.fallback[rows, place]
        if a.residual is not None and bool(chosen.any()):
            fine = int8_product(a.residual[chosen, cut], b.codes[:, cut]).to(torch.float32)
            out[chosen] += fine * (factor[chosen] / _RESIDUAL)
    return out


@final
class FallbackLinear(nn.Linear):
    """``nn.Linear`` with block INT8 products and fallback; parameters stay in their own type.

    ``low`` and ``high`` bound the share of an input's blocks that fall back: after each training
    forward the threshold (a buffer, saved with the layer) moves by a quarter if the share was
    outside.  Runs on any device with INT8 matrix products.
    """

    threshold: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block: int = 128,
        low: float = 0.05,
        high: float = 0.2,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if block < 1 or not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                f"block {block} must be positive, and 0 <= low <= high <= 1, got {low} and {high}"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.block, self.low, self.high = block, low, high
        self.register_buffer("threshold", torch.tensor(1.0, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """Return the output in the input's type."""
        rows = input.reshape(-1, self.in_features)
        encoded = BlockInt8(rows, self.block, float(self.threshold))
        if self.training and encoded.fallback.numel():
            share = float(encoded.fallback.float().mean())
            if share > self.high:
                self.threshold *= _STEP
            elif share < self.low:
                self.threshold /= _STEP
        result: Tensor = _FallbackProduct.apply(rows, self.weight, encoded)
        out = result.view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8 blocks of {self.block}"


def _block_amax(values: Tensor, block: int) -> Tensor:
    """Return the largest magnitudes (m / block, k / block) of fp32 (m, k); edges are short."""
    m, k = values.shape
    padded = nn.functional.pad(values.abs(), (0, -k % block, 0, -m % block))
    return padded.view(-(-m // block), block, -(-k // block), block).amax(dim=(1, 3))


def _wide(numbers: Tensor, shape: torch.Size, block: int) -> Tensor:
    tall = numbers.repeat_interleave(block, dim=0)[: shape[0]]
    return tall.repeat_interleave(block, dim=1)[:, : shape[1]]


@final
class _FallbackProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, encoded: BlockInt8) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.block = encoded.block
        return block_product(encoded, BlockInt8(weight, encoded.block)).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0]
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = BlockInt8(weight.t(), ctx.block)
            grad_rows = block_product(BlockInt8(grad, ctx.block), turned).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ rows
        return grad_rows, grad_weight, None
