"""Zeroth order on a streamed model: the base stays read-only, updates are applied at the visit.

Weights reach the device as the base's bytes.  At a chunk's visit, what the run has done to them so
far is applied to the device slot once for each upload (and only the news while the chunk stays on
the device), so nothing is ever written to disk and the log is the whole checkpoint.

* Low-rank directions: closed windows are merged into the slot; the open window and the members'
  differences are added to activations.  One upload serves the whole population.
* Dense directions: all members travel as one bigger batch; for each, the module runs with scratch
  weights ``round(w + sign eps z)``.  A fresh upload replays every past step in one pass (about 2 ns
  an element and step on the host): meant for chunks that fit a tier, or for short runs.

Same bits as ``ResidentWeights`` with the same selection.  Assumes a model opened with
``headrace.load(..., train="none")``; trains parameters of streamed layers, not the embedding,
the head, nor other gathered tables.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..offload.layer import Call, Outputs, streamed_forward
from ..offload.runtime import Runtime
from ..offload.schedule import Phase
from .dense import DenseTrace
from .directions import Directions, Trace
from .estimate import Member
from .factored import Factored, FactoredTrace, merge
from .perturb import StepUpdate
from .select import matrices_of
from .weights import Weights

Forward = Callable[..., Any]


@final
class _History:
    """What has been done to one parameter and must be done again to fresh bytes of it."""

    def __init__(self) -> None:
        self.updates: list[StepUpdate] = []
        self.merges: list[tuple[Tensor, Tensor]] = []

    def bring_up(self, weight: Tensor, trace: Trace, done: tuple[int, int]) -> tuple[int, int]:
        """Apply what came after ``done`` to ``weight``; returns the new ``done``."""
        for left, right in self.merges[done[1] :]:
            merge(weight, left, right)
        if isinstance(trace, DenseTrace):
            trace.apply(weight, self.updates[done[0] :])
        return len(self.updates), len(self.merges)


@final
class StreamedWeights(Weights):
    """Trained weights of a model whose layers are streamed by ``runtime``.

    Host memory: the factors of closed windows, fp32 ``(p + d) * k`` numbers a window and matrix
    (low rank), or 50 bytes a step (dense).  Device memory beyond the plan's: one chunk of scratch
    (dense only).
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        directions: Directions,
        *,
        select: Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        self._runtime = runtime
        self._modules = {
            name: module
            for name, module in model.named_modules()
            # Tables and the head have streamed forms of their own, which gather or tile.
            if name in runtime.bound and not isinstance(module, (nn.Embedding, nn.Linear))
        }
        self._parameters: dict[str, nn.Parameter] = {}
        self._chunk_of: dict[str, str] = {}
        usable = matrices_of(model) if isinstance(directions, Factored) else None
        for chunk in self._modules:
            for name, parameter in runtime.bound[chunk].parameters.items():
                if usable is not None and id(parameter) not in usable:
                    continue
                if not directions.accepts(tuple(parameter.shape)):
                    continue
                if select is None or select(name, parameter):
                    self._parameters[name] = parameter
                    self._chunk_of[name] = chunk
        if not self._parameters:
            raise ValueError(
                f"{type(model).__name__} has no streamed layer with parameters that "
                f"{type(directions).__name__} can train: check `select`"
            )
        self._traces: Mapping[str, Trace] = {}
        self._histories = {name: _History() for name in self._parameters}
        self._done: dict[str, tuple[int, int]] = {}
        self._fresh: dict[str, weakref.ref[Tensor]] = {}
        self._members: tuple[Member, ...] = ()
        self._seed = 0
        self._eps = 0.0
        self._replaced: dict[str, Forward] = {}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._parameters

    def attach(self, traces: Mapping[str, Trace]) -> None:
        self._traces = traces
        for chunk in dict.fromkeys(self._chunk_of.values()):
            module = self._modules[chunk]
            self._replaced[chunk] = module.forward
            module.forward = self._forward_of(chunk, module)  # type: ignore[method-assign]

    def close(self) -> None:
        for chunk, forward in self._replaced.items():
            self._modules[chunk].forward = forward  # type: ignore[method-assign]
        self._replaced.clear()

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        self._runtime.engine.begin("forward")
        for chunk in dict.fromkeys(self._chunk_of.values()):
            with self._runtime.engine.use_host(chunk, Phase.FORWARD) as views:
                for name, owner in self._chunk_of.items():
                    if owner == chunk:
                        yield name, views[name]

    @contextlib.contextmanager
    def evaluating(self, members: Sequence[Member], *, seed: int, eps: float) -> Iterator[None]:
        if len(members) > 1 and self._runtime.micro_batch is not None:
            raise ValueError(
                f"the model was loaded with micro_batch={self._runtime.micro_batch}, which would "
                f"split the {len(members)} members of a step; load it with micro_batch=None"
            )
        self._members, self._seed, self._eps = tuple(members), seed, eps
        try:
            yield
        finally:
            self._members = ()

    def apply(self, name: str, updates: list[StepUpdate]) -> None:
        history, trace = self._histories[name], self._traces[name]
        if not isinstance(trace, FactoredTrace):
            history.updates.extend(updates)
            return
        for update in updates:
            self._retire(name, update.step)
            trace.window(update.step).accumulate(update)

    def settle(self, step: int) -> None:
        for name in self._parameters:
            self._retire(name, step)

    def finish(self, name: str, weight: Tensor) -> None:
        self._histories[name].bring_up(weight, self._traces[name], (0, 0))
        self._traces[name].finish(weight)

    def merged(self) -> AbstractContextManager[None]:
        raise ValueError(
            "a streamed model never holds all of its weights; write ZOStep.export() to a folder, "
            "or replay the log onto the base"
        )

    def _retire(self, name: str, step: int) -> None:
        trace = self._traces[name]
        if isinstance(trace, FactoredTrace):
            retired = trace.retire(step)
            if retired is not None:
                self._histories[name].merges.append(retired)

    def _forward_of(self, chunk: str, module: nn.Module) -> Forward:
        kind = type(module)
        names = [name for name, owner in self._chunk_of.items() if owner == chunk]

        def plain(*args: Any, **kwargs: Any) -> Any:
            return kind.forward(module, *args, **kwargs)

        def visited(*args: Any, **kwargs: Any) -> Any:
            self._bring_up(chunk, names)
            if isinstance(self._traces[names[0]], DenseTrace) and self._members:
                return self._run_members(chunk, names, plain, args, kwargs)
            return plain(*args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return streamed_forward(self._runtime, chunk, module, visited, args, kwargs)

        return forward

    def _bring_up(self, chunk: str, names: Sequence[str]) -> None:
        """Make the chunk's device bytes current; inside its visit."""
        views = self._runtime.engine.chunks[chunk].device_views
        for name in names:
            view = views[name]
            known = self._fresh.get(name)
            if known is None or known() is not view:  # the slot was filled from the base again
                self._done[name] = (0, 0)
                self._fresh[name] = weakref.ref(view)
            history = self._histories[name]
            self._done[name] = history.bring_up(view, self._traces[name], self._done[name])

    def _run_members(
        self,
        chunk: str,
        names: Sequence[str],
        plain: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module once a member, each on its part of the batch, with scratch weights."""
        current = self._runtime.current
        assert current is not None, "a streamed layer runs inside a forward pass"
        each, rest = divmod(current.batch_size, len(self._members))
        if rest:
            raise ValueError(
                f"a batch of {current.batch_size} sequences does not split into "
                f"{len(self._members)} members"
            )
        leaves, spec = tree_flatten((args, kwargs))
        slices = tuple(slice(m * each, (m + 1) * each) for m in range(len(self._members)))
        if len(slices) == 1:
            slices = (slice(0, 1),)
        call = Call(
            plain, chunk, tuple(leaves), spec, (), slices, current.batch_size, current.masks
        )
        outputs = Outputs(chunk)
        stored = {name: self._parameters[name].data for name in names}
        scratch = {name: torch.empty_like(weight) for name, weight in stored.items()}
        try:
            for member, part in zip(self._members, slices, strict=True):
                for name in names:
                    trace = self._traces[name]
                    assert isinstance(trace, DenseTrace)
                    trace.perturb(
                        scratch[name], stored[name], member, seed=self._seed, eps=self._eps
                    )
                    self._parameters[name].data = scratch[name]
                outputs.add(call.run(part, ()))
        finally:
            for name, weight in stored.items():
                self._parameters[name].data = weight
        return outputs.rebuild(outputs.join())
