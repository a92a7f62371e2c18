"""The head's weight as one tensor, for code that multiplies by it instead of calling the head.

Fused losses (TRL's, among others) replace a model's forward, take the hidden states of its
backbone and read ``get_output_embeddings().weight``.  ``gathered_head`` gives them the real
weight, copied to the device for as long as their graph lives, with a gradient that goes where
the chunk's gradient goes.

Guarantees: the bits that the weight would give as a resident parameter, with one micro-batch.
Cost: the weight on the device once more, and as much again for its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .embedding import tied_rows_hook
from .loss import StreamedHead
from .schedule import Phase
from .timeline import LaneName


@final
@dataclass(frozen=True)
class GatheredHead:
    """What stands for the head while foreign code runs: its weight and bias, and its call."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        return nn.functional.linear(hidden, self.weight, self.bias)


def gathered_head(head: StreamedHead) -> GatheredHead:
    """Copy the head's parameters to the device, under autograd if they are trained."""
    runtime, chunk = head.runtime, head.chunk
    module = head.module
    nbytes = sum(p.numel() * p.element_size() for p in module.parameters())
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    runtime.workspace.reserve(
        nbytes * (2 if trained else 1),
        f"the weight of {chunk!r}, which a replaced forward reads as one tensor,",
    )
    head.uses += 1
    names = {id(p): n for n, p in runtime.bound[chunk].parameters.items()}
    slots = {leaf: names[id(p)] for leaf, p in module.named_parameters(recurse=False)}
    if trained:
        tensors = _Gather.apply(head, tuple(slots.values()), runtime.anchor)
    else:
        tensors = _copies(head, tuple(slots.values()))
    by_leaf = dict(zip(slots, tensors, strict=True))
    return GatheredHead(by_leaf["weight"], by_leaf.get("bias"))


@torch.no_grad()
def _copies(head: StreamedHead, slots: tuple[str, ...]) -> tuple[Tensor, ...]:
    runtime, chunk = head.runtime, head.chunk
    with runtime.resident(chunk, Phase.FORWARD):
        with runtime.timeline.span(LaneName.COMPUTE, f"gather {chunk}"):
            return tuple(runtime.bound[chunk].parameters[s].detach().clone() for s in slots)


@final
class _Gather(torch.autograd.Function):
    """forward: copies of the parameters.  backward: their gradients into the chunk's own."""

    @staticmethod
    def forward(
        ctx: Any, head: StreamedHead, slots: tuple[str, ...], anchor: Tensor
    ) -> tuple[Tensor, ...]:
        runtime = head.runtime
        ctx.set_materialize_grads(False)
        ctx.head, ctx.slots = head, slots
        if runtime.gradients is not None:
            runtime.gradients.expect(head.chunk)
        ctx.tied = head.embedding.tied if head.embedding is not None else None
        return _copies(head, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # type: ignore[override]
        head: StreamedHead = ctx.head
        runtime, chunk = head.runtime, head.chunk
        with runtime.collecting(chunk):
            parameters = runtime.bound[chunk].parameters
            pairs = [
                (parameters[slot], gradient)
                for slot, gradient in zip(ctx.slots, gradients, strict=True)
                if gradient is not None and parameters[slot].requires_grad
            ]
            if pairs:
                torch.autograd.backward([p for p, _ in pairs], [g for _, g in pairs])
            after = tied_rows_hook(head.embedding, ctx.tied)
            if after is not None:
                after(runtime.gradient_views(chunk))
        return None, None, None
