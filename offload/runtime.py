"""What the streamed modules of one model share: engine, gradients, updates, parked activations.

A ``Runtime`` also knows the forward pass under way: how many sequences the batch has and how it
splits into micro-batches.  It owns the files, lanes and slabs of the run and closes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor, nn

from .activation import Parking
from .budget import Budget, BudgetStatistics, Tier
from .engine import Engine
from .gradient import DeviceGradient, Gradients
from .masks import CausalMasks
from .schedule import Phase, Schedule
from .store import Store
from .timeline import LaneName, LaneStatistics, Timeline
from .update import Updates
from .workspace import Workspace

if TYPE_CHECKING:
    from .embedding import StreamedEmbedding
    from .loss import StreamedHead


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """One training step: its length and what each lane did in it."""

    seconds: float
    lanes: dict[LaneName, LaneStatistics]


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of a run: steps, memory against budgets, lanes, stalls (seconds by reason)."""

    steps: int
    skipped_steps: int
    budgets: dict[Tier, BudgetStatistics]
    lanes: dict[LaneName, LaneStatistics]
    last_step: StepStatistics | None
    stalls: dict[str, float]


def placeholder(like: Tensor, device: torch.device) -> Tensor:
    """One element expanded to the shape of ``like``: NaN, or all bits set in an integer.

    Codes with all bits set, under a NaN scale, decode to NaN in every format.
    """
    value: float = float("nan")
    if not like.is_floating_point():
        limits = torch.iinfo(like.dtype)
        value = limits.max if limits.min == 0 else -1
    return torch.full((), value, dtype=like.dtype, device=device).expand(like.shape)


@final
class BoundParameters:
    """The parameters of one chunk: placeholders outside a visit, device views inside.

    The placeholder is one NaN expanded to the parameter's shape: it keeps shape, dtype and
    device, costs one element, and turns any accidental use into NaN.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], device: torch.device) -> None:
        self.parameters = parameters
        self._placeholders = {n: placeholder(p, device) for n, p in parameters.items()}
        self.unbind()

    def bind(self, views: dict[str, Tensor]) -> None:
        """Make the parameters read the chunk's bytes."""
        for name, parameter in self.parameters.items():
            parameter.data = views[name]

    def unbind(self) -> None:
        """Take the bytes away again."""
        for name, parameter in self.parameters.items():
            parameter.data = self._placeholders[name]


class Tap(Protocol):
    """Carries what a model records inside its layers out of the streamed call."""

    def keys(self) -> tuple[str, ...]:
        """What is to be recorded in the pass under way; empty: nothing."""
        ...

    def inside(self, keys: tuple[str, ...]) -> AbstractContextManager[dict[str, list[Any]]]:
        """Record into lists of one's own while a layer runs."""
        ...

    def deliver(self, found: dict[str, list[Any]]) -> None:
        """Hand a layer's recordings, joined over micro-batches, to the model."""
        ...


@dataclass(slots=True)
class Pass:
    """The forward pass under way: sequences in the batch, sequences in a micro-batch."""

    batch_size: int
    micro_batch: int
    masks: CausalMasks = field(default_factory=CausalMasks)

    def slices(self) -> list[slice]:
        """The micro-batches as slices of the batch axis; the last may be smaller."""
        step = max(self.micro_batch, 1)
        return [
            slice(start, min(start + step, self.batch_size))
            for start in range(0, self.batch_size, step)
        ]


