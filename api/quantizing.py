"""``headrace.quantize``: a checkpoint as a folder of encoded weights, one chunk at a time.

The folder holds config, tokenizer and generation settings beside the encoded shards, so that
``headrace.load`` opens it like any model folder and streams the packed bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from headrace.offload.chunk import ChunkLayout
from headrace.offload.source import SafetensorsIndex
from headrace.quant.calibrated import WORDS_WITHOUT_DATA, encode_calibrated
from headrace.quant.codec import Codec
from headrace.quant.fold import PendingTensor, TensorReport, encode_folder
from headrace.quant.folder import INDEX_NAME, EncodedFolder
from headrace.quant.shards import write_json
from headrace.quant.spec import TensorSpec

from .calibrating import CalibrationBatch, Calibrator
from .checkpoint import Checkpoint
from .encoding_plan import PlannedWeight, plan_encoding
from .encoding_record import parts_digest, settings_record, weight_groups
from .eora_adapter import EORA_FOLDER, write_eora_adapter
from .errors import InputError
from .loading import chosen_dtype, find_folder
from .native_checkpoint import take_quantization_settings
from .structure import Role, cut

Encode = Callable[[Tensor, Codec], tuple[dict[str, Tensor], dict[str, float]]]


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
    calibration: CalibrationBatch | None = None,
    eora_rank: int = 0,
    device: str | torch.device = "cpu",
    on_tensor: Callable[[TensorReport], None] = lambda report: None,
) -> EncodedFolder:
    """Encode the linear layers of a model (fused experts too) into the folder ``out``.

    ``format`` is a word (``nf4``, ``fp4``, ``int8``, ``int4``, ``fp8``, ``mxfp4``, ``mxfp8``,
    ``nvfp4``, ``nf4-fitted``, ``hqq``, ``gptq``), a codec, or a codec's parameters.  Embeddings,
    the head, norms, routers and the modules that ``keep`` names (in full, or by the end of their
    name) keep their type.  One chunk is in memory at a time.  An interrupted run goes on where it
    stopped; a finished folder is refused.  ``on_tensor`` hears the error of every tensor.

    ``calibration`` (``read_calibration`` makes it of a JSONL file) chooses codes by GPTQ: layer by
    layer on ``device``, activations in files between layers, the checkpoint read twice, a layer
    held twice.  ``gptq`` means INT4 in groups of 128 and needs it; ``hqq`` (INT4 with a minimum)
    and ``nf4-fitted`` (NF4 whose scales give the least error, so not the bytes that bitsandbytes
    would choose, though it reads them) need none.  ``eora_rank`` above 0 adds ``OUT/eora``, a
    LoRA adapter that makes up for most of what the encoding lost and is where fine-tuning should
    begin; stacks of experts get none, which is said in a warning.

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
    refuse_without_data(format, calibration, eora_rank)
    if (target / INDEX_NAME).exists():
        raise InputError(f"{target} holds a finished encoding already; give a new folder")
    skeleton, kind = skeleton_of(folder, dtype, eager_experts=calibration is not None)
    planned = plan_encoding(skeleton, format, keep=keep)
    if eora_rank:
        _say_what_stays_uncorrected(planned)
    checkpoint = Checkpoint(skeleton, folder, kind)
    reader = _ChunkReader(checkpoint)
    pending: list[PendingTensor] = []
    chunks = cut(skeleton)
    calibrator = None
    if calibration is not None:
        calibrator = Calibrator(
            skeleton,
            checkpoint,
            chunks,
            planned,
            calibration,
            work=target / "calibration",
            device=torch.device(device),
            eora_rank=eora_rank,
        )
    for chunk in chunks:
        layout = ChunkLayout.pack(
            chunk.name, [(n, p.shape, p.dtype) for n, p in chunk.parameters.items()]
        )
        for slot in layout.slots:
            spec = TensorSpec(tuple(slot.shape), slot.dtype)
            encode: Encode | None = None
            if slot.name in planned and calibrator is not None and chunk.role is Role.LAYER:
                encode = calibrator.encoder(chunk, slot.name)
            elif slot.name in planned and format in WORDS_WITHOUT_DATA:
                encode = _without_data
            read = _reader(reader, layout, slot.name)
            pending.append(PendingTensor(slot.name, spec, read, encode))
    encoded = encode_folder(
        pending,
        target,
        choose=lambda name, spec: planned[name].codec if name in planned else None,
        source=source_of(folder, format, keep=keep, dtype=kind)
        | calibration_source(calibration, eora_rank),
        on_tensor=on_tensor,
    )
    if calibrator is not None:
        corrections = calibrator.corrections()
        if corrections:
            write_eora_adapter(
                corrections,
                target / EORA_FOLDER,
                base=str(target.absolute()),
                inputs_first=any(isinstance(module, Conv1D) for module in skeleton.modules()),
            )
        shutil.rmtree(target / "calibration")
    copy_companions(folder, target)
    _describe(target, encoded, planned, format, keep)
    checkpoint.index.close()
    return encoded


