"""Rebuilds a fine-tuned model from its base and the log: tensor by tensor, in one pass each.

``replay`` needs the memory of one tensor (plus its factors); a tensor's thousand steps are applied
while a tile of it is in the cache, on as many threads as it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self, final

import torch
import xxhash
from torch import Tensor

from ..offload.errors import StoreFormatError
from .dense import DenseTrace
from .directions import Place
from .log import LogHeader, StepRecord
from .noise import assign_streams
from .perturb import StepUpdate
from .settings import ZOSettings, check_record

#: Elements of a parameter that one thread takes through all steps of a log.
JOB_ELEMENTS = 1 << 20


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """128-bit fingerprint of named tensors, whatever their order: names, shapes, dtypes, bytes.

    >>> import torch
    >>> from headrace.zo import fingerprint
    >>> fingerprint([("a", torch.ones(2)), ("b", torch.zeros(2))])
    'a0f923431d5e04c02d8810a425cef2f8'
    """
    lines = []
    for name, tensor in tensors:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest = xxhash.xxh3_128_hexdigest(data.data)
        lines.append(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{digest}")
        del tensor, data  # views of memory that the next tensor may need
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())


def places_of(shapes: Mapping[str, tuple[int, ...]], run_seed: int) -> dict[str, Place]:
    """A place for every trained parameter; streams depend on the whole set of names."""
    streams = assign_streams(shapes)
    return {name: Place(name, streams[name], run_seed, shapes[name]) for name in shapes}


def updates_of(settings: ZOSettings, records: Sequence[StepRecord], name: str) -> list[StepUpdate]:
    """What logged steps do to one parameter; skipped steps do nothing."""
    updates = [settings.update_of(record, name) for record in records]
    return [update for update in updates if update is not None]


@final
class Replayer:
    """Brings the tensors of a base up to date with a log, some at a time, on several threads.

    Use it as a context manager.  Dense noise splits a tensor into ranges, each of which takes all
    steps while it is in the cache; other directions take a tensor whole.  Bits do not depend on
    ``threads`` nor on which tensors come together.
    """

    def __init__(
        self,
        header: LogHeader,
        records: Sequence[StepRecord],
        *,
        trained: Mapping[str, tuple[int, ...]] | None = None,
        threads: int = 1,
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._shapes = dict(trained) if trained is not None else trained_shapes(header)
        self._settings = ZOSettings.from_json(header.settings["method"])
        for record in records:
            check_record(record, "the log")
        self._records = records
        self._places = places_of(self._shapes, self._settings.seed)
        self._missing = set(self._shapes)
        self._updates: dict[bool, list[StepUpdate]] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="headrace-replay")

    @property
    def trained(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the trained tensors by name."""
        return self._shapes

    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Change the trained ones among these tensors in place; returns when all are done."""
        jobs = [
            job
            for name, tensor in tensors.items()
            if name in self._places
            for job in self._jobs(name, tensor)
        ]
        waiting = [self._pool.submit(job) for job in jobs]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            raise

    def check_complete(self) -> None:
        """Refuse a base that lacked trained tensors."""
        if self._missing:
            raise StoreFormatError(
                f"the base lacks {len(self._missing)} trained tensors of the log, first "
                f"{min(self._missing)!r}: the log belongs to another model"
            )

    def _jobs(self, name: str, tensor: Tensor) -> list[Callable[[], None]]:
        place = self._places[name]
        if tuple(tensor.shape) != place.shape:
            raise StoreFormatError(
                f"{name} has shape {tuple(tensor.shape)} in the base and {place.shape} in the log: "
                "the log belongs to another model"
            )
        self._missing.discard(name)
        trace = self._settings.directions.open(place)
        decays = self._settings.decays(name)
        if decays not in self._updates:
            self._updates[decays] = updates_of(self._settings, self._records, name)
        updates = self._updates[decays]
        if isinstance(trace, DenseTrace) and tensor.is_contiguous():
            flat = tensor.detach().view(-1)
            return [
                partial(trace.apply_range, flat[low : low + JOB_ELEMENTS], updates, start=low)
                for low in range(0, flat.numel(), JOB_ELEMENTS)
            ]

        def whole() -> None:
            trace.apply(tensor, updates)
            trace.finish(tensor)

        return [whole]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def replay(
    tensors: Iterable[tuple[str, Tensor]],
    header: LogHeader,
    records: Sequence[StepRecord],
    *,
    trained: Mapping[str, tuple[int, ...]] | None = None,
    threads: int = 1,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the fine-tuned tensors of a base, in the base's order; untrained ones pass unchanged.

    ``tensors`` are changed in place.  ``trained`` (name -> shape) defaults to what the log's header
    lists.  The caller compares ``header.base`` with the ``fingerprint`` of the trained tensors;
    ``replay`` checks names and shapes.

    >>> import copy
    >>> from headrace.zo import read_log, replay
    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import ZOSettings, ZOStep
    >>> model = nn.Linear(2, 1)
    >>> x, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> base = copy.deepcopy(model)
    >>> run = ZOStep(model, ZOSettings(lr=1e-2), log="tune.log")
    >>> result = run.step(lambda m: float(((m(x) - y) ** 2).mean()))
    >>> run.close()
    >>> header, records = read_log("tune.log")
    >>> weights = ((name, p.detach()) for name, p in base.named_parameters())
    >>> rebuilt = dict(replay(weights, header, records))
    >>> all(torch.equal(rebuilt[n], p) for n, p in model.named_parameters())
    True
    """
    with Replayer(header, records, trained=trained, threads=threads) as replayer:
        for name, tensor in tensors:
            replayer.apply({name: tensor})
            yield name, tensor
        replayer.check_complete()


def trained_shapes(header: LogHeader) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trained parameters, from a log's header."""
    listed = header.settings.get("trained")
    if not isinstance(listed, dict) or "method" not in header.settings:
        raise StoreFormatError("the log's header does not list its method and trained parameters")
    shapes = {}
    for name, shape in listed.items():
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise StoreFormatError(f"the log's header gives {name!r} the shape {shape!r}")
        shapes[name] = tuple(shape)
    return shapes
