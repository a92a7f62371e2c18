"""The streamed embedding: rows are gathered in host memory; the table never goes to the device.

A batch touches few rows of a large table.  The forward visit gathers the distinct rows on the
host and sends only them to the device, where the module runs unchanged on a compact table with
renumbered indices.  The backward visit makes the gradient of those rows on the device and adds
it to the chunk's gradient in host memory.

Guarantees the bits of the whole-table computation: each row's gradient sums the same tokens in
the same order.  Where the table is tied to the head, a row's gradient must be summed as
((head + embedding of micro-batch 0) + (head + embedding of micro-batch 1)) + ...; ``TiedRows``
keeps the head's share of the gathered rows apart per micro-batch until then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .runtime import Runtime
from .schedule import Phase
from .timeline import LaneName


@final
class TiedRows:
    """The head's gradient of the gathered rows, one tensor per micro-batch, in host memory."""

    def __init__(self, unique: Tensor) -> None:
        self.unique = unique  # (U,) int64, on the host
        self.parts: list[Tensor] = []  # (U, hidden) each

    def set_apart(self, gradient: Tensor) -> None:
        """Move the rows' share of ``gradient`` (V, hidden) here, leaving zeros behind."""
        index = self.unique.to(gradient.device)
        self.parts.append(gradient[index].cpu())
        gradient[index] = 0


@final
class Gather:
    """One look-up: the indices renumbered into the distinct rows of the batch."""

    def __init__(self, ids: Tensor, device: torch.device) -> None:
        unique, inverse = torch.unique(ids.detach().cpu(), return_inverse=True)
        self.unique = unique
        self.inverse = inverse.to(device)

    def padding(self, padding_idx: int | None) -> int | None:
        """The padding row's number in the compact table, if the batch has it."""
        if padding_idx is None:
            return None
        found = (self.unique == padding_idx).nonzero()
        return int(found[0, 0]) if found.numel() else None


@final
class StreamedEmbedding:
    """Runs one ``nn.Embedding`` whose table is a chunk (alone, or tied to the head)."""

    def __init__(self, runtime: Runtime, chunk: str, slot: str, module: nn.Embedding) -> None:
        if module.max_norm is not None or module.sparse:
            raise UnsupportedModelError(
                f"embedding {slot!r} uses max_norm or sparse gradients, which cannot be gathered "
                f"row by row. Set max_norm=None and sparse=False."
            )
        self.runtime, self.chunk, self.slot, self.module = runtime, chunk, slot, module
        self._kind = type(module)
        self.tied: TiedRows | None = None  # of the forward pass under way
        module.forward = self._forward  # type: ignore[method-assign,assignment]
        runtime.embeddings[chunk] = self

    def _forward(self, ids: Tensor) -> Tensor:
        runtime = self.runtime
        gather = Gather(ids, runtime.device)
        if torch.is_grad_enabled() and self.module.weight.requires_grad:
            if runtime.gradients is not None:
                runtime.gradients.expect(self.chunk)
            return _GatherCall.apply(self, gather, runtime.anchor)
        return self.look_up(gather)

    def look_up(self, gather: Gather) -> Tensor:
        """The forward visit: gather on the host, run the module on the compact table."""
        runtime = self.runtime
        with runtime.engine.use_host(self.chunk, Phase.FORWARD) as views:
            rows = views[self.slot][gather.unique].to(runtime.device)
        with torch.no_grad(), runtime.timeline.span(LaneName.COMPUTE, f"forward {self.chunk}"):
            return self.run(gather, gather.inverse, rows)

    def run(self, gather: Gather, indices: Tensor, rows: Tensor) -> Tensor:
        """The module's own forward on a compact table: ``rows`` are the batch's distinct rows."""
        module, padding_idx = self.module, self.module.padding_idx
        bound = self.runtime.bound[self.chunk]
        module.weight.data = rows
        module.padding_idx = gather.padding(padding_idx)  # type: ignore[assignment]
        try:
            return self._kind.forward(module, indices)
        finally:
            module.padding_idx = padding_idx
            if not torch.is_grad_enabled():
                bound.unbind()

    def row_gradient(self, gather: Gather, part: slice, gradient: Tensor) -> Tensor:
        """(U, hidden) gradient of the gathered rows from one micro-batch, on the host."""
        weight = self.module.weight
        # An embedding is linear in its table: its gradient does not depend on the values.
        rows = torch.zeros(
            (len(gather.unique), weight.shape[1]), dtype=weight.dtype, device=gradient.device
        )
        weight.grad = None  # a handle of an earlier backward pass of this step
        try:
            with torch.enable_grad():
                output = self.run(gather, gather.inverse[part], rows)
            torch.autograd.backward([output], [gradient])
            assert weight.grad is not None
            return weight.grad.cpu()
        finally:
            weight.grad = None
            self.runtime.bound[self.chunk].unbind()


@final
class _GatherCall(torch.autograd.Function):
    """forward: look the rows up.  backward: add the rows' gradient up in host memory."""

    @staticmethod
    def forward(ctx: Any, embedding: StreamedEmbedding, gather: Gather, anchor: Tensor) -> Tensor:
        ctx.embedding, ctx.gather = embedding, gather
        runtime = embedding.runtime
        current = runtime.current
        ctx.slices = current.slices() if current is not None else [slice(None)]
        gradients = runtime.gradients
        # Added to something else, a sum's order matters: to other micro-batches or passes.
        adds_up = gradients is not None and gradients.has_begun(embedding.chunk)
        ctx.tied = TiedRows(gather.unique) if len(ctx.slices) > 1 or adds_up else None
        embedding.tied = ctx.tied
        return embedding.look_up(gather)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        embedding: StreamedEmbedding = ctx.embedding
        gather: Gather = ctx.gather
        runtime = embedding.runtime
        if runtime.gradients is None:
            raise ValueError(
                f"embedding {embedding.slot!r} is trainable but no optimizer is bound to the "
                f"model. Make one first, e.g. headrace.optim.adamw(model, lr=1e-5)."
            )
        head_parts = ctx.tied.parts if ctx.tied is not None else []
        with runtime.gradients.on_host(embedding.chunk) as views:
            table = views[embedding.slot]
            total: Tensor | None = None
            for index, part in enumerate(ctx.slices):
                with runtime.timeline.span(LaneName.COMPUTE, f"backward {embedding.chunk}"):
                    rows = embedding.row_gradient(gather, part, gradient[part])
                if head_parts:
                    rows = head_parts[index] + rows
                total = rows if total is None else total.add_(rows)
            assert total is not None
            table.index_add_(0, gather.unique, total)
        return None, None, None


AfterMicroBatch = Callable[[dict[str, Tensor]], None]


def tied_rows_hook(
    embedding: StreamedEmbedding | None, tied: TiedRows | None
) -> AfterMicroBatch | None:
    """What the head calls after each micro-batch's backward, if its table is gathered too."""
    if embedding is None or tied is None:
        return None

    def after(views: dict[str, Tensor]) -> None:
        tied.set_apart(views[embedding.slot])

    return after
