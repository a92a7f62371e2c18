"""Safetensors files, read and written range by range with plain file calls.

Reading maps nothing into memory: a tensor costs its own bytes and no page of the file is charged
to the process.  Headers come from strangers, so every shape, type and range in them is checked
before use.  Writing knows all sizes first: the header goes out, the file gets its full length,
and tensors are written at their offsets in any order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
import xxhash
from torch import Tensor

from .spec import TensorSpec

#: Torch type of every word that safetensors headers use and torch has.
DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_HEADER_BYTES: Final = 100_000_000  # the limit of the safetensors format
_ALIGNMENT: Final = 4096


@final
@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    spec: TensorSpec
    offset_bytes: int  # from the start of the file


@final
class ShardFile:
    """The tensors of one safetensors file; opened at each read, so it holds no descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = _read_header(path)

    def read(self, name: str) -> Tensor:
        """Read one tensor to ordinary memory."""
        stored = self.tensors.get(name)
        if stored is None:
            raise ValueError(f"{self.path} holds no tensor {name!r}")
        buffer = torch.empty(stored.spec.nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], stored.offset_bytes + done)
                if count == 0:
                    raise ValueError(
                        f"{self.path} ended at byte {stored.offset_bytes + done} within tensor "
                        f"{name!r}: it was truncated while in use"
                    )
                done += count
        finally:
            os.close(descriptor)
        return buffer.view(stored.spec.dtype).view(stored.spec.shape)


@final
class ShardWriter:
    """A new safetensors file whose tensors are written in any order; use as a context manager.

    The file appears under its name, complete and on disk, when the context ends without an
    error; until then it is ``NAME.partial``.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._header, self._tensors, self._file_bytes = file_layout(specs, metadata)
        self._checksums: dict[str, str] = {}
        self._descriptor = -1

    def __enter__(self) -> ShardWriter:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._descriptor = os.open(self._partial, flags, 0o644)
        try:
            os.posix_fallocate(self._descriptor, 0, max(self._file_bytes, 1))
            write_at(self._descriptor, memoryview(self._header), 0)
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> str:
        """Write one tensor; return the xxh3-128 hex digest of its bytes."""
        stored = self._tensors[name]
        if tuple(tensor.shape) != stored.spec.shape or tensor.dtype != stored.spec.dtype:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; the "
                f"header of {self._path} says {stored.spec.shape} and {stored.spec.dtype}"
            )
        data = tensor_bytes(tensor)
        write_at(self._descriptor, data, stored.offset_bytes)
        self._checksums[name] = digest = xxhash.xxh3_128_hexdigest(data)
        return digest

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self._abandon()
            return
        missing = sorted(self._tensors.keys() - self._checksums.keys())
        if missing:
            self._abandon()
            raise ValueError(f"{self._path} was closed before {missing[:3]} were written")
        os.ftruncate(self._descriptor, self._file_bytes)
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        os.rename(self._partial, self._path)
        sync_folder(self._path.parent)

    def _abandon(self) -> None:
        os.close(self._descriptor)
        self._partial.unlink(missing_ok=True)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor without copying a contiguous one."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` from ``offset`` on."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def checksum(tensor: Tensor) -> str:
    """Return the xxh3-128 hex digest of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically and durably."""
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        data = json.dumps(content, indent=1).encode()
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(partial, path)
    sync_folder(path.parent)


def file_layout(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor], int]:
    """Return header bytes, places and file size; wide types first, so that all are aligned."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)  # stable
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    cursor = 0
    for name in order:
        spec = specs[name]
        entries[name] = {
            "dtype": words[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [cursor, cursor + spec.nbytes],
        }
        cursor += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces are legal after the JSON: data then starts at a page, for direct reads.
    data_start = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT
    header = (data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8)
    places: dict[str, StoredTensor] = {}
    cursor = data_start
    for name in order:
        places[name] = StoredTensor(specs[name], cursor)
        cursor += specs[name].nbytes
    return header, places, cursor


def _read_header(path: Path) -> dict[str, StoredTensor]:
    def refuse(why: str) -> ValueError:
        return ValueError(f"{path} is not a usable safetensors file: {why}")

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER_BYTES):
            raise refuse(f"header length {length} in a file of {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise refuse("header is not an object")
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = DTYPES[entry["dtype"]]
            shape = entry["shape"]
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"entry of tensor {name!r} is malformed ({error!r})") from error
        if not isinstance(shape, list) or not all(
            type(n) is int and 0 <= n for n in [*shape, begin, end]
        ):
            raise refuse(f"tensor {name!r} has shape {shape} and range {begin}..{end}")
        spec = TensorSpec(tuple(shape), dtype)
        if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise refuse(
                f"tensor {name!r} of shape {shape} and dtype {dtype} claims bytes "
                f"{begin}..{end} of {size - 8 - length}"
            )
        tensors[name] = StoredTensor(spec, 8 + length + begin)
    return tensors
