"""The head and the loss, tiled over tokens, so that logits of the whole batch never exist.

While a model's forward pass has labels, its head returns ``LazyLogits``: a tensor that remembers
the hidden states and the pointwise operations applied to them (a soft cap, a scale, a cast).
When the model hands it to its loss function, each micro-batch is cut into tiles of tokens, and
head, pointwise operations and the model's own loss function run tile by tile, in forward and
again, with a graph, in backward (arXiv:2410.10989 and ALST do the same for fixed losses).

Guarantees: with one tile per micro-batch, the bits of the untiled computation; with several, the
head's weight gradient sums tiles in order.  Anything else done to ``LazyLogits`` computes the
real logits, with a warning that says what they cost.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .embedding import StreamedEmbedding, tied_rows_hook
from .errors import UnsupportedModelError
from .layer import RandomState, streamed_forward
from .runtime import Runtime
from .schedule import Phase
from .stand_in import METADATA
from .timeline import LaneName
from .workspace import LOGIT_BYTES

LossFunction = Callable[..., Tensor]
Pointwise = Callable[[Tensor], Tensor]

_POINTWISE = frozenset(
    {
        Tensor.__truediv__,
        Tensor.__mul__,
        Tensor.__rmul__,
        Tensor.div,
        Tensor.mul,
        Tensor.tanh,
        Tensor.float,
        Tensor.to,
        Tensor.contiguous,
        torch.div,
        torch.mul,
        torch.tanh,
    }
)


class MaterializedLogitsWarning(UserWarning):
    """The logits of the whole batch were computed because something read them."""


@final
class LazyLogits(Tensor):
    """Logits that have not been computed: hidden states plus pointwise operations."""

    _head: StreamedHead
    _hidden: Tensor
    _operations: tuple[Pointwise, ...]

    @staticmethod
    def make(head: StreamedHead, hidden: Tensor, vocabulary: int, dtype: torch.dtype) -> LazyLogits:
        """Logits of ``hidden`` (batch, tokens, width), not computed yet."""
        lazy = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, (*hidden.shape[:-1], vocabulary), dtype=dtype, device=hidden.device
        )
        lazy._head, lazy._hidden, lazy._operations = head, hidden, ()
        return lazy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def parts(self) -> tuple[StreamedHead, Tensor, tuple[Pointwise, ...]]:
        """The head, the hidden states, and the operations to apply to a tile's logits."""
        return self._head, self._hidden, self._operations

    def materialize(self) -> Tensor:
        """Compute the logits of the whole batch."""
        nbytes = self.numel() * self.element_size()
        warnings.warn(
            f"the logits of the whole batch {tuple(self.shape)} were read, so {nbytes:,} bytes "
            f"of them were computed outside the device budget. Pass labels= and read only the "
            f"loss, or run without labels under torch.no_grad() on fewer tokens.",
            MaterializedLogitsWarning,
            stacklevel=4,
        )
        logits = self._head.logits(self._hidden)
        for operation in self._operations:
            logits = operation(logits)
        return logits

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Below __torch_function__: reached by code that disables it, with no bytes to give it.
        real = [a.materialize() if isinstance(a, LazyLogits) else a for a in args]
        return func(*real, **(kwargs or {}))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        others = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)]
        if func in _POINTWISE and args and isinstance(args[0], LazyLogits) and not others:
            lazy, rest = args[0], args[1:]

            def operation(logits: Tensor) -> Tensor:
                return func(logits, *rest, **kwargs)

            probe = operation(torch.empty((), dtype=lazy.dtype))
            after = LazyLogits.make(lazy._head, lazy._hidden, lazy.shape[-1], probe.dtype)
            after._operations = (*lazy._operations, operation)
            return after
        if func is Tensor.detach and isinstance(args[0], LazyLogits):
            lazy = args[0]
            after = LazyLogits.make(lazy._head, lazy._hidden.detach(), lazy.shape[-1], lazy.dtype)
            after._operations = lazy._operations
            return after
        if func is Tensor.__getitem__ and _selects_everything(args[1]):
            return args[0]
        real = [a.materialize() if isinstance(a, LazyLogits) else a for a in args]
        real_kwargs = {
            k: v.materialize() if isinstance(v, LazyLogits) else v for k, v in kwargs.items()
        }
        return func(*real, **real_kwargs)


def _selects_everything(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is Ellipsis or p == slice(None) for p in parts)


@final
@dataclass(frozen=True)
class LossTile:
    """A run of tokens of one micro-batch: where its hidden states and labels are."""

    micro_batch: int
    rows: slice
    tokens: slice | None  # None: all tokens of the micro-batch, in their own shape


