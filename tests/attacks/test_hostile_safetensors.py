"""Safetensors files and indexes that must be refused by name, before any tensor is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from headrace.offload.errors import SourceError
from headrace.offload.source import SafetensorsIndex


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_file(path: Path, header: Any, data_bytes: int, *, raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


GOOD = {"a": tensor(), "b": tensor("BF16", [4], [8, 16])}

HEADERS: dict[str, tuple[Any, int, str]] = {
    "truncated data": (GOOD, 15, "truncated.*'b' ends at"),
    "bytes behind": (GOOD, 17, "1 stray bytes behind"),
    "hole": ({"a": tensor(), "b": tensor(offsets=[12, 20])}, 20, "4 stray bytes before 'b'"),
    "overlap": ({"a": tensor(), "b": tensor(offsets=[4, 12])}, 12, "'b' overlaps"),
    "same bytes twice": ({"a": tensor(), "b": tensor()}, 8, "overlaps"),
    "out of range": ({"a": tensor(shape=[1 << 40], offsets=[0, 1 << 42])}, 8, "truncated"),
    "negative": ({"a": tensor(offsets=[-8, 0])}, 8, "impossible byte range"),
    "backwards": ({"a": tensor(offsets=[8, 0])}, 8, "impossible byte range"),
    "offsets as floats": ({"a": tensor(offsets=[0.0, 8.0])}, 8, "impossible byte range"),
    "one offset": ({"a": tensor(offsets=[0])}, 8, "impossible byte range"),
    "shape and range differ": ({"a": tensor(shape=[3])}, 8, "does not fill"),
    "negative extent": ({"a": tensor(shape=[-2])}, 8, "impossible shape"),
    "two negatives": ({"a": tensor(shape=[-1, -2])}, 8, "impossible shape"),
    "extent as bool": ({"a": tensor(shape=[True, 2])}, 8, "impossible shape"),
    "shape overflows": ({"a": tensor(shape=[1 << 40] * 3)}, 8, "impossible shape"),
    "a thousand axes": ({"a": tensor(shape=[1] * 1000)}, 8, "impossible shape"),
    "unknown dtype": ({"a": tensor(dtype="F31")}, 8, "unknown dtype 'F31'"),
    "dtype as number": ({"a": tensor(dtype=5)}, 8, "unknown dtype"),
    "dtype as list": ({"a": tensor(dtype=["F32"])}, 8, "unknown dtype"),
    "half a byte": ({"a": tensor("F4", [3], [0, 1])}, 1, "does not fill"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "no header of"),
    "more fields": ({"a": tensor() | {"code": "x"}}, 8, "no header of"),
    "tensor as list": ({"a": [1]}, 8, "no header of"),
    "odd metadata": ({"__metadata__": {"a": 1}, "a": tensor()}, 8, "__metadata__"),
    "header as list": ([], 0, "not a JSON object"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(tmp_path: Path, name: str) -> None:
    header, data_bytes, reason = HEADERS[name]
    path = write_file(tmp_path / "model.safetensors", header, data_bytes)
    with pytest.raises(SourceError, match=rf"model\.safetensors: .*{reason}"):
        SafetensorsIndex.open(path)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b"{", "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply|not valid JSON"),
        (b"\x80\x04\x95", "not valid JSON"),
    ],
)
def test_headers_that_are_no_json(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = write_file(tmp_path / "model.safetensors", None, 0, raw=raw)
    with pytest.raises(SourceError, match=reason):
        SafetensorsIndex.open(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, (1 << 63).to_bytes(8, "little"), b"\xff" * 100])
def test_files_too_short_for_their_header(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(SourceError, match="truncated or no safetensors file"):
        SafetensorsIndex.open(path)


def test_headers_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 30).to_bytes(8, "little"))
    os.truncate(path, 1 << 31)  # sparse
    with pytest.raises(SourceError, match=r"claims 1,073,741,824 bytes"):
        SafetensorsIndex.open(path)


def write_index(folder: Path, weight_map: Any, **more: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | more))
    return path


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../secret.safetensors"}, "leads out of the folder"),
        ({"a": "/etc/x.safetensors"}, "leads out of the folder"),
        ({"a": "sub/x.safetensors"}, "leads out of the folder"),
        ({"a": "..\\x.safetensors"}, "leads out of the folder"),
        ({"a": "x\0.safetensors"}, "leads out of the folder"),
        ({"a": "pytorch_model.bin"}, "no safetensors file"),
        ({"a": 5}, "no safetensors file"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"a": "absent.safetensors"}, r"absent\.safetensors: it is missing"),
        ({"z": "shard.safetensors"}, r"'z' is in shard\.safetensors, which does not hold it"),
    ],
)
def test_hostile_indexes(tmp_path: Path, weight_map: Any, reason: str) -> None:
    write_file(tmp_path / "shard.safetensors", GOOD, 16)
    write_index(tmp_path, weight_map)
    with pytest.raises(SourceError, match=reason) as caught:
        SafetensorsIndex.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_pickles_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin is a pickle.*convert"):
        SafetensorsIndex.open(tmp_path)


def test_pipes_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="not a regular file"):
        SafetensorsIndex.open(tmp_path)
