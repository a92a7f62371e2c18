"""Encode a whole checkpoint into a folder: one tensor in memory at a time, resumable by shard.

Each decoder layer becomes one shard.  A shard appears under its name only when it is complete and
on disk; beside it lies its record until the index is written, so an interrupted run continues
with the first shard that is missing and gives the same bytes.  Peak memory: the largest tensor,
its parts, and a few MiB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from .codec import Codec, Shape
from .folder import (
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    WEIGHT_MAP_NAME,
    EncodedFolder,
    TensorRecord,
    record_from_json,
    stored_specs,
)
from .rounding import slabs
from .shards import ShardFile, ShardWriter, write_json
from .spec import TensorSpec

#: Module names whose weights stay in their own type: small, or sensitive.
KEPT_MODULES: Final = frozenset(
    {
        "classifier",
        "embed_in",
        "embed_out",
        "embed_tokens",
        "gate",
        "lm_head",
        "router",
        "score",
        "shared_expert_gate",
        "word_embeddings",
        "wpe",
        "wte",
    }
)


@final
@dataclass(frozen=True, slots=True)
class PendingTensor:
    """A tensor that will be read when its turn comes."""

    name: str
    spec: TensorSpec
    read: Callable[[], Tensor]
    #: Parts and errors by another way than rounding to nearest (None: that way).
    encode: Callable[[Tensor, Codec], tuple[dict[str, Tensor], dict[str, float]]] | None = None


@final
@dataclass(frozen=True, slots=True)
class TensorReport:
    """What encoding did to one tensor."""

    name: str
    shape: Shape
    codec: str  # "kept" if not encoded
    bytes_before: int
    bytes_after: int
    relative_rms: float  # rms of the error / rms of the tensor; 0 if kept
    largest_error: float
    #: Relative rms errors of the layer's output on calibration data, by what was done.
    output_errors: dict[str, float] = field(default_factory=dict)


ChooseCodec = Callable[[str, TensorSpec], Codec | None]


def pending_from_checkpoint(folder: Path) -> list[PendingTensor]:
    """Return the tensors of a Hugging Face folder's safetensors files, in the files' order."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file")
    pending: list[PendingTensor] = []
    seen: dict[str, Path] = {}
    for path in files:
        shard = ShardFile(path)
        for name, stored in shard.tensors.items():
            if name in seen:
                raise ValueError(f"tensor {name!r} is in both {seen[name]} and {path}")
            seen[name] = path
            pending.append(PendingTensor(name, stored.spec, _reader(shard, name)))
    return pending


def default_choice(codec: Codec) -> ChooseCodec:
    """Return the usual policy: matrices and stacks of matrices of linear layers are encoded.

    Kept: one-dimensional tensors, whatever is not floating point, norms, embeddings, output
    heads and routers (``KEPT_MODULES``).
    """

    def choose(name: str, spec: TensorSpec) -> Codec | None:
        modules = name.split(".")
        if len(spec.shape) < 2 or not spec.dtype.is_floating_point or spec.dtype.itemsize == 1:
            return None
        # Fused stacks of experts are parameters of the experts module itself.
        owners = modules[:-1] if modules[-1] in ("weight", "bias") else modules
        if modules[-1].endswith("bias") or not owners or owners[-1] in KEPT_MODULES:
            return None
        return None if "norm" in owners[-1] else codec

    return choose


def encode_folder(
    pending: Sequence[PendingTensor],
    out: Path,
    *,
    choose: ChooseCodec,
    source: Mapping[str, str],
    on_tensor: Callable[[TensorReport], None],
) -> EncodedFolder:
    """Encode tensors into ``out`` and return the folder, opened.

    ``choose`` names each tensor's codec (None keeps it); ``source`` identifies the checkpoint,
    so that a run is never continued with another one; ``on_tensor`` hears of every tensor, those
    of shards finished earlier included.  Tensors holding NaN or infinities are refused by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / INDEX_NAME).exists():
        raise ValueError(f"{out} already holds a finished encoding; choose another folder")
    records: dict[str, TensorRecord] = {}
    sizes: dict[str, int] = {}
    for shard_name, members in _grouped(pending):
        plan = {item.name: choose(item.name, item.spec) for item in members}
        done = _finished_shard(out, shard_name, members, plan, source)
        if done is None:
            done = _encode_shard(out, shard_name, members, plan, source)
        for item in members:
            record = done[item.name]
            records[item.name] = record
            on_tensor(_report(item, record))
        sizes[shard_name] = (out / shard_name).stat().st_size
    weight_map = {
        stored: record.shard for record in records.values() for stored in record.stored_specs()
    }
    write_json(
        out / WEIGHT_MAP_NAME,
        {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
    )
    index = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "source": dict(source),
        "tensors": {name: record.to_json() for name, record in records.items()},
        "shards": sizes,
    }
    write_json(out / INDEX_NAME, index)
    for shard_name in sizes:
        _record_path(out, shard_name).unlink(missing_ok=True)
    return EncodedFolder(out)


def encoding_error(x: Tensor, codec: Codec, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ``relative_rms`` and ``largest`` of decode(parts) - x, in slabs of scratch."""
    flat, shape = x.reshape(-1), tuple(x.shape)
    squares, error_squares, largest = 0.0, 0.0, 0.0
    for start, stop in slabs(flat.numel(), codec.decode_granule(shape)):
        exact = flat[start:stop].to(torch.float32)
        error = codec.decode_range(parts, shape, start, stop) - exact
        squares += exact.square().sum(dtype=torch.float64).item()
        error_squares += error.square().sum(dtype=torch.float64).item()
        largest = max(largest, error.abs().max().item())
    relative = math.sqrt(error_squares / squares) if squares else 0.0
    return {"relative_rms": relative, "largest": largest}


