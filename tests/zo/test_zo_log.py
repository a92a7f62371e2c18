"""The replay log as a file: durability, torn tails, damage, hostile bytes, kill -9."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.offload.errors import StoreFormatError, StoreLockedError
from headrace.zo.log import MAGIC, LogHeader, ReplayLog, StepRecord, read_log
from headrace.zo.replay import replay
from headrace.zo.settings import ZOSettings

HEADER = LogHeader("abc", {"method": ZOSettings().to_json(), "trained": {"w": [2, 3]}}, 2, 1)


def record(step: int) -> StepRecord:
    return StepRecord(step, step * 7, 100 + step, 1e-3, 1e-2, (step + 0.1, step - 0.1), (0.5,))


def written(path: Path, count: int) -> bytes:
    with ReplayLog.create(path, HEADER) as log:
        for step in range(count):
            log.append(record(step))
    return path.read_bytes()


def test_round_trip_and_size(tmp_path: Path) -> None:
    data = written(tmp_path / "log", 5)
    header, records = read_log(tmp_path / "log")
    assert header == HEADER
    assert records == tuple(record(step) for step in range(5))
    assert HEADER.record_bytes == 80
    assert (len(data) - len(written(tmp_path / "log2", 4))) == HEADER.record_bytes


def test_nan_losses_of_a_skipped_step_survive(tmp_path: Path) -> None:
    skipped = StepRecord(0, 1, 2, 1e-3, 1e-2, (math.nan, math.inf), (0.0,), skipped=True)
    with ReplayLog.create(tmp_path / "log", HEADER) as log:
        log.append(skipped)
    _, (found,) = read_log(tmp_path / "log")
    assert found.skipped and math.isnan(found.losses[0]) and found.losses[1] == math.inf


def test_append_continues_where_the_log_ended(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", 6)
    written(tmp_path / "parts", 2)
    log, records = ReplayLog.open(tmp_path / "parts")
    assert len(records) == 2
    with log:
        with pytest.raises(ValueError, match="cannot append step 4"):
            log.append(record(4))
        for step in range(2, 6):
            log.append(record(step))
    assert (tmp_path / "parts").read_bytes() == whole


def test_every_torn_length_recovers_the_whole_records(tmp_path: Path) -> None:
    data = written(tmp_path / "log", 3)
    begin = len(data) - 3 * HEADER.record_bytes
    for length in range(begin, len(data) + 1):
        torn = tmp_path / "torn"
        torn.write_bytes(data[:length])
        whole, rest = divmod(length - begin, HEADER.record_bytes)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log, records = ReplayLog.open(torn)
        log.close()
        assert len(records) == whole
        assert bool(caught) == bool(rest)
        assert torn.read_bytes() == data[: length - rest]


def test_a_last_record_of_zeros_is_a_torn_tail(tmp_path: Path) -> None:
    data = written(tmp_path / "log", 3)
    (tmp_path / "log").write_bytes(data[: -HEADER.record_bytes] + bytes(HEADER.record_bytes + 9))
    with pytest.warns(UserWarning, match="not a whole record"):
        log, records = ReplayLog.open(tmp_path / "log")
    log.close()
    assert len(records) == 2


def test_damage_before_the_tail_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    data = bytearray(written(tmp_path / "log", 4))
    data[-4 * HEADER.record_bytes + 20] ^= 1
    (tmp_path / "log").write_bytes(data)
    with pytest.raises(StoreFormatError, match=r"record 0 .* checksum"):
        ReplayLog.open(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == bytes(data)


def test_records_cannot_be_swapped_or_dropped(tmp_path: Path) -> None:
    data, size = written(tmp_path / "log", 4), HEADER.record_bytes
    head, parts = data[: -4 * size], [data[len(data) - k * size :][:size] for k in (4, 3, 2, 1)]
    for order in ([0, 2, 1, 3], [1, 2, 3], [0, 2, 3]):
        (tmp_path / "log").write_bytes(head + b"".join(parts[k] for k in order))
        with pytest.raises(StoreFormatError):
            read_log(tmp_path / "log")


def test_two_writers_and_overwriting_are_refused(tmp_path: Path) -> None:
    with ReplayLog.create(tmp_path / "log", HEADER):
        with pytest.raises(StoreLockedError, match="another run"):
            ReplayLog.open(tmp_path / "log")
        with pytest.raises(FileExistsError, match="open it to continue"):
            ReplayLog.create(tmp_path / "log", HEADER)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def sealed(text: bytes) -> bytes:
    data = MAGIC + struct.pack("<I", len(text)) + text
    return data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


GOOD = {"base": "b", "settings": {}, "losses": 1, "grads": 1}
HOSTILE = {
    "empty": b"",
    "magic only": MAGIC,
    "pickle": b"\x80\x04\x95" + bytes(50),
    "huge header": MAGIC + struct.pack("<I", 0xFFFFFFFF) + bytes(100),
    "header past the end": MAGIC + struct.pack("<I", 5000) + b"{}",
    "no checksum": MAGIC + struct.pack("<I", 2) + b"{}" + bytes(8),
    "not utf-8": sealed(b"\xff\xfe"),
    "not json": sealed(b"{"),
    "deep json": sealed(b"[" * 200_000),
    "a list": sealed(b"[]"),
    "missing field": sealed(json.dumps({"base": "b"}).encode()),
    "extra field": sealed(json.dumps(GOOD | {"x": 1}).encode()),
    "text for a number": sealed(json.dumps(GOOD | {"losses": "1"}).encode()),
    "true for a number": sealed(json.dumps(GOOD | {"grads": True}).encode()),
    "no losses": sealed(json.dumps(GOOD | {"losses": 0}).encode()),
    "a billion losses": sealed(json.dumps(GOOD | {"losses": 10**9}).encode()),
    "negative grads": sealed(json.dumps(GOOD | {"grads": -1}).encode()),
}


@pytest.mark.parametrize("attack", list(HOSTILE))
def test_hostile_files_are_refused_by_name(attack: str, tmp_path: Path) -> None:
    path = tmp_path / "attack.zolog"
    path.write_bytes(HOSTILE[attack])
    for read in (read_log, ReplayLog.open):
        with pytest.raises(StoreFormatError, match=r"attack\.zolog"):
            read(path)
    assert path.read_bytes() == HOSTILE[attack]


METHOD = ZOSettings().to_json()
HOSTILE_SETTINGS = {
    "unknown brick": METHOD | {"brick": "os.system"},
    "no brick": {},
    "brick of a list": METHOD | {"brick": ["ZOSettings"]},
    "not settings": {"brick": "TwoPoint", "count": 1},
    "unknown field": METHOD | {"command": "x"},
    "missing field": {k: v for k, v in METHOD.items() if k != "eps"},
    "negative eps": METHOD | {"eps": -1.0},
    "text eps": METHOD | {"eps": "1"},
    "true seed": METHOD | {"seed": True},
    "huge seed": METHOD | {"seed": 2**64},
    "estimator is a number": METHOD | {"estimator": 3},
    "estimator is a control": METHOD | {"estimator": {"brick": "Standardize"}},
    "controls hold an estimator": METHOD | {"controls": [{"brick": "TwoPoint", "count": 1}]},
    "too many directions": METHOD | {"estimator": {"brick": "TwoPoint", "count": 10**9}},
    "unknown kind": METHOD
    | {"directions": {"brick": "Dense", "kind": "evil", "rounding": "nearest", "minimum": None}},
}


@pytest.mark.parametrize("attack", list(HOSTILE_SETTINGS))
def test_hostile_settings_are_refused(attack: str) -> None:
    with pytest.raises(StoreFormatError):
        ZOSettings.from_json(HOSTILE_SETTINGS[attack])


@pytest.mark.parametrize(
    ("trained", "match"),
    [
        ({"w": [3, 2]}, "shape"),
        ({"w": [2, 3], "x": [1]}, "lacks 1 trained"),
        ({"w": "23"}, "shape"),
        ({"w": [2, -3]}, "shape"),
        ([], "does not list"),
    ],
)
def test_logs_of_another_model_are_refused(trained: object, match: str) -> None:
    import torch

    header = LogHeader("b", {"method": METHOD, "trained": trained}, 2, 1)
    with pytest.raises(StoreFormatError, match=match):
        list(replay([("w", torch.zeros(2, 3))], header, [record(0)]))


def test_records_with_impossible_numbers_are_refused() -> None:
    import torch

    bad = StepRecord(0, 0, 0, math.inf, 1e-2, (0.0, 0.0), (0.5,))
    with pytest.raises(StoreFormatError, match="no run writes"):
        list(replay([("w", torch.zeros(2, 3))], HEADER, [bad]))


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_fuzzed_files_never_crash_nor_invent_records(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "fuzz.zolog"
    path.unlink(missing_ok=True)
    good = written(path, 3)
    edited = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(edited)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "tail"]))
        if kind == "flip" and at < len(edited):
            edited[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del edited[at : at + data.draw(st.integers(1, 90))]
        elif kind == "insert":
            edited[at:at] = data.draw(st.binary(min_size=1, max_size=90))
        else:
            edited += data.draw(st.binary(min_size=1, max_size=200))
    path.write_bytes(edited)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            header, records = read_log(path)
        except StoreFormatError:
            return
    assert header == HEADER
    assert records == tuple(record(step) for step in range(len(records)))


CHILD = """
import sys
from headrace.zo.log import LogHeader, ReplayLog, StepRecord
log = ReplayLog.create(sys.argv[1], LogHeader("abc", {}, 2, 1))
step = 0
while True:
    log.append(StepRecord(step, 1, 2, 1e-3, 1e-2, (0.5, 0.25), (0.5,)))
    sys.stdout.write(f"{step}\\n")
    sys.stdout.flush()
    step += 1
"""


def test_kill_9_loses_no_acknowledged_step(tmp_path: Path) -> None:
    for attempt, wait_for in enumerate((0, 3, 17)):
        path = tmp_path / f"log{attempt}"
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        acknowledged = -1
        while acknowledged < wait_for:
            acknowledged = int(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read().split("\n")
        acknowledged = max([acknowledged, *(int(line) for line in rest[:-1] if line)])
        child.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log, records = ReplayLog.open(path)
        log.close()
        assert acknowledged + 1 <= len(records) <= acknowledged + 2