@final
@dataclass
class Runtime:
    """Everything that streams one model."""

    engine: Engine
    host_budget: Budget
    device_budget: Budget
    timeline: Timeline
    parking: Parking
    bound: dict[str, BoundParameters]
    device: torch.device
    micro_batch: int | None
    workspace: Workspace
    closing: ExitStack
    store: Store | None = None
    gradients: Gradients | None = None
    updates: Updates | None = None
    tap: Tap | None = None
    # What a visit of a chunk over encoded weights decodes at once, beyond its own bytes.
    decoding_bytes: dict[str, int] = field(default_factory=dict)
    # Tables and heads by chunk (a tied chunk has both); they enter themselves.
    embeddings: dict[str, StreamedEmbedding] = field(default_factory=dict)
    heads: dict[str, StreamedHead] = field(default_factory=dict)
    current: Pass | None = None
    # Called once at the end of every backward pass through the model.
    after_backward: Callable[[], None] | None = None
    _after_backward_due: bool = False
    _anchor: Tensor | None = None
    _step_started: float | None = None
    _step_history: list[tuple[float, float]] = field(default_factory=list)

    @property
    def anchor(self) -> Tensor:
        """An empty tensor that requires grad: makes autograd visit a node with no other reason."""
        if self._anchor is None:
            self._anchor = torch.empty(0, device=self.device, requires_grad=True)
        return self._anchor

    def training_schedule(
        self,
        names: list[str],
        updated: frozenset[str],
        update: str,
        *,
        gathered: frozenset[str] | None = None,
    ) -> None:
        """Expect visits in this order; the first laps correct it where the model differs."""
        if gathered is None:
            gathered = frozenset(n for n, c in self.engine.chunks.items() if c.gathered)
        self.engine.set_schedule(
            "training", Schedule.training(names, updated=updated, update=update, host=gathered)
        )
        self.engine.set_schedule("forward", Schedule.forward(names, host=gathered))

    @contextmanager
    def forward_pass(self, batch_size: int, *, training: bool) -> Iterator[None]:
        """The whole forward pass of the model runs inside this."""
        if self.current is not None:  # a model calling itself: the outer pass goes on
            yield
            return
        if training:
            self.begin_step()
        if training:
            self._after_backward_due = False  # a backward pass that failed never ended
        if not training and self.updates is not None:
            self.updates.flush()
        self.current = Pass(batch_size, self.micro_batch or batch_size)
        self.engine.begin("training" if training else "forward")
        try:
            yield
        finally:
            self.current = None

    @contextmanager
    def resident(self, name: str, phase: Phase) -> Iterator[None]:
        """Bind a chunk's parameters to its bytes on the device."""
        with self.engine.use(name, phase) as views:
            self.bound[name].bind(views)
            try:
                yield
            finally:
                self.bound[name].unbind()

    def trains(self, name: str) -> bool:
        """Whether any parameter of the chunk requires a gradient."""
        return any(p.requires_grad for p in self.bound[name].parameters.values())

    @contextmanager
    def collecting(self, name: str) -> Iterator[None]:
        """During a backward visit, add parameter gradients to the chunk's flat buffer."""
        if not self.trains(name):
            yield
            return
        if self.gradients is None:
            raise ValueError(
                f"chunk {name!r} has trainable parameters but no optimizer is bound to the model. "
                f"Make one first, e.g. optimizer = headrace.optim.adamw(model, lr=1e-5)."
            )
        with self.gradients.collect(name) as gradient:
            yield from self._accumulate(name, gradient)

    def _accumulate(self, name: str, gradient: DeviceGradient) -> Iterator[None]:
        by_parameter: dict[int, str] = {}
        hooks = []

        def note(parameter: Tensor) -> None:
            gradient.touched.add(by_parameter[id(parameter)])

        try:
            for slot_name, parameter in self.bound[name].parameters.items():
                if parameter.requires_grad:
                    by_parameter[id(parameter)] = slot_name
                    # AccumulateGrad adds in place to a .grad that exists: straight into the
                    # flat buffer, with no second copy of the layer's gradients.
                    parameter.grad = gradient.views[slot_name]
                    hooks.append(parameter.register_post_accumulate_grad_hook(note))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.bound[name].parameters.values():
                parameter.grad = None

    def backward_runs(self) -> None:
        """Note, inside a node's backward, that a backward pass is under way."""
        if self.after_backward is None or self._after_backward_due:
            return
        self._after_backward_due = True

        def ended() -> None:
            self._after_backward_due = False
            assert self.after_backward is not None
            self.after_backward()

        # Runs when the outermost backward call has accumulated all gradients.
        torch.autograd.Variable._execution_engine.queue_callback(ended)  # type: ignore[attr-defined]

    def gradient_views(self, name: str) -> dict[str, Tensor]:
        """Inside ``collecting``: the chunk's gradient so far, as device views."""
        found = {}
        for slot_name, parameter in self.bound[name].parameters.items():
            if parameter.grad is not None:
                found[slot_name] = parameter.grad
        return found

    def begin_step(self) -> None:
        """Note the beginning of a training step for the statistics, unless one is under way."""
        if self._step_started is None:
            self._step_started = time.perf_counter()

    def end_step(self) -> None:
        """Note the end of a training step for the statistics."""
        if self._step_started is not None:
            self._step_history.append((self._step_started, time.perf_counter()))
            self._step_started = None

    def last_step(self) -> StepStatistics | None:
        """What the lanes did in the last training step; None before the first."""
        if not self._step_history:
            return None
        start, end = self._step_history[-1]
        return StepStatistics(end - start, self.timeline.statistics(start, end))

    def statistics(self) -> EngineStatistics:
        """An immutable snapshot."""
        return EngineStatistics(
            steps=self.updates.steps if self.updates is not None else len(self._step_history),
            skipped_steps=self.updates.skipped_steps if self.updates is not None else 0,
            budgets={
                Tier.DEVICE: self.device_budget.statistics(),
                Tier.HOST: self.host_budget.statistics(),
            },
            lanes=self.timeline.statistics(),
            last_step=self.last_step(),
            stalls=self.timeline.stalls(),
        )

    def flush(self) -> None:
        """Apply and commit every pending update."""
        if self.updates is not None:
            self.updates.flush()

    def close(self) -> None:
        """Flush, wait for the lanes, give memory and files back."""
        self.closing.close()
