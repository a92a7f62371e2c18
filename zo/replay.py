"""Rebuilds a fine-tuned model from its base and the log: tensor by tensor, in one pass each.

``replay`` needs the memory of one tensor (plus its factors); a tensor's thousand steps are applied
while a tile of it is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from ..offload.errors import StoreFormatError
from .directions import Place
from .log import LogHeader, StepRecord
from .noise import assign_streams
from .perturb import StepUpdate
from .settings import ZOSettings, check_record


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """128-bit fingerprint of named tensors, whatever their order: names, shapes, dtypes, bytes."""
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


def replay(
    tensors: Iterable[tuple[str, Tensor]],
    header: LogHeader,
    records: Sequence[StepRecord],
    *,
    trained: Mapping[str, tuple[int, ...]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the fine-tuned tensors of a base, in the base's order; untrained ones pass unchanged.

    ``tensors`` are changed in place.  ``trained`` (name -> shape) defaults to what the log's header
    lists.  The caller compares ``header.base`` with the ``fingerprint`` of the trained tensors;
    ``replay`` checks names and shapes.
    """
    settings = ZOSettings.from_json(header.settings["method"])
    shapes = dict(trained) if trained is not None else trained_shapes(header)
    for record in records:
        check_record(record, "the log")
    places = places_of(shapes, settings.seed)
    missing = set(shapes)
    for name, tensor in tensors:
        if name in places:
            missing.discard(name)
            if tuple(tensor.shape) != places[name].shape:
                raise StoreFormatError(
                    f"{name} has shape {tuple(tensor.shape)} in the base and {places[name].shape} "
                    "in the log: the log belongs to another model"
                )
            trace = settings.directions.open(places[name])
            trace.apply(tensor, updates_of(settings, records, name))
            trace.finish(tensor)
        yield name, tensor
    if missing:
        raise StoreFormatError(
            f"the base lacks {len(missing)} trained tensors of the log, first {min(missing)!r}: "
            "the log belongs to another model"
        )


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
