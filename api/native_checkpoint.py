"""Low-bit checkpoints of others, bound to a model: which bytes of the shards make up which part.

``headrace.quant.native_layouts`` says what the tensors of a checkpoint encode; here they meet the
model that transformers builds: names are those of the model, experts that the checkpoint stores
one by one are one stack in the model, and a chunk of such weights is read from where its bytes
lie.  No second copy of the checkpoint is made.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from headrace.offload.backing import Backing
from headrace.offload.chunk import ChunkLayout, Segment
from headrace.offload.errors import SourceError
from headrace.offload.io import DiskLanes
from headrace.offload.source import ReadPlan, SafetensorsIndex
from headrace.offload.transfer import Transfer
from headrace.quant.codec import Codec, Shape
from headrace.quant.fp8_grid import Fp8GridCodec
from headrace.quant.int8_rowwise import Int8RowwiseCodec
from headrace.quant.linear import part_parameter_name
from headrace.quant.model import declare_weight
from headrace.quant.mxfp8 import Mxfp8Codec
from headrace.quant.native_layouts import NativeWeight, StoredTensors, native_weights
from headrace.quant.shards import DTYPES
from headrace.quant.spec import TensorSpec

from .encoding_record import METHOD, recorded_weights

Piece = str | Tensor  # a tensor of the shards, by name, or a few bytes that are known already


@final
@dataclass(frozen=True)
class ModelWeight:
    """One encoded weight as the model has it."""

    codec: Codec
    shape: Shape
    transposed: bool
    pieces: Mapping[str, tuple[Piece, ...]]  # part -> the bytes that make it up, in order


@final
@dataclass(frozen=True)
class NativePlan:
    """Every encoded weight of a checkpoint, by the model's name for it."""

    weights: Mapping[str, ModelWeight] = field(default_factory=dict)

    def declare(self, model: PreTrainedModel) -> None:
        """Give a model on ``meta`` the parts of these weights in place of the weights."""
        for name, weight in self.weights.items():
            declare_weight(model, name, weight.codec, weight.shape, transposed=weight.transposed)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Parameter name of each part -> its bytes."""
        return {
            part_parameter_name(name, part): pieces
            for name, weight in self.weights.items()
            for part, pieces in weight.pieces.items()
        }


def take_quantization_settings(config: Any) -> dict[str, Any]:
    """Remove and return what a configuration says of encoded weights; empty if nothing.

    The model is built and saved without it: what is streamed is no model that transformers has
    quantised.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return {}
    del config.quantization_config
    return dict(settings) if isinstance(settings, dict) else dict(settings.to_dict())


def plan_native(model: PreTrainedModel, folder: Path, settings: Mapping[str, Any]) -> NativePlan:
    """Bind the encoded weights of a checkpoint to a model on ``meta``.

    ``settings`` is the checkpoint's ``quantization_config``.  Raises ``SourceError`` that names
    the tensor for what no layout explains, what does not fit the model, and layouts whose
    experts cannot be put together from contiguous bytes.
    """
    if settings.get("quant_method") == METHOD:
        return _own(folder, settings)
    with SafetensorsIndex.open(folder) as index:
        tensors = _stored_tensors(index)
        try:
            found = native_weights(settings, tensors)
        except ValueError as error:
            raise SourceError(str(error)) from error
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    targets = model.state_dict()
    weights: dict[str, ModelWeight] = {}
    fused: dict[str, dict[str, list[NativeWeight]]] = defaultdict(lambda: defaultdict(list))
    for weight in found:
        target, pattern = rename_source_key(
            weight.name, renamings, converters, model.base_model_prefix, targets
        )
        if target not in targets and weight.name in targets:
            target, pattern = weight.name, None
        if target not in targets:
            continue  # of a head or a layer that this model does not have
        if pattern is None:
            weights[target] = _single(model, target, weight)
        else:
            fused[target][pattern].append(weight)
    for target, sources in fused.items():
        converter = by_pattern[next(iter(sources))]
        weights[target] = _stacked(target, converter, sources, folder)
    for name, made in weights.items():
        visible = (
            (*made.shape[:-2], made.shape[-1], made.shape[-2]) if made.transposed else made.shape
        )
        if visible != tuple(targets[name].shape):
            raise SourceError(
                f"{folder}: {name!r} decodes to shape {visible}, but {type(model).__name__} has "
                f"{tuple(targets[name].shape)} there. Is this the checkpoint of another model?"
            )
    return NativePlan(weights)


def _own(folder: Path, settings: Mapping[str, Any]) -> NativePlan:
    """Bind a folder that ``save_pretrained`` wrote under a ``HeadraceConfig``."""
    weights: dict[str, ModelWeight] = {}
    with SafetensorsIndex.open(folder) as index:
        for name, (planned, _) in recorded_weights(settings, str(folder)).items():
            stored = {
                part: part_parameter_name(name, part) for part in planned.codec.spec(planned.shape)
            }
            for part, spec in planned.codec.spec(planned.shape).items():
                entry = index.get(stored[part])
                found = None if entry is None else (entry.shape, DTYPES.get(entry.dtype))
                if found != (spec.shape, spec.dtype):
                    raise SourceError(
                        f"{folder}: {stored[part]!r} must have shape {spec.shape} and dtype "
                        f"{spec.dtype}, found {found}"
                    )
            pieces = {part: (slot,) for part, slot in stored.items()}
            weights[name] = ModelWeight(planned.codec, planned.shape, planned.transposed, pieces)
    return NativePlan(weights)


