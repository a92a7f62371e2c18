"""Zeroth order on a streamed model: updates are applied at the visit that needs them.

Weights reach the device as stored bytes.  At a chunk's visit, what the run has done to them since
is applied to the device slot (only the news while the chunk stays on the device).

* Without ``store`` nothing is ever written and the log is the whole checkpoint.  A fresh upload
  replays the run: its merges (low rank), or every dense step in one pass (about 2 ns an element
  and step on the host), so dense runs without a store are for chunks that fit a tier.
* With ``store`` a changed chunk is written back behind the computation, 2 bytes read and 2 written
  a parameter and dense step; low-rank directions write at merges only.  One commit a step; the
  last commit and the log rebuild the run after a crash at any instant.

All members of a step travel as one bigger batch: low-rank differences are added to activations,
dense members compute with scratch weights ``round(w + sign eps z)``, one after the other while
the chunk is there.  Tables (embeddings) are gathered from in host memory: only gathered rows are
perturbed.  Encoded weights are never written: their scales, if trained, live in host memory, and
low-rank differences beside them.

Same bits as ``ResidentWeights`` with the same selection.  Tables and scales change in host memory:
on another device give them integer-derived noise (``Kind.IRWIN_HALL``) for that.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
import xxhash
from torch import Tensor, nn

from ..offload.chunk import ChunkLayout
from ..offload.device_memory import DeviceSlot
from ..offload.embedding import Gather, StreamedEmbedding
from ..offload.errors import BudgetError, StoreError
from ..offload.layer import streamed_forward
from ..offload.runtime import Runtime
from ..offload.schedule import Phase
from ..offload.timeline import LaneName
from .adapter import Adapter
from .dense import DenseTrace
from .directions import Directions, Trace
from .estimate import Member
from .factored import FactoredTrace
from .held import HeldScales
from .history import History, perturb_rows
from .member_batch import run_members
from .perturb import StepUpdate
from .stored_run import StoredRun, StorePaths
from .streamed_select import select_streamed
from .weights import Weights, check_encoded, keep_closed

Forward = Callable[..., Any]


@final
class StreamedWeights(Weights):
    """Trained weights of a model whose layers are streamed by ``runtime``.

    ``runtime``: ``headrace.runtime_of(model)`` of a model from ``headrace.load(...,
    train="none")``.  ``select``: which parameters train, by default what a resident run trains.
    ``store``: a folder (or several, on several drives) for written weights, made if it is not
    there, else continued (with ``ZOStep.resume`` and its log).  ``write_every``: steps between
    writes of a chunk; what lies between is replayed at uploads.

    ::

        model = headrace.load("model-folder", train="none")
        weights = StreamedWeights(
            model, headrace.runtime_of(model), settings.directions, store="run1"
        )
        zo = ZOStep(model, settings, weights=weights, log="run1.log")
        zo.step_together(lambda model, members: causal_lm_losses(model, batch, members))

    Host memory: two fp32 factors a window and matrix until they are merged (low rank), about 100
    bytes a step (dense, without a store).  Device memory: for dense directions, scratch of one
    chunk's size, from the device budget.  Disk: two generations of the trained chunks.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        directions: Directions,
        *,
        select: Callable[[str, nn.Parameter], bool] | None = None,
        store: StorePaths | None = None,
        write_every: int = 1,
    ) -> None:
        if write_every < 1:
            raise ValueError(f"write_every must be at least 1, got {write_every}")
        self._runtime = runtime
        self._write_every = write_every
        self._selection = chosen = select_streamed(model, runtime, directions, select)
        self._chunks = chosen.by_chunk()
        self._modules = {n: m for n, m in model.named_modules() if n in self._chunks}
        self._written = {
            chunk: [name for name in names if name in chosen.written]
            for chunk, names in self._chunks.items()
        }
        self._traces: Mapping[str, Trace] = {}
        self._histories: dict[str, History] = {}
        self._adapters = {name: Adapter() for name in chosen.encoded}
        self._held = HeldScales(runtime, chosen.held)
        self._run: StoredRun | None = None
        self._position = 0
        self._at: dict[str, int] = {}
        self._fresh: dict[str, weakref.ref[Tensor]] = {}
        self._members: tuple[Member, ...] = ()
        self._seed = 0
        self._eps = 0.0
        self._scratch: DeviceSlot | None = None
        self._gathered: dict[str, Tensor] = {}
        self._undo = contextlib.ExitStack()
        if store is not None:
            self._open_store(model, store)
        runtime.closing.callback(self.close)

    def _open_store(self, model: nn.Module, paths: StorePaths) -> None:
        chunks = [chunk for chunk, names in self._written.items() if names]
        if not chunks:
            raise ValueError(
                "store= is for weights that are written, and this run writes none (encoded weights "
                "keep their codes); leave it out: the log is the checkpoint"
            )
        listed = {name: list(p.shape) for name, p in self.parameters.items()}
        text = json.dumps(listed, sort_keys=True).encode()
        identity = {
            "class": type(model).__name__,
            "zeroth order": xxhash.xxh3_128_hexdigest(text),
        }
        base = super().fingerprint
        self._run = StoredRun.open(self._runtime, chunks, paths, identity=identity, base=base)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._selection.parameters

    def fingerprint(self) -> str:
        return super().fingerprint() if self._run is None else self._run.base

    def adapter_of(self, name: str) -> Adapter | None:
        return self._adapters.get(name)

    def rows_of(self, name: str) -> Tensor | None:
        return self._gathered.get(name)

    def attach(self, traces: Mapping[str, Trace]) -> None:
        for name in self._adapters:
            check_encoded(name, traces[name])
        self._traces = traces
        self._histories = {name: History(traces[name]) for name in self._selection.written}
        self._check_scratch()
        for chunk in self._chunks:
            self._take_over(chunk)

    def _take_over(self, chunk: str) -> None:
        """Put the run's own forward in the place of the chunk's; ``close`` puts it back."""
        runtime = self._runtime
        embedding, head = runtime.embeddings.get(chunk), runtime.heads.get(chunk)
        if embedding is not None:
            self._replace(embedding.module, self._table_forward(chunk, embedding))
        if head is not None:
            kept = head.call
            self._undo.callback(setattr, head, "call", kept)
            head.call = self._visit_of(chunk, head.plain)
        if embedding is None and head is None:
            module = self._modules[chunk]
            positions = isinstance(module, nn.Embedding)
            kind = type(module)

            def plain(*args: Any, **kwargs: Any) -> Any:
                return kind.forward(module, *args, **kwargs)

            visited = self._visit_of(chunk, plain, positions=positions)

            def forward(*args: Any, **kwargs: Any) -> Any:
                return streamed_forward(runtime, chunk, module, visited, args, kwargs)

            self._replace(module, forward)

    def _replace(self, module: nn.Module, forward: Forward) -> None:
        self._undo.callback(setattr, module, "forward", module.forward)
        module.forward = forward  # type: ignore[method-assign]

    def close(self) -> None:
        self._undo.close()
        if self._scratch is not None:
            slot, self._scratch = self._scratch, None
            self._runtime.engine.device.release(slot)
        self._held.close()
        if self._run is not None:
            run, self._run = self._run, None
            run.close()

    # Steps

    def apply(self, name: str, updates: list[StepUpdate]) -> None:
        trace = self._traces[name]
        if self._run is not None and name == next(iter(self.parameters)):
            self._run.note(updates)
        if name in self._held:
            self._held.change(name, lambda master: trace.apply(master, updates))
        elif isinstance(trace, FactoredTrace):
            for update in updates:
                self._retire(name, update.step)
                trace.window(update.step).accumulate(update)
        else:
            after = self._stored_position(self._selection.chunk_of[name])
            self._histories[name].add_updates(updates, after=after)

    def settle(self, step: int) -> None:
        for name in self.parameters:
            self._retire(name, step)
        self._position = step
        if self._run is not None:
            self._run.settle(step)

    def _retire(self, name: str, step: int) -> None:
        trace = self._traces[name]
        if not isinstance(trace, FactoredTrace):
            return
        if (adapter := self._adapters.get(name)) is not None:
            keep_closed(adapter, trace, step)
            return
        retired = trace.retire(step)
        after = self._stored_position(self._selection.chunk_of[name])
        if retired is not None and trace.window_end > after:
            self._histories[name].add_merge(trace.window_end, *retired)

    def _stored_position(self, chunk: str) -> int:
        return 0 if self._run is None else self._run.position(chunk)

    # Weights outside of steps

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        runtime, selection = self._runtime, self._selection
        runtime.engine.begin("forward")
        for chunk, names in self._chunks.items():
            if any(name in selection.encoded for name in names):
                with runtime.resident(chunk, Phase.FORWARD):
                    for name in names:
                        if name in selection.encoded:
                            yield name, selection.encoded[name].decode()
            with runtime.engine.use_host(chunk, Phase.FORWARD) as views:
                for name in names:
                    if name in self._held:
                        yield name, self._held.master(name)
                    elif name in selection.written:
                        yield name, views[name]

    def finish(self, name: str, weight: Tensor) -> None:
        if name in self._selection.written:
            chunk = self._selection.chunk_of[name]
            self._histories[name].bring_up(weight, self._stored_position(chunk))
        elif (adapter := self._adapters.get(name)) is not None:
            adapter.merge_into(weight)
        self._traces[name].finish(weight)

    def merged(self) -> AbstractContextManager[None]:
        raise ValueError(
            "a streamed model never holds all of its weights; write ZOStep.export() to a folder, "
            "or replay the log onto the base"
        )

    # Visits

    @contextlib.contextmanager
    def evaluating(self, members: Sequence[Member], *, seed: int, eps: float) -> Iterator[None]:
        if len(members) > 1 and self._runtime.micro_batch is not None:
            raise ValueError(
                f"the model was loaded with micro_batch={self._runtime.micro_batch}, which would "
                f"split the {len(members)} members of a step; load it with micro_batch=None"
            )
        if self._run is not None and self._position < self._run.opened_at:
            raise StoreError(
                f"the store holds {self._run.opened_at} steps, this run stands at "
                f"{self._position}: continue it with ZOStep.resume and its log, or give a new "
                "folder"
            )
        self._members, self._seed, self._eps = tuple(members), seed, eps
        try:
            yield
        finally:
            self._members = ()

    def _visit_of(self, chunk: str, plain: Forward, *, positions: bool = False) -> Forward:
        """``plain`` inside the chunk's device visit, with current weights, for all members.

        ``positions``: a table whose indices may be one row for every sequence.
        """
        names = self._chunks[chunk]
        dense = [name for name in names if isinstance(self._traces[name], DenseTrace)]

        def visited(*args: Any, **kwargs: Any) -> Any:
            self._bring_up(chunk)
            if not dense or not any(member.sign for member in self._members):
                return plain(*args, **kwargs)
            current = self._runtime.current
            assert current is not None, "a streamed layer runs inside a forward pass"
            return run_members(
                lambda member: self._perturbed(chunk, dense, member),
                self._members,
                plain,
                args,
                kwargs,
                current=current,
                label=chunk,
                same_rows=positions,
            )

        return visited

    def _bring_up(self, chunk: str) -> None:
        """Make the chunk's device bytes current, and write them back if they changed enough."""
        engine, run = self._runtime.engine, self._run
        views = engine.chunks[chunk].device_views
        first = next(iter(views.values()))
        known = self._fresh.get(chunk)
        if known is None or known() is not first:  # the slot was filled from stored bytes again
            self._at[chunk] = self._stored_position(chunk)
            self._fresh[chunk] = weakref.ref(first)
            self._held.forget(chunk)
        self._held.refresh(chunk, views)
        at = self._at[chunk]
        behind = [n for n in self._written[chunk] if self._histories[n].pending(at)]
        if not behind:
            return
        change: AbstractContextManager[None] = contextlib.nullcontext()
        if run is not None:
            run.settled(engine.chunks[chunk])
            if self._due(chunk):
                change = run.saving(engine.chunks[chunk], self._position)
        with change:
            for name in behind:
                self._histories[name].bring_up(views[name], at)
        self._at[chunk] = self._position
        self._forget_saved(chunk)

    def _due(self, chunk: str) -> bool:
        """Whether enough steps of the chunk wait to be written; merges are written at once."""
        written = self._written[chunk]
        if any(isinstance(self._traces[name], FactoredTrace) for name in written):
            return True
        return self._position - self._stored_position(chunk) >= self._write_every

    def _forget_saved(self, chunk: str) -> None:
        if self._run is not None:
            for name in self._written[chunk]:
                self._histories[name].forget(self._run.position(chunk))

    # Scratch of dense members

    def _scratch_layout(self, chunk: str) -> ChunkLayout:
        dense = (n for n in self._chunks[chunk] if isinstance(self._traces[n], DenseTrace))
        return self._runtime.engine.chunks[chunk].layout.restricted_to(frozenset(dense))

    def _scratch_bytes(self) -> int:
        """Scratch for the largest chunk that dense members compute with on the device."""
        chunks = self._runtime.engine.chunks
        layouts = [self._scratch_layout(n) for n in self._chunks if not chunks[n].gathered]
        return max((layout.nbytes for layout in layouts if layout.slots), default=0)

    def _check_scratch(self) -> None:
        needed = self._scratch_bytes()
        chunks = self._runtime.engine.chunks.values()
        largest = max((c.layout.nbytes for c in chunks if not c.gathered), default=0)
        limit = self._runtime.device_budget.limit_bytes
        if needed and needed + largest > limit:
            raise BudgetError(
                f"dense directions need {needed:,} bytes of scratch on DEVICE beside the largest "
                f"chunk of {largest:,}, but the budget is {limit:,}. Raise device_budget, or use "
                "low-rank directions, which need none."
            )

    @contextlib.contextmanager
    def _perturbed(self, chunk: str, names: Sequence[str], member: Member) -> Iterator[None]:
        """The chunk's parameters hold a member's weights."""
        if not member.sign:
            yield
            return
        if self._scratch is None:
            self._scratch = self._runtime.engine.acquire_device(
                "zeroth-order scratch", self._scratch_bytes()
            )
        views = self._scratch_layout(chunk).views(self._scratch.buffer)
        bound = self._runtime.bound[chunk].parameters
        stored = {name: bound[name].data for name in names}
        try:
            for name, weight in stored.items():
                trace = self._traces[name]
                assert isinstance(trace, DenseTrace)
                trace.perturb(views[name], weight, member, seed=self._seed, eps=self._eps)
                bound[name].data = views[name]
            yield
        finally:
            for name, weight in stored.items():
                bound[name].data = weight

    # Tables in host memory

    def _table_forward(self, chunk: str, embedding: StreamedEmbedding) -> Forward:
        name = embedding.slot
        engine, device = self._runtime.engine, self._runtime.device

        def forward(ids: Tensor) -> Tensor:
            gather = Gather(ids, device)
            with engine.use_host(chunk, Phase.FORWARD) as views:
                self._bring_up_host(chunk, name, views[name])
                table = views[name][gather.unique]
            history, trace = self._histories[name], self._traces[name]
            history.bring_up(table, self._stored_position(chunk), gather.unique)
            span = self._runtime.timeline.span(LaneName.COMPUTE, f"forward {chunk}")
            with torch.no_grad(), span:
                if isinstance(trace, DenseTrace) and any(m.sign for m in self._members):
                    return torch.cat(
                        [
                            embedding.run(gather, part, self._rows(trace, table, gather, m))
                            for m, part in zip(
                                self._members, _split(gather.inverse, self._members), strict=True
                            )
                        ]
                    )
                self._gathered[name] = gather.unique
                try:
                    return embedding.run(gather, gather.inverse, table.to(device))
                finally:
                    del self._gathered[name]

        return forward

    def _rows(self, trace: DenseTrace, table: Tensor, gather: Gather, member: Member) -> Tensor:
        rows = perturb_rows(trace, table, gather.unique, member, seed=self._seed, eps=self._eps)
        return rows.to(self._runtime.device)

    def _bring_up_host(self, chunk: str, name: str, table: Tensor) -> None:
        """Write a table back that no device visit of its chunk does."""
        run, engine = self._run, self._runtime.engine
        position = self._stored_position(chunk)
        behind = self._histories[name].pending(position)
        if run is None or chunk in self._runtime.heads or not behind or not self._due(chunk):
            return
        change = run.saving(engine.chunks[chunk], self._position, on_host=True)
        with change, self._runtime.timeline.span(LaneName.COMPUTE, f"update {chunk}"):
            self._histories[name].bring_up(table, position)
        self._forget_saved(chunk)


def _split(indices: Tensor, members: Sequence[Member]) -> Sequence[Tensor]:
    if indices.shape[0] % len(members):
        raise ValueError(
            f"a batch of {indices.shape[0]} sequences does not split into {len(members)} members"
        )
    return indices.split(indices.shape[0] // len(members))
