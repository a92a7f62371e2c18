"""``headrace quantize --layout transformers``: an encoded folder that opens without this library.

One chunk in memory at a time, one shard a chunk.  A shard appears under its name when it is
complete and on disk; beside it lies its record until the index is written, so that an interrupted
run goes on with the first shard that is missing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from headrace.offload.chunk import ChunkLayout
from headrace.quant.calibrated import WORDS_WITHOUT_DATA
from headrace.quant.codec import Codec
from headrace.quant.fold import TensorReport, encoding_error
from headrace.quant.foreign_layouts import foreign_settings, foreign_tensors
from headrace.quant.gptq_packed import GptqPackedCodec, packed_from_groups
from headrace.quant.gptq_refine import fitted_parts
from headrace.quant.int4_group import Int4GroupCodec
from headrace.quant.shards import ShardWriter, write_json
from headrace.quant.spec import TensorSpec

from .calibrating import CalibrationBatch, Calibrator
from .checkpoint import Checkpoint
from .encoding_plan import PlannedWeight, kept_linears, plan_encoding
from .errors import InputError
from .loading import find_folder
from .quantizing import (
    calibration_source,
    copy_companions,
    refuse_without_data,
    skeleton_of,
    source_of,
)
from .structure import ModuleChunk, Role, cut

WEIGHT_MAP_NAME = "model.safetensors.index.json"


def quantize_for_transformers(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "nf4",
    keep: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    calibration: CalibrationBatch | None = None,
    device: str | torch.device = "cpu",
    on_tensor: Callable[[TensorReport], None] = lambda report: None,
) -> Path:
    """Encode a model into a folder that transformers opens by itself; return the folder.

    ``format``: ``nf4``, ``nf4-fitted``, ``fp4`` and ``int8`` become bitsandbytes' layouts, ``fp8``
    fine-grained FP8, ``mxfp4`` gpt-oss' (of its experts), ``gptq`` (which needs ``calibration``)
    that of GPTQ.
    ``headrace.load`` streams such folders as they are.  A weight that the layout has no place
    for, such as fused experts, is refused by name; ``keep`` leaves modules as they are.
    Memory, resuming and reports are those of ``headrace.quantize``.

    >>> import headrace
    >>> from transformers import AutoConfig
    >>> folder = headrace.quantize_for_transformers("model-folder", "for-transformers")
    >>> AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
    'bitsandbytes'
    >>> headrace.load(folder, train="adapters", device="cpu").close()
    """
    folder, target = find_folder(model), Path(out)
    refuse_without_data(format, calibration, 0)
    if (target / WEIGHT_MAP_NAME).exists():
        raise InputError(f"{target} holds a finished encoding already; give a new folder")
    skeleton, kind = skeleton_of(folder, dtype, eager_experts=calibration is not None)
    checkpoint = Checkpoint(skeleton, folder, kind)
    planned = plan_encoding(skeleton, format, layout="transformers", keep=keep)
    stored = next(iter(planned.values())).codec
    source = {"layout": "transformers"} | source_of(folder, format, keep=keep, dtype=kind)
    source |= calibration_source(calibration, 0)
    chunks = cut(skeleton)
    target.mkdir(parents=True, exist_ok=True)
    calibrator = None
    if calibration is not None:
        planned = {name: _calibrated(weight) for name, weight in planned.items()}
        calibrator = Calibrator(
            skeleton,
            checkpoint,
            chunks,
            planned,
            calibration,
            work=target / "calibration",
            device=torch.device(device),
            eora_rank=0,
        )
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for chunk in chunks:
        shard, record = f"model-{chunk.name}.safetensors", target / f"{chunk.name}.record.json"
        done = _finished(record, target / shard, source)
        if done is None:
            tensors, reports = _encode_chunk(
                skeleton,
                checkpoint,
                chunk,
                planned,
                calibrator,
                encode=fitted_parts if format in WORDS_WITHOUT_DATA else _nearest,
            )
            specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}
            with ShardWriter(target / shard, specs, {"format": "pt"}) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
            done = {
                "source": source,
                "tensors": {name: tensor.nbytes for name, tensor in tensors.items()},
                "reports": [dataclasses.asdict(report) for report in reports],
            }
            write_json(record, done)
        for entry in done["reports"]:
            on_tensor(TensorReport(**{**entry, "shape": tuple(entry["shape"])}))
        weight_map |= dict.fromkeys(done["tensors"], shard)
        total_bytes += sum(done["tensors"].values())
    copy_companions(folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    kept = kept_linears(skeleton, planned)
    config["quantization_config"] = foreign_settings(stored, kept, kind)
    config["dtype"] = str(kind).removeprefix("torch.")
    write_json(target / "config.json", config)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(target / WEIGHT_MAP_NAME, index)
    for chunk in chunks:
        (target / f"{chunk.name}.record.json").unlink(missing_ok=True)
    if calibrator is not None:
        shutil.rmtree(target / "calibration")
    checkpoint.index.close()
    return target


def _calibrated(weight: PlannedWeight) -> PlannedWeight:
    """Codes of GPTQ's layout are chosen in the groups that it packs."""
    if not isinstance(weight.codec, GptqPackedCodec):
        return weight
    groups = Int4GroupCodec(block_size=weight.codec.block_size, scale_dtype="float16")
    return dataclasses.replace(weight, codec=groups)


