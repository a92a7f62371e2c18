"""Reads a Hugging Face checkpoint into chunks: in place where it can, converted where it must.

A chunk is read in place when each of its tensors is one tensor of the shards with the same
shape and dtype.  Fused experts, renamed layouts and other dtypes go through transformers' own
conversion engine, one chunk in memory at a time, and are packed once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.utils import logging

from headrace.offload.backing import Backing
from headrace.offload.chunk import ChunkLayout, Segment
from headrace.offload.errors import SourceError
from headrace.offload.source import SafetensorsIndex
from headrace.offload.transfer import FinishedTransfer, Transfer
from headrace.quant.shards import DTYPES

from .compatibility import convert_into
from .native_checkpoint import NativePlan, Piece


@final
class Checkpoint:
    """The shards of a model and how their tensors become the model's parameters."""

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        dtype: torch.dtype,
        *,
        converted: bool = True,
        native: NativePlan | None = None,
    ) -> None:
        """``model`` is on meta, with the dtypes its parameters will have.

        ``converted``: the shards use the hub's names and layouts, not the model's own.
        ``native``: the weights that the shards hold encoded, declared in the model already.
        """
        self.folder, self.dtype = folder, dtype
        self.index = SafetensorsIndex.open(folder)
        self._model = model
        mapping = get_model_conversion_mapping(model) if converted else []
        renamings = [w for w in mapping if isinstance(w, WeightRenaming)]
        converters = [w for w in mapping if isinstance(w, WeightConverter)]
        targets = model.state_dict()
        sources: dict[str, list[str]] = defaultdict(list)
        self._converted: set[str] = set()
        for key in self.index:
            target, pattern = rename_source_key(
                key, renamings, converters, model.base_model_prefix, targets
            )
            if target not in targets and key in targets:
                target, pattern = key, None
            if target in targets:
                sources[target].append(key)
                if pattern is not None:
                    self._converted.add(target)
        self._pieces = {} if native is None else native.pieces()
        for name, pieces in self._pieces.items():
            sources[name] = [piece for piece in pieces if isinstance(piece, str)]
        self.sources: Mapping[str, list[str]] = sources
        self.targets = {n: (t.shape, t.dtype) for n, t in targets.items()}

    def missing(self, names: list[str]) -> list[str]:
        """Parameters that no tensor of the shards provides."""
        return [n for n in names if n not in self.sources]

    def in_place(self, layout: ChunkLayout) -> dict[str, str] | None:
        """Slot name -> tensor name if the whole chunk can be read as it lies; else None."""
        keys: dict[str, str] = {}
        for slot in layout.slots:
            if slot.name in self._pieces:
                (piece, *others) = self._pieces[slot.name]
                if others or not isinstance(piece, str):
                    return None
                keys[slot.name] = piece
                continue
            sources = self.sources.get(slot.name, [])
            if len(sources) != 1 or slot.name in self._converted:
                return None
            entry = self.index[sources[0]]
            if entry.shape != tuple(slot.shape) or DTYPES.get(entry.dtype) is not slot.dtype:
                return None
            keys[slot.name] = sources[0]
        return keys

    def pieces(self, layout: ChunkLayout) -> dict[str, tuple[Piece, ...]]:
        """Slot name -> the bytes that make it up, of all slots that need no conversion.

        Empty if no slot of the chunk is a part of an encoded weight.
        """
        if not any(slot.name in self._pieces for slot in layout.slots):
            return {}
        found = {s.name: self._pieces[s.name] for s in layout.slots if s.name in self._pieces}
        for slot in layout.slots:
            alone = self.in_place(
                ChunkLayout.pack(slot.name, [(slot.name, slot.shape, slot.dtype)])
            )
            if slot.name not in found and alone is not None:
                found[slot.name] = (alone[slot.name],)
        return found

    def convert(self, layout: ChunkLayout) -> dict[str, Tensor]:
        """The chunk's tensors through transformers' conversion, in ordinary memory."""
        wanted = [key for slot in layout.slots for key in self.sources.get(slot.name, [])]
        kept = getattr(self._model, "_weight_conversions", None)
        shards: dict[Path, Any] = {}
        state: dict[str, Any] = {}
        for key in wanted:
            path = self.index[key].path
            if path not in shards:
                shards[path] = safe_open(str(path), framework="pt", device="cpu")
            state[key] = shards[path].get_slice(key)
        result: dict[str, Tensor] = {}
        owners = {s.name: _owner(self._model, s.name) for s in layout.slots}
        before = {n: module._parameters[leaf] for n, (module, leaf) in owners.items()}
        try:
            with _no_progress_bar():
                problems = convert_into(self._model, state, self.dtype)
            for slot in layout.slots:
                module, leaf = owners[slot.name]
                parameter = module._parameters[leaf]
                if parameter is None or parameter.is_meta or parameter.shape != slot.shape:
                    problems.append(slot.name)
                else:
                    result[slot.name] = parameter.detach().to(slot.dtype)
            if problems:
                raise SourceError(
                    f"{self.folder}: {len(problems)} tensors of {layout.name!r} could not be "
                    f"converted for {type(self._model).__name__}: {problems[:4]}. Is this the "
                    f"checkpoint of another model?"
                )
        finally:
            for name, (module, leaf) in owners.items():
                module._parameters[leaf] = before[name]
            # Overwritten by every call; save_pretrained reverses what stands there.
            self._model._weight_conversions = kept  # type: ignore[assignment]
        return result


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers would draw a bar for each chunk."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


@final
class ConvertedBacking(Backing):
    """A chunk that goes through the conversion at every read; used to pack it once."""

    def __init__(self, checkpoint: Checkpoint, layout: ChunkLayout) -> None:
        self._checkpoint, self._layout = checkpoint, layout
        self.host_nbytes = layout.nbytes
        self.host_slots = layout.slots
        self.segments = (Segment(0, 0, layout.nbytes),)

    def read(self, view: memoryview, label: str) -> Transfer:
        """Convert into the view on the calling thread; nothing is in flight afterwards."""
        buffer = torch.frombuffer(view, dtype=torch.uint8)
        for name, tensor in self._checkpoint.convert(self._layout).items():
            slot = next(s for s in self._layout.slots if s.name == name)
            slot.view(buffer).copy_(tensor)
        return FinishedTransfer(label, self._layout.nbytes)