@final
class StreamedHead:
    """The output head as a chunk: lazy where a loss follows, plain everywhere else."""

    def __init__(
        self,
        runtime: Runtime,
        chunk: str,
        module: nn.Module,
        *,
        vocabulary: int,
        tile_bytes: int,
        embedding: StreamedEmbedding | None,
    ) -> None:
        """``tile_bytes`` bounds a tile's logits and their kin; ``embedding``: whose table it is."""
        self.runtime, self.chunk, self.module = runtime, chunk, module
        self._kind = type(module)
        self._vocabulary = vocabulary
        self._tile_tokens = max(tile_bytes // (LOGIT_BYTES * vocabulary), 1)
        self.embedding = embedding
        self.loss_expected = False
        self.uses = 0  # how often the weight was asked for, by a call or gathered
        # What turns hidden states (batch, tokens, width) or (tokens, width) into logits, with
        # the chunk on the device.
        self.call: Callable[[Tensor], Tensor] = self.plain
        module.forward = self._forward  # type: ignore[method-assign]
        runtime.heads[chunk] = self

    def plain(self, hidden: Tensor) -> Tensor:
        """The module's own forward."""
        return self._kind.forward(self.module, hidden)

    def _forward(self, hidden: Tensor) -> Tensor:
        self.uses += 1
        if self.loss_expected and hidden.dim() == 3:
            parameter = next(self.module.parameters())
            dtype = parameter.dtype
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
            return LazyLogits.make(self, hidden, self._vocabulary, dtype)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The real logits, through the chunk."""
        return streamed_forward(self.runtime, self.chunk, self.module, self.call, (hidden,), {})

    def tiles(self, hidden: Tensor) -> Iterator[LossTile]:
        """Tiles of ``hidden`` (batch, tokens, width): micro-batch after micro-batch."""
        current = self.runtime.current
        slices = current.slices() if current is not None else [slice(0, hidden.shape[0])]
        for index, rows in enumerate(slices):
            tokens = (rows.stop - rows.start) * hidden.shape[1]
            if tokens <= self._tile_tokens:
                yield LossTile(index, rows, None)
                continue
            for start in range(0, tokens, self._tile_tokens):
                yield LossTile(index, rows, slice(start, min(start + self._tile_tokens, tokens)))

    def _reserve(self, tiles: Sequence[LossTile], hidden: Tensor) -> None:
        """Hold the working memory of one tile and of the head's own gradient."""
        tokens = max(
            (t.rows.stop - t.rows.start) * hidden.shape[1]
            if t.tokens is None
            else t.tokens.stop - t.tokens.start
            for t in tiles
        )
        weight = max(p.numel() * p.element_size() for p in self.module.parameters())
        self.runtime.workspace.reserve(
            tokens * self._vocabulary * LOGIT_BYTES
            + weight
            + 4 * hidden.numel() * hidden.element_size(),
            f"the loss of {tokens:,} tokens at a time over a vocabulary of {self._vocabulary:,}",
        )
        self.runtime.workspace.expect_no_more()

    def loss(
        self, lazy: LazyLogits, labels: Tensor | None, loss_function: LossFunction, extra: dict
    ) -> Tensor:
        """The model's own loss of lazy logits, tile by tile."""
        _, hidden, operations = lazy.parts()
        tiles = tuple(self.tiles(hidden))
        self._reserve(tiles, hidden)
        if len(tiles) > 1:
            labels, extra = _shifted(labels, loss_function, extra)
        work = _LossWork(self, tiles, operations, labels, loss_function, extra, lazy.shape[-1])
        grad = torch.is_grad_enabled()
        if grad and (hidden.requires_grad or self.runtime.trains(self.chunk)):
            return _TiledLoss.apply(work, self.runtime.anchor, hidden)
        return work.forward(hidden)


def _shifted(
    labels: Tensor | None, loss_function: LossFunction, extra: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Any]]:
    """Shift the labels once for the whole batch and count them, as the loss would."""
    accepted = inspect.signature(loss_function).parameters
    needed = {"shift_labels", "num_items_in_batch", "ignore_index"}
    if not needed <= accepted.keys():
        raise UnsupportedModelError(
            f"the loss function {getattr(loss_function, '__name__', loss_function)!r} does not "
            f"take shift_labels, num_items_in_batch and ignore_index, so it cannot be summed "
            f"over tiles. Use one micro-batch that fits one tile, or ForCausalLMLoss."
        )
    extra = dict(extra)
    shift_labels = extra.pop("shift_labels", None)
    ignore_index = extra.get("ignore_index", accepted["ignore_index"].default)
    if shift_labels is None:
        assert labels is not None
        padded = nn.functional.pad(labels, (0, 1), value=ignore_index)
        shift_labels = padded[..., 1:].contiguous()
    if extra.get("num_items_in_batch") is None:
        extra["num_items_in_batch"] = (shift_labels != ignore_index).sum()
    return shift_labels, extra


