"""What autograd keeps for backward, kept smaller: encoded activations, projected inputs.

* ``EncodedSaved``: inside the context, floating tensors that autograd saves are kept encoded
  (COAT keeps the inputs of non-linear layers in E4M3 with a scale per 16 values) and decoded
  when backward asks.  Gradients become those of the decoded activations: approximate.
* ``compact_linear``: keeps x P instead of x for the weight gradient, P a random sign matrix made
  again from a seed (CompAct, Shamshoum et al., 2024).  The input gradient is exact; the weight
  gradient (gᵀ x P) Pᵀ is unbiased, since E[P Pᵀ] = 1.  Differs from the paper in the signs instead
  of Gaussian entries, which are the same bits on every device.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .codec import Codec
from .fp8 import Fp8Codec
from .rounding import CounterGenerator

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


@final
class EncodedSaved:
    """Context manager: saved activations are kept in a codec's parts.

    Parameters, tensors of fewer than ``smallest`` elements, integers, and wrapper subclasses are
    kept as they are.  (Copies of weights that autocast makes are not known for such: keep weights
    in the type they compute in.)  Cost with the default codec: 8 + 2 bits an element.

    >>> x = torch.ones(64, requires_grad=True)
    >>> with EncodedSaved(smallest=64):
    ...     y = (x * 3).square().sum()
    >>> y.backward()
    >>> x.grad[0]
    tensor(18.)
    """

    def __init__(self, codec: Codec | None = None, *, smallest: int = 4096) -> None:
        self._codec = codec or Fp8Codec(granularity="group", block_size=16)
        self._smallest = smallest
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.encoded_bytes = 0
        self.original_bytes = 0

    def __enter__(self) -> EncodedSaved:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Any:
        # A layer saves a transposed view of its weight: look at what the view is of.
        owner = tensor if tensor._base is None else tensor._base
        weight = isinstance(owner, nn.Parameter) or (owner.is_leaf and owner.requires_grad)
        plain = type(tensor) is Tensor and not weight
        if not plain or tensor.dtype not in _FLOATS or tensor.numel() < self._smallest:
            return tensor
        shape = tuple(tensor.shape)
        self.encoded_bytes += self._codec.nbytes(shape)
        self.original_bytes += tensor.numel() * tensor.element_size()
        return self._codec.encode(tensor), shape, tensor.dtype

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        parts, shape, dtype = packed
        return self._codec.decode(parts, shape, dtype)


def sign_projection(
    rows: int, rank: int, seed: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return P (rows, rank) with entries ±1/sqrt(rank), a pure function of the seed.

    >>> device = torch.device("cpu")
    >>> p = sign_projection(4, 9, 1, device=device, dtype=torch.float32)
    >>> p.abs().unique()
    tensor([0.3333])
    """
    bits = CounterGenerator(seed).bits(0, rows * rank, device=device)
    signs = ((bits >> 31) * 2 - 1).to(dtype)
    return (signs * rank**-0.5).view(rows, rank)


def compact_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, rank: int, seed: int
) -> Tensor:
    """Return x Wᵀ + b while keeping only x P (..., rank) for the weight's gradient.

    x (..., in), W (out, in).  Use another seed for each layer and, now and then, each step.
    """
    if not 1 <= rank <= x.shape[-1]:
        raise ValueError(f"rank {rank} is outside 1 .. {x.shape[-1]}, the inputs' width")
    out: Tensor = _CompactProduct.apply(x, weight, rank, seed)
    return out if bias is None else out + bias


@final
class CompactLinear(nn.Linear):
    """``nn.Linear`` that keeps its input projected to ``rank`` columns for backward."""

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, seed: int, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.rank = rank
        self.seed = seed

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, exact."""
        return compact_linear(input, self.weight, self.bias, rank=self.rank, seed=self.seed)


@final
class _CompactProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rank: int, seed: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        projection = sign_projection(x.shape[-1], rank, seed, device=x.device, dtype=x.dtype)
        ctx.save_for_backward(rows @ projection, weight)
        ctx.rank, ctx.seed, ctx.input_shape = rank, seed, x.shape
        return nn.functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        projected, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).view(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            projection = sign_projection(
                weight.shape[1], ctx.rank, ctx.seed, device=grad.device, dtype=grad.dtype
            )
            grad_weight = (grad.t() @ projected) @ projection.t()
        return grad_x, grad_weight, None, None
