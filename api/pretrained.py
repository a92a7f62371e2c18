"""A streamed model's weights in and out as Hugging Face code expects, one chunk at a time.

``save_weights`` is ``save_pretrained`` without gathering the model; ``load_weights`` is what
``load_state_dict`` does for the streamed parameters; ``stored_tensors`` are the entries of its
``state_dict``.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from accelerate import init_empty_weights
from torch import Tensor

from headrace.offload.backing import Backing, StoreBacking
from headrace.offload.chunk import ChunkLayout, Segment
from headrace.offload.device_memory import slab_tensor
from headrace.offload.engine import Chunk, Engine
from headrace.offload.errors import HeadraceError
from headrace.offload.runtime import Runtime
from headrace.offload.schedule import Phase, Schedule
from headrace.offload.transfer import FinishedTransfer, Transfer

from .compatibility import convert_into
from .exporting import write_model
from .stored_tensor import StoredTensor
from .streamed import StreamedModel

_WEIGHT_FILE = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json"
)


def begin_reading(runtime: Runtime) -> None:
    """Start a lap in which chunks are read in host memory, in any order.

    It has a schedule of its own: what training and evaluation have learnt stays as it is.
    """
    names = list(runtime.engine.chunks)
    runtime.flush()
    runtime.engine.set_schedule("reading", Schedule.forward(names, host=frozenset(names)))
    runtime.engine.begin("reading")


def stored_tensors(model: StreamedModel) -> dict[int, StoredTensor]:
    """An entry for every streamed parameter, by the parameter's identity."""
    runtime = model._runtime

    def reader(chunk: str, slot: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            begin_reading(runtime)
            with runtime.engine.use_host(chunk, Phase.FORWARD) as views:
                return views[slot].clone()

        return read

    return {
        id(parameter): StoredTensor.make(parameter, reader(chunk, slot))
        for chunk, bound in runtime.bound.items()
        for slot, parameter in bound.parameters.items()
    }


def save_weights(model: StreamedModel, folder: Path) -> None:
    """Write config and weight shards into a folder, in place of weights that it held."""
    unfinished = folder / ".weights.partial"
    folder.mkdir(parents=True, exist_ok=True)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    try:
        write_model(model, unfinished)
        for path in folder.iterdir():
            if _WEIGHT_FILE.fullmatch(path.name):
                path.unlink()
        for path in unfinished.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(unfinished)


@final
class _GivenBacking(Backing):
    """A chunk whose weights were given before the store was made; it holds them by reference."""

    def __init__(self, layout: ChunkLayout, tensors: Mapping[str, Tensor]) -> None:
        self._layout, self._tensors = layout, dict(tensors)
        self.host_nbytes = layout.nbytes
        self.host_slots = layout.slots
        self.segments = (Segment(0, 0, layout.nbytes),)

    def read(self, view: memoryview, label: str) -> Transfer:
        """Copy on the calling thread; nothing is in flight afterwards."""
        buffer = torch.frombuffer(view, dtype=torch.uint8)
        for slot in self._layout.slots:
            slot.view(buffer).copy_(self._tensors[slot.name])
        return FinishedTransfer(label, self._layout.nbytes)


def load_weights(
    model: StreamedModel, given: Mapping[str, Mapping[str, Tensor]], *, trained: bool
) -> None:
    """Take new weights for streamed parameters: ``given`` is chunk -> slot -> tensor.

    ``trained``: the model was loaded with train="all", so that its weights may change.  Weights
    of a frozen base may be given only as they are.
    """
    runtime = model._runtime
    begin_reading(runtime)
    changed = False
    for name, tensors in given.items():
        chunk = runtime.engine.chunks[name]
        if isinstance(chunk.backing, StoreBacking):
            _write(runtime.engine, chunk, chunk.backing, tensors)
            changed = True
        elif not _equal(runtime.engine, name, tensors):
            if not trained or runtime.store is not None:
                raise HeadraceError(
                    f"load_state_dict() was given other weights for {next(iter(tensors))!r} than "
                    f"the frozen base has. A frozen base is read in place and never written: "
                    f"open the folder of those weights with headrace.load instead."
                )
            with runtime.engine.use_host(name, Phase.FORWARD) as views:
                rest = {n: v.clone() for n, v in views.items() if n not in tensors}
            runtime.engine.drain()
            runtime.engine.forget(chunk)
            chunk.backing = _GivenBacking(chunk.layout, {**rest, **tensors})
    if changed:
        model._training_side.commit_now()


def _equal(engine: Engine, name: str, tensors: Mapping[str, Tensor]) -> bool:
    with engine.use_host(name, Phase.FORWARD) as views:
        return all(
            torch.equal(views[n], t.detach().to("cpu", views[n].dtype)) for n, t in tensors.items()
        )


@torch.no_grad()
def _write(
    engine: Engine, chunk: Chunk, backing: StoreBacking, tensors: Mapping[str, Tensor]
) -> None:
    engine.drain()
    engine.forget(chunk)
    slab = engine.acquire_host(f"load {chunk.name}", chunk.layout.nbytes)
    try:
        view = slab.view[: chunk.layout.nbytes]
        backing.read(view, f"read {chunk.name}").wait()
        buffer = slab_tensor(slab)
        for slot in chunk.layout.slots:
            if slot.name in tensors:
                slot.view(buffer).copy_(tensors[slot.name])
        del buffer
        backing.write(view).wait()
    finally:
        engine.host.release(slab)


def places(model: StreamedModel) -> dict[str, tuple[str, str]]:
    """(chunk, slot) of every streamed parameter by its name in the model as it is now."""
    by_parameter = {
        id(parameter): (chunk, slot)
        for chunk, bound in model._runtime.bound.items()
        for slot, parameter in bound.parameters.items()
    }
    return {
        name: by_parameter[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in by_parameter
    }


def converted(model: StreamedModel, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under a checkpoint's own names (experts one by one, say) as parameters by slot name.

    What belongs to no parameter is left out.  Memory: the tensors given, once more.
    """
    kind: Any = type(model).__bases__[1]
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    with init_empty_weights(include_buffers=False):
        twin = kind._from_config(copy.deepcopy(model.config), dtype=dtype)
    problems = convert_into(twin, others, dtype)
    found = {n: p.detach() for n, p in twin.named_parameters() if not p.is_meta}
    if problems and not found:
        raise HeadraceError(
            f"load_state_dict() was given {len(others)} tensors under names of a checkpoint that "
            f"could not be converted: {problems[:3]}. Open their folder with headrace.load."
        )
    return found


def mismatches(model: StreamedModel, given: Iterable[tuple[str, Tensor]]) -> list[str]:
    """torch's own messages for weights of the wrong shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [
        f"size mismatch for {name}: copying a param with shape {tuple(tensor.shape)} from "
        f"checkpoint, the shape in current model is {tuple(parameters[name].shape)}."
        for name, tensor in given
        if tensor.shape != parameters[name].shape
    ]