def _stored_tensors(index: SafetensorsIndex) -> StoredTensors:
    specs = {
        name: TensorSpec(entry.shape, DTYPES[entry.dtype])
        for name, entry in index.items()
        if entry.dtype in DTYPES
    }

    def read(name: str) -> Tensor:
        with safe_open(str(index[name].path), framework="pt", device="cpu") as shard:
            value: Tensor = shard.get_tensor(name)
        return value

    return StoredTensors(specs, read, str(index.path))


def _single(model: PreTrainedModel, target: str, weight: NativeWeight) -> ModelWeight:
    module = model.get_submodule(target.rpartition(".")[0])
    # The matrices of Conv1D are (in, out); every layout stores outputs first.
    transposed = weight.transposed or isinstance(module, Conv1D)
    pieces = {part: (_piece(weight, part),) for part in weight.codec.spec(weight.shape)}
    return ModelWeight(weight.codec, weight.shape, transposed, pieces)


def _piece(weight: NativeWeight, part: str) -> Piece:
    return weight.literals[part] if part in weight.literals else weight.stored[part]


def _stacked(
    target: str,
    converter: WeightConverter,
    sources: Mapping[str, Sequence[NativeWeight]],
    folder: Path,
) -> ModelWeight:
    """Put a stack of experts together from weights that are stored one by one."""
    known = (MergeModulelist, Concatenate)
    ordered = [
        sorted(sources.get(pattern, ()), key=lambda weight: dot_natural_key(weight.name))
        for pattern in converter.source_patterns
    ]
    first = ordered[0][0] if ordered[0] else next(iter(sources.values()))[0]
    counts = {len(experts) for experts in ordered}
    if len(counts) != 1 or not all(isinstance(op, known) for op in converter.operations):
        raise SourceError(
            f"{folder}: {first.name!r} and its like cannot be put together to {target!r}: "
            f"{[len(experts) for experts in ordered]} of each kind are there"
        )
    members = [weight for experts in zip(*ordered, strict=True) for weight in experts]
    odd = [w.name for w in members if (w.codec, w.shape) != (first.codec, first.shape)]
    if odd or not isinstance(first.codec, (Fp8GridCodec, Int8RowwiseCodec, Mxfp8Codec)):
        raise SourceError(
            f"{folder}: {(odd or [first.name])[0]!r} is encoded as {first.codec.name!r} of shape "
            f"{first.shape}, which cannot be put together to {target!r} as its bytes lie. "
            f"Quantise the original with headrace quantize."
        )
    rows, cols = first.shape
    codec: Codec = first.codec
    if isinstance(codec, Fp8GridCodec) and len(ordered) > 1:
        if codec.block_rows == 0:  # one scale for each of the matrices under each other
            codec = dataclasses.replace(codec, block_rows=rows)
        elif rows % codec.block_rows:
            raise SourceError(
                f"{folder}: {first.name!r} has {rows} outputs, which are no whole rectangles of "
                f"{codec.block_rows}, so its like cannot be put together to {target!r}"
            )
    shape = (len(ordered[0]), rows * len(ordered), cols)
    pieces = {part: tuple(_piece(w, part) for w in members) for part in codec.spec(shape)}
    return ModelWeight(codec, shape, False, pieces)


@final
class AssembledBacking(Backing):
    """A chunk some of whose tensors are put together from several places of the shards.

    Host memory: the chunk twice, as it lies in the shards and put together.  Tensors that the
    checkpoint does not hold as the model wants them (a norm of another dtype) are converted at
    each read.
    """

    def __init__(
        self,
        index: SafetensorsIndex,
        layout: ChunkLayout,
        pieces: Mapping[str, Sequence[Piece]],
        disk: DiskLanes,
        *,
        convert: Callable[[ChunkLayout], Mapping[str, Tensor]],
    ) -> None:
        """``convert`` reads the tensors of a layout that the shards hold in another form."""
        names = [p for parts in pieces.values() for p in parts if isinstance(p, str)]
        self._plan = ReadPlan(index, names, lanes=disk)
        self._convert, self._packed_bytes = convert, layout.nbytes
        self.host_nbytes = layout.nbytes + self._plan.nbytes
        self.host_slots = layout.slots
        self.segments = (Segment(0, 0, layout.nbytes),)
        rest = [slot for slot in layout.slots if slot.name not in pieces]
        self._converted = (
            ChunkLayout.pack(layout.name, [(s.name, s.shape, s.dtype) for s in rest])
            if rest
            else None
        )
        self._slots = {slot.name: slot for slot in layout.slots}
        self._copies: list[tuple[int, int, int]] = []  # to, from, bytes
        self._literals: list[tuple[int, bytes]] = []
        for name, parts in pieces.items():
            offset = self._slots[name].offset
            for piece in parts:
                if isinstance(piece, str):
                    nbytes = index[piece].nbytes
                    start = self._packed_bytes + self._plan.offsets[piece]
                    self._copies.append((offset, start, nbytes))
                else:
                    data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    nbytes = len(data)
                    self._literals.append((offset, data))
                offset += nbytes
            assert offset == self._slots[name].offset + self._slots[name].nbytes, name

    def read(self, view: memoryview, label: str) -> Transfer:
        """Read the shards' ranges behind the place of the chunk, then put it together."""
        if self._converted is not None:
            buffer = torch.frombuffer(view, dtype=torch.uint8)
            for name, tensor in self._convert(self._converted).items():
                self._slots[name].view(buffer).copy_(tensor)
        behind = view[self._packed_bytes :]
        return self._plan.read(behind, label=label, then=partial(self._put_together, view))

    def _put_together(self, view: memoryview) -> None:
        for target, source, nbytes in self._copies:
            view[target : target + nbytes] = view[source : source + nbytes]
        for target, data in self._literals:
            view[target : target + len(data)] = data
