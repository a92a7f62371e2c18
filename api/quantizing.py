"""``headrace.quantize``: a checkpoint as a folder of encoded weights, one chunk at a time.

The folder holds config, tokenizer and generation settings beside the encoded shards, so that
``headrace.load`` opens it like any model folder and streams the packed bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from accelerate import init_empty_weights
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.offload.chunk import ChunkLayout
from headrace.offload.source import SafetensorsIndex
from headrace.quant.codec import Codec
from headrace.quant.fold import PendingTensor, TensorReport, encode_folder
from headrace.quant.folder import INDEX_NAME, EncodedFolder
from headrace.quant.shards import write_json
from headrace.quant.spec import TensorSpec

from .checkpoint import Checkpoint
from .encoding_plan import PlannedWeight, plan_encoding
from .encoding_record import parts_digest, settings_record, weight_groups
from .errors import InputError
from .loading import chosen_dtype, find_folder
from .native_checkpoint import take_quantization_settings
from .structure import cut


@final
class _ChunkReader:
    """Converts one chunk at a time and hands out its tensors; the last chunk is kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._layout: ChunkLayout | None = None
        self._tensors: dict[str, Tensor] = {}

    def read(self, layout: ChunkLayout, name: str) -> Tensor:
        """One tensor of a chunk."""
        if layout is not self._layout:
            self._tensors = {}  # before the next chunk is read, not after
            self._tensors = self._checkpoint.convert(layout)
            self._layout = layout
        return self._tensors[name]


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    format: str | Codec | Mapping[str, Any] = "nf4",
    keep: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    on_tensor: Callable[[TensorReport], None] = lambda report: None,
) -> EncodedFolder:
    """Encode the linear layers of a model (fused experts too) into the folder ``out``.

    ``format`` is a word (``nf4``, ``fp4``, ``int8``, ``int4``, ``fp8``, ``mxfp4``, ``mxfp8``,
    ``nvfp4``), a codec, or a codec's parameters.  Embeddings, the head, norms, routers and the
    modules that ``keep`` names (in full, or by the end of their name) keep their type.  One chunk
    is in memory at a time.  An interrupted run goes on where it stopped; a finished folder is
    refused.  ``on_tensor`` hears the error of every tensor.

    >>> import headrace
    >>> reports = []
    >>> encoded = headrace.quantize(
    ...     "model-folder", "nf4-folder", format="nf4", on_tensor=reports.append
    ... )
    >>> reports[0].codec, reports[1].codec
    ('kept', 'nf4')
    >>> model = headrace.load("nf4-folder", train="adapters", device="cpu")
    >>> model.close()
    """
    folder, target = find_folder(model), Path(out)
    if (target / INDEX_NAME).exists():
        raise InputError(f"{target} holds a finished encoding already; give a new folder")
    config = AutoConfig.from_pretrained(folder)
    if take_quantization_settings(config):
        raise InputError(
            f"{folder} is encoded already: headrace.load and headrace tune stream it as it is"
        )
    kind = chosen_dtype(dtype, config)
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=kind)
    skeleton.tie_weights()
    planned = plan_encoding(skeleton, format, keep=keep)
    checkpoint = Checkpoint(skeleton, folder, kind)
    reader = _ChunkReader(checkpoint)
    pending: list[PendingTensor] = []
    for chunk in cut(skeleton):
        layout = ChunkLayout.pack(
            chunk.name, [(n, p.shape, p.dtype) for n, p in chunk.parameters.items()]
        )
        for slot in layout.slots:
            spec = TensorSpec(tuple(slot.shape), slot.dtype)
            pending.append(PendingTensor(slot.name, spec, _reader(reader, layout, slot.name)))
    encoded = encode_folder(
        pending,
        target,
        choose=lambda name, spec: planned[name].codec if name in planned else None,
        source=source_of(folder, format, keep=keep, dtype=kind),
        on_tensor=on_tensor,
    )
    copy_companions(folder, target)
    _describe(target, encoded, planned, format, keep)
    checkpoint.index.close()
    return encoded


def source_of(
    folder: Path,
    encoding: str | Codec | Mapping[str, Any],
    *,
    keep: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, str]:
    """Return what identifies a checkpoint and how it is encoded, as an encoded folder keeps it."""
    with SafetensorsIndex.open(folder) as index:
        nbytes = index.nbytes
    words = encoding.parameters() if isinstance(encoding, Codec) else encoding
    return {
        "model": str(folder.absolute()),
        "bytes": str(nbytes),
        "format": words if isinstance(words, str) else json.dumps(dict(words), sort_keys=True),
        "keep": " ".join(sorted(keep)),
        "dtype": str(dtype).removeprefix("torch."),
    }


def copy_companions(folder: Path, target: Path) -> None:
    """Copy configuration, tokenizer and generation settings beside the shards."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja"):
            if not path.name.endswith(".index.json"):
                shutil.copy2(path, target / path.name)


def _describe(
    target: Path,
    encoded: EncodedFolder,
    planned: Mapping[str, PlannedWeight],
    encoding: str | Codec | Mapping[str, Any],
    keep: Sequence[str],
) -> None:
    """Say in config.json what is encoded, so that ``HeadraceConfig`` opens the folder too."""
    weights = {
        name: (weight, parts_digest(encoded.records[name].checksums))
        for name, weight in planned.items()
    }
    words = encoding.parameters() if isinstance(encoding, Codec) else encoding
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    settings = settings_record(words, keep, weight_groups(weights))
    write_json(path, {**config, "quantization_config": settings})


def quantize_report(*, quiet: bool) -> tuple[list[TensorReport], Callable[[TensorReport], None]]:
    """A list that fills with every tensor's report, and the callback that fills it.

    Unless ``quiet``, the callback also shows a line for each encoded tensor on standard error.
    """
    reports: list[TensorReport] = []
    console = Console(stderr=True, quiet=quiet)

    def show(report: TensorReport) -> None:
        reports.append(report)
        if report.codec != "kept":
            console.print(
                f"{report.name}: {report.codec}, relative error {report.relative_rms:.4f}"
            )

    return reports, show


def _reader(reader: _ChunkReader, layout: ChunkLayout, name: str) -> Callable[[], Tensor]:
    return lambda: reader.read(layout, name)
