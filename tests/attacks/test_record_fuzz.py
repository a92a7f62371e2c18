"""Whatever bytes a store's or a checkpoint's small files hold, parsers refuse them by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.offload.errors import SourceError, StoreFormatError
from headrace.offload.extents import Region, place
from headrace.offload.record import (
    CommitRecord,
    Layout,
    Valid,
    decode,
    encode,
)
from headrace.offload.safetensors_header import read_header, read_shard_map

PATH = Path("/nowhere/commit.json")

_PLACED, _MEMBER_BYTES = place([Region("a", 5000), Region("b", 1)], [1.0, 2.0], extent_count=2)
LAYOUT = Layout("0" * 32, "step", 1, {"model": "m"}, None, _MEMBER_BYTES, _PLACED)
RECORD = CommitRecord("0" * 32, 3, 3, {"loss": 1.5}, {"a": Valid(0, "0" * 16)}, "blobs.1.bin", {})

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
JSON_VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def _mutations(value: Any) -> list[tuple[Any, ...]]:
    """Paths to every node of a JSON value."""
    found: list[tuple[Any, ...]] = [()]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        found += [(key, *rest) for rest in _mutations(inner)]
    return found


@st.composite
def mutated(draw: st.DrawFn, body: dict[str, Any]) -> Any:
    """A correct body with one node replaced by anything."""
    body = json.loads(json.dumps(body))
    path = draw(st.sampled_from(_mutations(body)))
    value = draw(JSON_VALUES)
    if not path:
        return value
    node: Any = body
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return body


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(StoreFormatError, match=str(PATH)):
        decode("commit", data, PATH)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_bit_of_an_encoded_record(position: int, bit: int) -> None:
    data = bytearray(encode("commit", RECORD.to_body()))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(StoreFormatError, match=str(PATH)):
        decode("commit", bytes(data), PATH)


@settings(max_examples=500, deadline=None)
@given(mutated(RECORD.to_body()))  # type: ignore[arg-type]
def test_any_record_is_read_whole_or_refused(body: Any) -> None:
    try:
        record = CommitRecord.from_body(body, LAYOUT, PATH)
    except StoreFormatError as error:
        assert str(PATH) in str(error)
        return
    assert CommitRecord.from_body(record.to_body(), LAYOUT, PATH) == record
    assert set(record.regions) <= {"a", "b"}


@settings(max_examples=500, deadline=None)
@given(mutated(LAYOUT.to_body()))  # type: ignore[arg-type]
def test_any_layout_is_read_whole_or_refused(body: Any) -> None:
    try:
        layout = Layout.from_body(body, PATH)
    except StoreFormatError as error:
        assert str(PATH) in str(error)
        return
    assert Layout.from_body(layout.to_body(), PATH) == layout
    for region in layout.regions:
        for extent in region.extents:
            for segment in extent:
                assert segment.offset + segment.nbytes <= layout.member_bytes[segment.member]


def test_records_survive_the_round_trip() -> None:
    assert Layout.from_body(LAYOUT.to_body(), PATH) == LAYOUT
    body = decode("commit", encode("commit", RECORD.to_body()), PATH)
    assert CommitRecord.from_body(body, LAYOUT, PATH) == RECORD


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated(HEADER), st.integers(-40, 40))
def test_any_safetensors_header_is_read_whole_or_refused(header: Any, extra_bytes: int) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(max(32 + extra_bytes, 0))
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "model.safetensors")
        path.write_bytes(data)
        try:
            shard = read_header(path)
        except SourceError as error:
            assert str(path) in str(error)
            return
        assert sum(entry.nbytes for entry in shard.entries.values()) == max(32 + extra_bytes, 0)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_checkpoint(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "model.safetensors")
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"model\.safetensors"):
            read_header(path)
        with pytest.raises(SourceError, match=r"model\.safetensors"):
            read_shard_map(path)
