"""A folder of encoded tensors: its index, and reading it back with every claim checked.

FORMAT (version 1).  A folder holds ``encoded.index.json`` and the safetensors files it names.

* The index MUST be a JSON object with ``format`` = ``"headrace-encoded"``, ``version`` = 1,
  ``source`` (an object of strings that identifies what was encoded), ``tensors`` and ``shards``.
* ``tensors`` maps each tensor's name to ``shape``, ``dtype`` (what it was, and decodes to),
  ``shard`` (a file name without folders), ``codec`` (the parameters of the codec, or null for a
  tensor kept as it is), ``parts`` (name of each stored tensor -> xxh3-128 hex digest of its
  bytes) and ``error`` (relative rms and largest absolute error, null if kept).
* A part of tensor ``a.b.weight`` is stored as ``a.b.weight_PART``; a kept tensor under its own
  name.  Shapes and types of parts MUST be those of the codec's ``spec``.
* ``shards`` maps each file name to its size in bytes.
* ``model.safetensors.index.json`` SHOULD map every stored name to its file, as in any sharded
  checkpoint, so that readers of safetensors need nothing else.
* The index is written last: a folder without it is incomplete.  There is one shard a decoder
  layer, so that a layer is one contiguous read; data starts at a multiple of 4096 bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from .codec import Codec, Shape
from .registry import codec_from_parameters
from .shards import ShardFile, checksum
from .spec import TensorSpec

INDEX_NAME: Final = "encoded.index.json"
WEIGHT_MAP_NAME: Final = "model.safetensors.index.json"
FORMAT_NAME: Final = "headrace-encoded"
FORMAT_VERSION: Final = 1
DTYPE_NAMES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@final
@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What the index says of one tensor."""

    name: str
    shape: Shape
    dtype: torch.dtype
    codec: Codec | None
    shard: str
    checksums: dict[str, str]  # stored name -> digest
    error: dict[str, float] | None

    def stored_specs(self) -> dict[str, TensorSpec]:
        """Return stored name -> spec of what the shard holds for this tensor."""
        return stored_specs(self.name, self.shape, self.dtype, self.codec)

    def to_json(self) -> dict[str, Any]:
        """Return the record as the index holds it."""
        return {
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "codec": None if self.codec is None else self.codec.parameters(),
            "shard": self.shard,
            "parts": self.checksums,
            "error": self.error,
        }


def stored_specs(
    name: str, shape: Shape, dtype: torch.dtype, codec: Codec | None
) -> dict[str, TensorSpec]:
    """Return stored name -> spec for a tensor that is encoded, or kept (``codec`` None)."""
    if codec is None:
        return {name: TensorSpec(shape, dtype)}
    return {f"{name}_{part}": spec for part, spec in codec.spec(shape).items()}


def record_from_json(name: str, entry: Any, where: str) -> TensorRecord:
    """Check and return one entry of an index; ``where`` names the file in errors."""
    try:
        shape, dtype_name, shard = entry["shape"], entry["dtype"], entry["shard"]
        parameters, checksums, error = entry["codec"], entry["parts"], entry["error"]
    except (KeyError, TypeError) as fault:
        raise ValueError(f"{where}: entry of tensor {name!r} lacks {fault}") from fault
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{where}: tensor {name!r} has shape {shape!r}")
    if dtype_name not in DTYPE_NAMES:
        raise ValueError(f"{where}: tensor {name!r} has dtype {dtype_name!r}, which is not known")
    if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
        raise ValueError(f"{where}: tensor {name!r} is in shard {shard!r}; give a plain file name")
    codec = None
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise ValueError(f"{where}: tensor {name!r} has codec {parameters!r}")
        try:
            codec = codec_from_parameters(parameters)
        except ValueError as fault:
            raise ValueError(f"{where}: tensor {name!r}: {fault}") from fault
    dtype = DTYPE_NAMES[dtype_name]
    expected = stored_specs(name, tuple(shape), dtype, codec)
    if not isinstance(checksums, dict) or set(checksums) != set(expected):
        raise ValueError(f"{where}: tensor {name!r} must list the parts {sorted(expected)}")
    return TensorRecord(name, tuple(shape), dtype, codec, shard, checksums, error)