def skeleton_of(
    folder: Path, dtype: torch.dtype | str | None, *, eager_experts: bool
) -> tuple[PreTrainedModel, torch.dtype]:
    """Return the model of a checkpoint that is not encoded yet, on ``meta``, and its dtype.

    ``eager_experts``: each expert's products are its own, so that they can be watched.
    """
    config = AutoConfig.from_pretrained(folder)
    if take_quantization_settings(config):
        raise InputError(
            f"{folder} is encoded already: headrace.load and headrace tune stream it as it is"
        )
    kind = chosen_dtype(dtype, config)
    if eager_experts:
        config._experts_implementation = "eager"
    with init_empty_weights(include_buffers=False):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=kind)
    plain: Any = skeleton
    plain.tie_weights()
    return skeleton, kind


def refuse_without_data(
    encoding: object, calibration: CalibrationBatch | None, eora_rank: int
) -> None:
    """Refuse what can only be computed from calibration data if there is none."""
    if calibration is None and (encoding == "gptq" or eora_rank):
        raise InputError(
            "GPTQ and EoRA are computed from calibration data: give a file (--calibration "
            "data.jsonl), or use format 'hqq' or 'nf4', which need none"
        )


def _say_what_stays_uncorrected(planned: Mapping[str, PlannedWeight]) -> None:
    stacks = {name: math.prod(w.shape) for name, w in planned.items() if len(w.shape) > 2}
    if stacks:
        share = sum(stacks.values()) / sum(math.prod(w.shape) for w in planned.values())
        warnings.warn(
            f"EoRA corrects matrices: {len(stacks)} stacks of experts such as "
            f"{next(iter(stacks))!r}, {share:.0%} of the encoded weights, get calibrated codes "
            f"and no correction. (PEFT adapts a stack by adding to the whole of it; an encoded "
            f"one is decoded expert by expert.)",
            stacklevel=3,
        )


def _without_data(x: Tensor, codec: Codec) -> tuple[dict[str, Tensor], dict[str, float]]:
    return encode_calibrated(x, None, codec).parts, {}


def calibration_source(calibration: CalibrationBatch | None, eora_rank: int) -> dict[str, str]:
    """Return what identifies the calibration of an encoding; empty without one."""
    if calibration is None:
        return {}
    return {"calibration": calibration.digest, "eora_rank": str(eora_rank)}


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


@contextmanager
def quantize_report(
    total_bytes: int, *, quiet: bool
) -> Iterator[tuple[list[TensorReport], Callable[[TensorReport], None]]]:
    """A list that fills with every tensor's report, and the callback that fills it.

    Unless ``quiet``, a bar on standard error moves with the bytes of the checkpoint, and above it
    stands a line for each encoded tensor.
    """
    reports: list[TensorReport] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=False),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console, disable=quiet) as progress:
        bar = progress.add_task("encoding", total=total_bytes)

        def show(report: TensorReport) -> None:
            reports.append(report)
            progress.advance(bar, report.bytes_before)
            if report.codec == "kept":
                return
            line = f"{report.name}: {report.codec}, relative error {report.relative_rms:.4f}"
            if report.output_errors:
                errors = report.output_errors
                line += f"; of its output {errors['output_nearest']:.4f} -> {errors['output']:.4f}"
            if "output_corrected" in report.output_errors:
                line += f" -> {report.output_errors['output_corrected']:.4f}"
            progress.console.print(line, highlight=False)

        yield reports, show


def _reader(reader: _ChunkReader, layout: ChunkLayout, name: str) -> Callable[[], Tensor]:
    return lambda: reader.read(layout, name)