def _finished(record: Path, shard: Path, source: Mapping[str, str]) -> dict[str, Any] | None:
    if not record.is_file() or not shard.is_file():
        return None
    try:
        done: dict[str, Any] = json.loads(record.read_bytes())
        begun = done["source"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record} is damaged ({error}); delete it to redo this shard") from error
    if begun != dict(source):
        raise InputError(
            f"{record.parent} was begun from {begun}, not {dict(source)}; give another folder"
        )
    return done


def _encode_chunk(
    skeleton: PreTrainedModel,
    checkpoint: Checkpoint,
    chunk: ModuleChunk,
    planned: Mapping[str, PlannedWeight],
    calibrator: Calibrator | None,
    *,
    encode: Callable[[Tensor, Any], dict[str, Tensor]],
) -> tuple[dict[str, Tensor], list[TensorReport]]:
    layout = ChunkLayout.pack(
        chunk.name, [(n, p.shape, p.dtype) for n, p in chunk.parameters.items()]
    )
    stored: dict[str, Tensor] = {}
    reports: list[TensorReport] = []
    kept: dict[str, Tensor] = {}
    for name, value in checkpoint.convert(layout).items():
        if name not in planned:
            kept[name] = value.contiguous()
            reports.append(
                TensorReport(name, tuple(value.shape), "kept", value.nbytes, value.nbytes, 0.0, 0.0)
            )
            continue
        weight = planned[name]
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"{name!r} holds values that are NaN or infinite and cannot be encoded; repair "
                f"the checkpoint or keep its module"
            )
        exact = (value.transpose(-2, -1) if weight.transposed else value).contiguous()
        errors: dict[str, float] = {}
        if calibrator is not None and chunk.role is Role.LAYER:
            parts, errors = calibrator.encoder(chunk, name)(exact, weight.codec)
        else:
            parts = encode(exact, weight.codec)
        error = encoding_error(exact, weight.codec, parts)
        codec, parts = _packed(weight.codec, parts, weight.shape)
        made = foreign_tensors(name, codec, parts, weight.shape, value.dtype)
        stored |= made
        reports.append(
            TensorReport(
                name,
                tuple(value.shape),
                codec.name,
                value.nbytes,
                sum(tensor.nbytes for tensor in made.values()),
                error["relative_rms"],
                error["largest"],
                errors,
            )
        )
    reverted = revert_weight_conversion(skeleton, kept) if kept else {}
    return stored | {n: t.contiguous() for n, t in reverted.items()}, reports


def _nearest(x: Tensor, codec: Codec) -> dict[str, Tensor]:
    return codec.encode(x)


def _packed(
    codec: Codec, parts: dict[str, Tensor], shape: tuple[int, ...]
) -> tuple[Codec, dict[str, Tensor]]:
    if isinstance(codec, Int4GroupCodec):
        return packed_from_groups(codec, parts, shape)
    return codec, parts
