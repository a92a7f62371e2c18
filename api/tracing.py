"""``headrace.trace``: what moved when, and what each tier held, while a piece of code ran.

The lanes record their work anyway; a trace adds samples of the budgets and of every chunk's
residency, taken by a thread of its own that only reads.  The thread ends with the ``with`` block.
A sample costs some microseconds, so that a trace of one step leaves its timing alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from torch import nn

    from headrace.offload.budget import Tier
    from headrace.offload.residency import Residency
    from headrace.offload.runtime import Runtime
    from headrace.offload.timeline import Span


@dataclass(frozen=True, slots=True)
class Sample:
    """The state at one instant: seconds from the start, bytes on loan per tier, chunk places."""

    seconds: float
    in_use_bytes: dict[Tier, int]
    residency: dict[str, Residency]


@final
@dataclass(slots=True)
class Trace:
    """A recording; times are seconds from its start.  Filled when the ``with`` block ends.

    ``chunk_bytes``: the chunks in the model's order with the bytes of their weights.
    ``limit_bytes``: the budgets.  ``spans``: every piece of work of every lane.  ``samples``:
    budgets and residencies over time.

    >>> import torch
    >>> import headrace
    >>> model = headrace.load("model-folder", train="none", device="cpu")
    >>> with headrace.trace(model) as trace, torch.no_grad():
    ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]))
    ...
    >>> list(trace.chunk_bytes)
    ['model.embed_tokens', 'model.layers.0', 'model.layers.1', 'model.norm', 'lm_head']
    >>> trace.samples[0].residency["model.norm"].name
    'DISK'
    >>> model.close()
    """

    chunk_bytes: dict[str, int]
    limit_bytes: dict[Tier, int]
    seconds: float = 0.0
    spans: list[Span] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


@contextmanager
def trace(model: nn.Module, *, every_seconds: float = 0.002) -> Iterator[Trace]:
    """Record the lanes of a streamed model, its budgets and its chunks while the block runs.

    ``every_seconds``: the time between samples.  Memory: some hundred bytes a chunk and sample.

    >>> import torch
    >>> import headrace
    >>> model = headrace.load("model-folder", train="none", device="cpu")
    >>> with headrace.trace(model) as trace, torch.no_grad():
    ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]))
    ...
    >>> sorted({span.lane.value for span in trace.spans})
    ['compute', 'disk_read', 'h2d']
    >>> model.close()
    """
    from headrace.offload.timeline import Span

    from .errors import InputError
    from .streamed import runtime_of

    if not every_seconds > 0:
        raise InputError(f"every_seconds is {every_seconds}; give a time above 0")
    runtime = runtime_of(model)
    found = Trace(
        chunk_bytes={name: chunk.layout.nbytes for name, chunk in runtime.engine.chunks.items()},
        limit_bytes={
            budget.tier: budget.limit_bytes
            for budget in (runtime.device_budget, runtime.host_budget)
        },
    )
    ended = threading.Event()
    start = time.perf_counter()

    def sample() -> None:
        found.samples.append(_sample(runtime, start))
        while not ended.wait(every_seconds):
            found.samples.append(_sample(runtime, start))

    sampler = threading.Thread(target=sample, name="headrace trace")
    sampler.start()
    try:
        yield found
    finally:
        ended.set()
        sampler.join()
        end = time.perf_counter()
        found.samples.append(_sample(runtime, start))
        found.seconds = end - start
        found.spans.extend(
            Span(s.lane, s.label, s.start - start, s.end - start, s.nbytes)
            for s in sorted(runtime.timeline.spans(start, end), key=lambda s: s.start)
        )


def _sample(runtime: Runtime, start: float) -> Sample:
    budgets = (runtime.device_budget, runtime.host_budget)
    return Sample(
        seconds=time.perf_counter() - start,
        in_use_bytes={b.tier: b.limit_bytes - b.free_bytes for b in budgets},
        residency={name: chunk.residency for name, chunk in runtime.engine.chunks.items()},
    )
