"""Reads safetensors headers and shard indexes without trusting them.  No torch.

What is returned has been checked: names are unique, dtypes known, shapes and byte ranges agree,
ranges lie inside the file, do not overlap and leave no holes, shards are plain files of the same
folder.  Anything else is a ``SourceError`` that names the file and the reason.  No tensor byte
is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from .errors import SourceError
from .strict_json import parse_json

# Bits per element of every dtype of the format (github.com/huggingface/safetensors).
DTYPE_BITS: Mapping[str, int] = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32},
    **{"U64": 64, "I64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
MAX_HEADER_BYTES = 100_000_000
_MAX_ELEMENTS = 1 << 60
_MAX_RANK = 64


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a shard: ``offset`` is its first byte in the file at ``path``."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What one shard holds; ``file_bytes`` is its size when the header was read."""

    path: Path
    file_bytes: int
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def refuse(path: Path, reason: str) -> NoReturn:
    """Raise the error that names a shard or index and what is wrong with it."""
    raise SourceError(f"{path}: {reason}")


def _open_regular(path: Path) -> tuple[int, int]:
    """Return descriptor and size; links are followed, since download caches are made of them."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        refuse(path, "it is missing. Download the checkpoint again")
    except OSError as error:
        refuse(path, f"it cannot be opened ({error.strerror})")
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        refuse(path, "it is not a regular file")
    return fd, status.st_size


def _parse_object(data: bytes, path: Path, what: str) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        refuse(path, f"its {what} is not valid JSON: {error}")
    if not isinstance(value, dict):
        refuse(path, f"its {what} is not a JSON object")
    return value


def read_header(path: Path) -> ShardHeader:
    """Return the checked header of one safetensors file."""
    fd, file_bytes = _open_regular(path)
    with os.fdopen(fd, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or 8 + length > file_bytes:
            refuse(
                path,
                f"it is truncated or no safetensors file: {file_bytes:,} bytes cannot hold a "
                f"header of {length:,}",
            )
        if length > MAX_HEADER_BYTES:
            refuse(path, f"its header claims {length:,} bytes, at most {MAX_HEADER_BYTES:,}")
        text = file.read(length)
    header = _parse_object(text, path, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse(path, "its __metadata__ is not a mapping of text to text")
    start, data_bytes = 8 + length, file_bytes - 8 - length
    entries = {name: _entry(path, name, item, start) for name, item in header.items()}
    _check_ranges(path, entries, start, data_bytes)
    return ShardHeader(path, file_bytes, entries, metadata)


def _entry(path: Path, name: str, item: Any, start: int) -> TensorEntry:
    where = f"tensor {name!r:.200}"
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        refuse(path, f"{where} has no header of dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        refuse(path, f"{where} has the unknown dtype {dtype!r:.40}")
    # bool is an int in Python, and no extent.
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_RANK
        or any(type(extent) is not int or not 0 <= extent <= _MAX_ELEMENTS for extent in shape)
        or prod(shape) > _MAX_ELEMENTS
    ):
        refuse(path, f"{where} has the impossible shape {shape!r:.80}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        refuse(path, f"{where} has the impossible byte range {offsets!r:.80}")
    bits = prod(shape) * DTYPE_BITS[dtype]
    nbytes = offsets[1] - offsets[0]
    if bits % 8 or bits // 8 != nbytes:
        refuse(
            path,
            f"{where} of dtype {dtype} and shape {shape!r:.80} does not fill the {nbytes:,} bytes "
            f"it is given",
        )
    return TensorEntry(name, path, dtype, tuple(shape), start + offsets[0], nbytes)


def _check_ranges(
    path: Path, entries: Mapping[str, TensorEntry], start: int, data_bytes: int
) -> None:
    reached = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset < reached:
            refuse(path, f"tensor {entry.name!r:.200} overlaps the one before it")
        if entry.offset > reached:
            refuse(
                path, f"there are {entry.offset - reached:,} stray bytes before {entry.name!r:.200}"
            )
        reached += entry.nbytes
        if reached > start + data_bytes:
            refuse(
                path,
                f"it is truncated: {entry.name!r:.200} ends at byte {reached:,}, the file at "
                f"{start + data_bytes:,}. Download the checkpoint again",
            )
    if reached != start + data_bytes:
        refuse(path, f"there are {start + data_bytes - reached:,} stray bytes behind the tensors")


def read_shard_map(path: Path) -> dict[str, str]:
    """Return tensor name -> shard file name of a ``*.safetensors.index.json``."""
    fd, file_bytes = _open_regular(path)
    with os.fdopen(fd, "rb") as file:
        if file_bytes > MAX_HEADER_BYTES:
            refuse(path, f"it has {file_bytes:,} bytes, at most {MAX_HEADER_BYTES:,}")
        index = _parse_object(file.read(), path, "text")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(path, "it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            refuse(path, f"it maps {name!r:.200} to {shard!r:.200}, which is no safetensors file")
        if shard != os.path.basename(shard) or "\0" in shard or "\\" in shard:
            refuse(path, f"it maps {name!r:.200} to {shard!r:.200}, which leads out of the folder")
    return weight_map
