"""Frozen tensors come from their shards bit for bit, wherever they lie in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from headrace.offload.budget import Budget, Tier
from headrace.offload.errors import LaneError, SourceError
from headrace.offload.faults import Operation, ScriptedFaults
from headrace.offload.io import DiskLanes
from headrace.offload.pool import SlabPool
from headrace.offload.source import ReadPlan, SafetensorsIndex
from headrace.offload.timeline import Timeline

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def bits(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def lanes() -> Iterator[DiskLanes]:
    with DiskLanes(timeline=Timeline()) as made:
        yield made


def read_all(index: SafetensorsIndex, names: list[str], lanes: DiskLanes) -> dict[str, bytes]:
    plan = ReadPlan(index, names, lanes=lanes)
    pool = SlabPool(Budget(Tier.HOST, limit_bytes=1 << 28))
    slab = pool.acquire("chunk", max(plan.nbytes, 1))
    plan.read(slab.view, label="chunk").wait()
    found = {}
    for name in names:
        offset, nbytes = plan.offsets[name], index[name].nbytes
        assert offset % DTYPES[index[name].dtype].itemsize == 0
        assert offset + nbytes <= plan.nbytes
        found[name] = bytes(slab.view[offset : offset + nbytes])
    pool.release(slab)
    pool.close()
    return found


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, lanes: DiskLanes) -> None:
    tensors = {name: tensor(dtype, (3, 5, 7)) for name, dtype in DTYPES.items()}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with SafetensorsIndex.open(tmp_path) as index:
        assert set(index) == set(tensors)
        for name in DTYPES:
            assert index[name].dtype == name
            assert index[name].shape == (3, 5, 7)
        assert index["scalar"].shape == ()
        assert index.metadata() == {"model.safetensors": {"format": "pt"}}
        found = read_all(index, list(tensors), lanes)
    assert found == {name: bits(value) for name, value in tensors.items()}


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=8),
    chosen=st.sets(st.integers(0, 7), min_size=1),
)
def test_any_choice_of_tensors_of_any_size(
    tmp_path: Path, lanes: DiskLanes, sizes: list[int], chosen: set[int]
) -> None:
    tensors = {
        f"t{i}": tensor(torch.uint8 if i % 2 else torch.float16, (nbytes,), i)
        for i, nbytes in enumerate(sizes)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    names = [f"t{i}" for i in chosen if i < len(sizes)] or ["t0"]
    with SafetensorsIndex.open(tmp_path / "model.safetensors") as index:
        assert read_all(index, names, lanes) == {name: bits(tensors[name]) for name in names}


def _shards(folder: Path) -> dict[str, Tensor]:
    tensors = {f"layers.{i}.weight": tensor(torch.bfloat16, (300, 70), i) for i in range(6)}
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        held = dict(list(tensors.items())[2 * shard : 2 * shard + 2])
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("given_as", ["folder", "index"])
def test_tensors_of_several_shards_are_one_transfer(
    tmp_path: Path, lanes: DiskLanes, given_as: str
) -> None:
    tensors = _shards(tmp_path)
    path = tmp_path if given_as == "folder" else tmp_path / "model.safetensors.index.json"
    with SafetensorsIndex.open(path) as index:
        assert index.nbytes == 6 * 300 * 70 * 2
        names = ["layers.5.weight", "layers.0.weight", "layers.1.weight"]
        assert read_all(index, names, lanes) == {name: bits(tensors[name]) for name in names}


def test_links_of_download_caches_are_followed(tmp_path: Path, lanes: DiskLanes) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(5)}, tmp_path / "blobs" / "0123abcd")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123abcd")
    with SafetensorsIndex.open(tmp_path / "snapshot") as index:
        assert read_all(index, ["a"], lanes) == {"a": bits(torch.ones(5))}


def test_neighbours_are_read_together_and_strangers_are_not(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.zeros(50_000) for i in range(10)}
    save_file(tensors, tmp_path / "model.safetensors")
    script = ScriptedFaults([])
    with (
        DiskLanes(timeline=Timeline(), faults=script) as lanes,
        SafetensorsIndex.open(tmp_path) as index,
    ):
        read_all(index, ["t1", "t2", "t3", "t7"], lanes)
        reads = [call for call in script.seen if call.operation is Operation.READ]
        assert len(reads) == 2
        assert all(call.offset % 4096 == 0 for call in reads)
        plan = ReadPlan(index, ["t1", "t2", "t3", "t7"], lanes=lanes)
        assert 800_000 <= plan.nbytes <= 800_000 + 4 * 4096


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """A shard whose tensors follow each other in the given order, whatever their alignment."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    entries, cursor = {}, 0
    for name, value in tensors.items():
        entries[name] = {
            "dtype": words[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [cursor, cursor + value.nbytes],
        }
        cursor += value.nbytes
    header = json.dumps(entries).encode()
    header = header.ljust(-(-(8 + len(header)) // 4096) * 4096 - 8)
    data = b"".join(bits(value) for value in tensors.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_codes_behind_an_odd_number_of_scalars_are_held_once(
    tmp_path: Path, lanes: DiskLanes
) -> None:
    """The order of an encoded folder: wide numbers first, then the bytes, 4 off the 8-byte grid."""
    tensors = {
        "nested_offset": tensor(torch.float32, ()),
        "codes": tensor(torch.uint8, (1_000_001,), 1),
        "absmax": tensor(torch.uint8, (20_000,), 2),
    }
    write_shard(tmp_path / "model.safetensors", tensors)
    with SafetensorsIndex.open(tmp_path) as index:
        plan = ReadPlan(index, list(tensors), lanes=lanes)
        assert plan.nbytes == plan.read_bytes <= index.nbytes + 2 * 4096
        assert read_all(index, list(tensors), lanes) == {n: bits(t) for n, t in tensors.items()}


def test_a_tensor_that_begins_inside_an_element_is_moved(tmp_path: Path, lanes: DiskLanes) -> None:
    tensors = {
        "odd": tensor(torch.uint8, (3,)),
        "wide": tensor(torch.float64, (500,), 1),
        "half": tensor(torch.bfloat16, (7,), 2),
        "single": tensor(torch.float32, (90,), 3),
    }
    write_shard(tmp_path / "model.safetensors", tensors)
    with SafetensorsIndex.open(tmp_path) as index:
        assert read_all(index, list(tensors), lanes) == {n: bits(t) for n, t in tensors.items()}


def test_a_plan_without_bytes_reads_nothing(tmp_path: Path, lanes: DiskLanes) -> None:
    save_file({"a": torch.empty(0), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    with SafetensorsIndex.open(tmp_path) as index:
        plan = ReadPlan(index, ["a"], lanes=lanes)
        assert plan.nbytes == 0
        plan.read(memoryview(bytearray()), label="nothing").wait()


def test_unknown_tensors_and_small_views_are_named(tmp_path: Path, lanes: DiskLanes) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with SafetensorsIndex.open(tmp_path) as index:
        with pytest.raises(KeyError, match=r"holds no tensor 'b'"):
            ReadPlan(index, ["b"], lanes=lanes)
        plan = ReadPlan(index, ["a"], lanes=lanes)
        with pytest.raises(ValueError, match=r"layers\.0 needs 4,096 bytes"):
            plan.read(memoryview(bytearray(100)), label="layers.0")


def test_a_shard_that_changed_since_its_header_was_read_is_refused(
    tmp_path: Path, lanes: DiskLanes
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3000)}, path)
    index = SafetensorsIndex.open(path)
    os.truncate(path, 5000)
    plan = ReadPlan(index, ["a"], lanes=lanes)
    with pytest.raises(SourceError, match=r"model\.safetensors: it had .* bytes"):
        plan.read(memoryview(bytearray(plan.nbytes)), label="chunk")


def test_a_shard_truncated_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3000)}, path)
    with (
        DiskLanes(timeline=Timeline()) as lanes,
        SafetensorsIndex.open(path) as index,
    ):
        plan = ReadPlan(index, ["a"], lanes=lanes)
        index.file(path)
        os.truncate(path, 5000)
        transfer = plan.read(memoryview(bytearray(plan.nbytes)), label="layers.0")
        with pytest.raises(LaneError, match=r"layers\.0.*truncated"):
            transfer.wait()


@pytest.mark.parametrize("content", ["nothing", "missing"])
def test_a_folder_without_a_checkpoint_says_what_is_wanted(tmp_path: Path, content: str) -> None:
    folder = tmp_path / content
    if content == "nothing":
        folder.mkdir()
    with pytest.raises(SourceError, match=r"model\.safetensors|missing"):
        SafetensorsIndex.open(folder)


def test_the_index_is_a_mapping(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    index = SafetensorsIndex.open(tmp_path)
    assert sorted(index) == ["a", "b"]
    assert len(index) == 2
    assert "c" not in index
    assert index.get("c") is None