def _reader(shard: ShardFile, name: str) -> Callable[[], Tensor]:
    return lambda: shard.read(name)


def _group_name(tensor_name: str) -> str:
    """Return the part of a name up to its first number, or the module that owns the tensor."""
    words = tensor_name.split(".")
    for position, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[: position + 1])
    return ".".join(words[:-1]) or tensor_name


def _grouped(pending: Iterable[PendingTensor]) -> Iterator[tuple[str, list[PendingTensor]]]:
    groups: dict[str, list[PendingTensor]] = {}
    for item in pending:
        if any(part in item.name for part in ("/", "\\", "\0")):
            raise ValueError(f"tensor name {item.name!r} cannot be used for a file name")
        groups.setdefault(_group_name(item.name), []).append(item)
    for group, members in groups.items():
        yield f"encoded-{group}.safetensors", members


def _record_path(out: Path, shard_name: str) -> Path:
    return out / f"{shard_name}.record.json"


def _encode_shard(
    out: Path,
    shard_name: str,
    members: Sequence[PendingTensor],
    plan: Mapping[str, Codec | None],
    source: Mapping[str, str],
) -> dict[str, TensorRecord]:
    specs: dict[str, TensorSpec] = {}
    for item in members:
        for name, spec in stored_specs(
            item.name, item.spec.shape, item.spec.dtype, plan[item.name]
        ).items():
            if name in specs:
                raise ValueError(f"two tensors of {shard_name} would be stored as {name!r}")
            specs[name] = spec
    records: dict[str, TensorRecord] = {}
    with ShardWriter(out / shard_name, specs, {"format": "pt"}) as writer:
        for item in members:
            records[item.name] = _encode_one(writer, shard_name, item, plan[item.name])
    write_json(
        _record_path(out, shard_name),
        {
            "source": dict(source),
            "tensors": {name: record.to_json() for name, record in records.items()},
        },
    )
    return records


def _encode_one(
    writer: ShardWriter, shard_name: str, item: PendingTensor, codec: Codec | None
) -> TensorRecord:
    x = item.read()
    if codec is None:
        checksums = {item.name: writer.write(item.name, x)}
        error = None
    else:
        if not bool(torch.isfinite(x).all()):
            count = int((~torch.isfinite(x)).sum())
            raise ValueError(
                f"tensor {item.name!r} holds {count} values that are NaN or infinite and cannot "
                f"be encoded; repair the checkpoint or keep this tensor as it is"
            )
        parts, errors = (codec.encode(x), {}) if item.encode is None else item.encode(x, codec)
        error = encoding_error(x, codec, parts) | errors
        checksums = {
            f"{item.name}_{part}": writer.write(f"{item.name}_{part}", value)
            for part, value in parts.items()
        }
    return TensorRecord(
        item.name, item.spec.shape, item.spec.dtype, codec, shard_name, checksums, error
    )


def _finished_shard(
    out: Path,
    shard_name: str,
    members: Sequence[PendingTensor],
    plan: Mapping[str, Codec | None],
    source: Mapping[str, str],
) -> dict[str, TensorRecord] | None:
    """Return the records of a shard that an earlier run finished; None if there is none."""
    path = _record_path(out, shard_name)
    if not path.is_file() or not (out / shard_name).is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        stored_source, tensors = content["source"], content["tensors"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to redo this shard") from error
    if stored_source != dict(source):
        raise ValueError(
            f"{out} was begun from the source {stored_source}, not {dict(source)}; choose another "
            f"folder or empty it"
        )
    records = {name: record_from_json(name, entry, str(path)) for name, entry in tensors.items()}
    for item in members:
        record = records.get(item.name)
        same = record is not None and (record.shape, record.dtype, record.codec) == (
            item.spec.shape,
            item.spec.dtype,
            plan[item.name],
        )
        if not same or len(records) != len(members):
            was = "absent" if record is None else f"{record.codec} of shape {record.shape}"
            raise ValueError(
                f"{out} was begun with other settings: tensor {item.name!r} is {was} there and "
                f"{plan[item.name]} of shape {item.spec.shape} now; choose another folder"
            )
    return records


def _report(item: PendingTensor, record: TensorRecord) -> TensorReport:
    error = record.error or {"relative_rms": 0.0, "largest": 0.0}
    return TensorReport(
        name=item.name,
        shape=item.spec.shape,
        codec="kept" if record.codec is None else record.codec.name,
        bytes_before=item.spec.nbytes,
        bytes_after=sum(spec.nbytes for spec in record.stored_specs().values()),
        relative_rms=error["relative_rms"],
        largest_error=error["largest"],
        output_errors={key: value for key, value in error.items() if key.startswith("output")},
    )