@final
class _LossWork:
    """One loss evaluation: what every tile needs."""

    def __init__(
        self,
        head: StreamedHead,
        tiles: Sequence[LossTile],
        operations: Sequence[Pointwise],
        labels: Tensor | None,
        loss_function: LossFunction,
        extra: dict[str, Any],
        vocabulary: int,
    ) -> None:
        self.head, self.tiles, self.operations = head, tiles, operations
        self.labels, self.loss_function, self.extra = labels, loss_function, extra
        self.vocabulary = vocabulary

    def hidden_tile(self, tile: LossTile, hidden: Tensor) -> Tensor:
        """The tile's hidden states: (sequences, tokens, width), or (tokens, width) of a part."""
        rows = hidden[tile.rows]
        return rows if tile.tokens is None else rows.reshape(-1, hidden.shape[-1])[tile.tokens]

    def loss_tile(self, tile: LossTile, hidden: Tensor) -> Tensor:
        """The tile's share of the loss."""
        logits = self.head.call(hidden)
        for operation in self.operations:
            logits = operation(logits)
        if len(self.tiles) == 1:
            return self.loss_function(
                logits=logits, labels=self.labels, vocab_size=self.vocabulary, **self.extra
            )
        assert self.labels is not None
        labels = self.labels[tile.rows]
        if tile.tokens is not None:
            labels = labels.reshape(-1)[tile.tokens]
        return self.loss_function(
            logits=logits,
            labels=None,
            vocab_size=self.vocabulary,
            shift_labels=labels.to(logits.device),
            **self.extra,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """The forward visit: the summed loss, without a graph."""
        runtime, chunk = self.head.runtime, self.head.chunk
        total: Tensor | None = None
        with runtime.resident(chunk, Phase.FORWARD), torch.no_grad():
            for micro_batch in sorted({t.micro_batch for t in self.tiles}):
                # Summed per micro-batch first: what a loop over micro-batches would add up.
                share: Tensor | None = None
                for tile in (t for t in self.tiles if t.micro_batch == micro_batch):
                    runtime.engine.pump()
                    with runtime.timeline.span(LaneName.COMPUTE, f"forward {chunk}"):
                        loss = self.loss_tile(tile, self.hidden_tile(tile, hidden))
                    share = loss if share is None else share + loss
                assert share is not None
                total = share if total is None else total + share
        assert total is not None
        return total


@final
class _TiledLoss(torch.autograd.Function):
    """forward: the loss without a graph.  backward: each tile again, with one."""

    @staticmethod
    def forward(ctx: Any, work: _LossWork, anchor: Tensor, hidden: Tensor) -> Tensor:
        runtime, chunk = work.head.runtime, work.head.chunk
        ctx.work = work
        ctx.random = RandomState(runtime.device)
        if runtime.gradients is not None and runtime.trains(chunk):
            runtime.gradients.expect(chunk)
        embedding = work.head.embedding
        ctx.tied = embedding.tied if embedding is not None else None
        loss = work.forward(hidden)
        ctx.parked = runtime.parking.park(hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        work: _LossWork = ctx.work
        runtime, chunk = work.head.runtime, work.head.chunk
        runtime.backward_runs()
        hidden: Tensor = ctx.parked.fetch()
        wanted = ctx.needs_input_grad[2]
        result = torch.empty_like(hidden) if wanted else None
        with (
            runtime.resident(chunk, Phase.BACKWARD),
            runtime.collecting(chunk),
            ctx.random.restored(),
        ):
            after = tied_rows_hook(work.head.embedding, ctx.tied)
            for number, tile in enumerate(work.tiles):
                runtime.engine.pump()
                with runtime.timeline.span(LaneName.COMPUTE, f"backward {chunk}"):
                    part = work.hidden_tile(tile, hidden).detach().requires_grad_(wanted)
                    with torch.enable_grad():
                        loss = work.loss_tile(tile, part)
                    torch.autograd.backward([loss], [gradient.to(loss.dtype)])
                    if result is not None:
                        _put(result, tile, part.grad)
                    del loss, part
                last = number + 1 == len(work.tiles)
                if after is not None and (
                    last or work.tiles[number + 1].micro_batch != tile.micro_batch
                ):
                    after(runtime.gradient_views(chunk))
        return None, None, result


def _put(result: Tensor, tile: LossTile, gradient: Tensor | None) -> None:
    """Store a tile's hidden-state gradient."""
    rows = result[tile.rows]
    target = rows if tile.tokens is None else rows.view(-1, result.shape[-1])[tile.tokens]
    if gradient is None:
        target.zero_()
    else:
        target.copy_(gradient)