@final
class EncodedFolder:
    """A complete folder of encoded tensors, opened for reading.

    Opening reads the index and the headers of all shards and checks them against each other;
    reading a tensor checks its bytes.  A damaged, foreign or hostile folder is a ``ValueError``
    that names the file and the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index_path = path / INDEX_NAME
        if not index_path.is_file():
            raise ValueError(
                f"{path} holds no {INDEX_NAME}: it is not a folder of encoded tensors, or its "
                f"encoding was interrupted (run it again to finish)"
            )
        try:
            index = json.loads(index_path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{index_path} is not JSON: {error}") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT_NAME:
            raise ValueError(f"{index_path} is not of format {FORMAT_NAME!r}")
        if index.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{index_path} has version {index.get('version')!r}; this program reads "
                f"{FORMAT_VERSION}"
            )
        tensors, shards = index.get("tensors"), index.get("shards")
        if not isinstance(tensors, dict) or not isinstance(shards, dict):
            raise ValueError(f"{index_path} lacks its tables of tensors and shards")
        self.source: dict[str, str] = index.get("source", {})
        self.records: dict[str, TensorRecord] = {
            name: record_from_json(name, entry, str(index_path)) for name, entry in tensors.items()
        }
        self._shards = self._open_shards(shards)

    def read_parts(self, name: str) -> dict[str, Tensor]:
        """Read the parts of an encoded tensor by the codec's names, checksums verified."""
        record = self._record(name)
        if record.codec is None:
            raise ValueError(f"tensor {name!r} of {self.path} is kept as it is; use read_kept")
        return {
            part: self._read(record, f"{name}_{part}") for part in record.codec.spec(record.shape)
        }

    def read_kept(self, name: str) -> Tensor:
        """Read a tensor that was kept as it is, checksum verified."""
        record = self._record(name)
        if record.codec is not None:
            raise ValueError(
                f"tensor {name!r} of {self.path} is encoded as {record.codec.name!r}; use "
                f"read_parts or decode"
            )
        return self._read(record, name)

    def decode(self, name: str) -> Tensor:
        """Read and decode a tensor to its own dtype (a kept one is returned as it is)."""
        record = self._record(name)
        if record.codec is None:
            return self.read_kept(name)
        return record.codec.decode(self.read_parts(name), record.shape, record.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, headers not counted."""
        return sum(
            spec.nbytes
            for record in self.records.values()
            for spec in record.stored_specs().values()
        )

    def shard_file(self, name: str) -> ShardFile:
        """Return the open shard that holds a tensor, for reading its parts in place."""
        return self._shards[self._record(name).shard]

    def _record(self, name: str) -> TensorRecord:
        if name not in self.records:
            raise ValueError(f"{self.path} holds no tensor {name!r}")
        return self.records[name]

    def _read(self, record: TensorRecord, stored_name: str) -> Tensor:
        value = self._shards[record.shard].read(stored_name)
        found = checksum(value)
        if found != record.checksums[stored_name]:
            raise ValueError(
                f"{self.path / record.shard}: the bytes of {stored_name!r} have checksum {found}, "
                f"the index says {record.checksums[stored_name]}: the file is damaged"
            )
        return value

    def _open_shards(self, sizes: dict[str, Any]) -> dict[str, ShardFile]:
        shards: dict[str, ShardFile] = {}
        for record in self.records.values():
            if record.shard not in shards:
                path = self.path / record.shard
                if not path.is_file():
                    raise ValueError(f"{path} is missing; tensor {record.name!r} is in it")
                size = path.stat().st_size
                if sizes.get(record.shard) != size:
                    raise ValueError(
                        f"{path} has {size} bytes, the index says {sizes.get(record.shard)}"
                    )
                shards[record.shard] = ShardFile(path)
            held = shards[record.shard].tensors
            for stored_name, spec in record.stored_specs().items():
                if stored_name not in held or held[stored_name].spec != spec:
                    found = held[stored_name].spec if stored_name in held else "nothing"
                    raise ValueError(
                        f"{self.path / record.shard}: {stored_name!r} must be {spec}, found {found}"
                    )
        return shards
