"""``headrace.quantize``: a checkpoint as a folder of encoded weights, one chunk at a time.

The folder holds config, tokenizer and generation settings beside the encoded shards, so that
``headrace.load`` opens it like any model folder and streams the packed bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from accelerate import init_empty_weights
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.offload.chunk import ChunkLayout
from headrace.quant.codec import Codec
from headrace.quant.fold import PendingTensor, TensorReport, default_choice, encode_folder
from headrace.quant.folder import INDEX_NAME, EncodedFolder
from headrace.quant.registry import codec_for_format
from headrace.quant.spec import TensorSpec

from .checkpoint import Checkpoint
from .errors import InputError
from .loading import chosen_dtype, find_folder
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
    format: str | Codec = "nf4",
    dtype: torch.dtype | str | None = None,
    on_tensor: Callable[[TensorReport], None] = lambda report: None,
) -> EncodedFolder:
    """Encode the linear layers of a model (fused experts too) into the folder ``out``.

    ``format`` is a word (``nf4``, ``fp4``, ``int8``, ``int4``, ``fp8``, ``mxfp4``, ``mxfp8``,
    ``nvfp4``) or a codec.  Embeddings, the head, norms and routers keep their type.  One chunk is
    in memory at a time.  An interrupted run goes on where it stopped; a finished folder is
    refused.  ``on_tensor`` hears the error of every tensor.

    Example::

        headrace.quantize("model-folder", "model-nf4")
        model = headrace.load("model-nf4", train="adapters")
    """
    folder, target = find_folder(model), Path(out)
    codec = codec_for_format(format) if isinstance(format, str) else format
    if (target / INDEX_NAME).exists():
        raise InputError(f"{target} holds a finished encoding already; give a new folder")
    config = AutoConfig.from_pretrained(folder)
    kind = chosen_dtype(dtype, config)
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=kind)
    skeleton.tie_weights()
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
    source = {"model": str(folder.absolute()), "bytes": str(checkpoint.index.nbytes)}
    encoded = encode_folder(
        pending, target, choose=default_choice(codec), source=source, on_tensor=on_tensor
    )
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja"):
            if not path.name.endswith(".index.json"):
                shutil.copy2(path, target / path.name)
    checkpoint.index.close()
    return encoded


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
