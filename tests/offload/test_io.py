"""Disk lanes: every byte moves or an error says which did not; nothing hangs or outlives them."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.offload.budget import Budget, Tier
from headrace.offload.errors import LaneError, StuckLaneError
from headrace.offload.faults import Fault, FaultKind, Operation, ScriptedFaults
from headrace.offload.files import BufferedIOWarning, address_of
from headrace.offload.io import DirectFile, DiskLanes, Part
from headrace.offload.pool import SlabPool
from headrace.offload.timeline import LaneName, Timeline

MIB = 1 << 20
SIZES = [1, 511, 512, 4095, 4096, 4097, 3 * MIB, 3 * MIB + 123]


@pytest.fixture
def pool() -> Iterator[SlabPool]:
    made = SlabPool(Budget(Tier.HOST, limit_bytes=64 * MIB))
    yield made
    made.close()


def lanes_with(*faults: Fault, **options: Any) -> tuple[DiskLanes, ScriptedFaults]:
    script = ScriptedFaults(faults)
    options = {"read_threads": 2, "write_threads": 2, "request_bytes": MIB} | options
    return DiskLanes(timeline=Timeline(), faults=script, **options), script


def pattern(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_come_back(tmp_path: Path, pool: SlabPool, nbytes: int) -> None:
    data = pattern(nbytes)
    slab = pool.acquire("chunk", nbytes)
    lanes, _ = lanes_with()
    with lanes, DirectFile.create(tmp_path / "file", nbytes=nbytes + 4096) as file:
        slab.view[:nbytes] = data
        lanes.write(file, 4096, slab.view[:nbytes], label="chunk").wait()
        assert (tmp_path / "file").read_bytes()[4096 : 4096 + nbytes] == data
        slab.view[:] = bytes(slab.nbytes)
        lanes.read(file, 4096, slab.view[:nbytes], label="chunk").wait()
        assert slab.view[:nbytes] == data
        assert not any(slab.view[nbytes:])
    pool.release(slab)


@pytest.mark.parametrize("shift", [0, 1, 8, 100])
@pytest.mark.parametrize("nbytes", [1, 5000, 2 * MIB + 77])
def test_views_off_the_grid_are_copied(tmp_path: Path, shift: int, nbytes: int) -> None:
    data = pattern(nbytes)
    view = memoryview(bytearray(nbytes + shift))[shift:]
    lanes, _ = lanes_with()
    with lanes, DirectFile.create(tmp_path / "file", nbytes=nbytes) as file:
        view[:] = data
        lanes.write(file, 0, view, label="chunk").wait()
        view[:] = bytes(nbytes)
        lanes.read(file, 0, view, label="chunk").wait()
    assert view == data


def test_read_only_memory_can_be_written(tmp_path: Path) -> None:
    lanes, _ = lanes_with()
    with lanes, DirectFile.create(tmp_path / "file", nbytes=8192) as file:
        lanes.write(file, 0, memoryview(b"x" * 8192), label="chunk").wait()
    assert (tmp_path / "file").read_bytes() == b"x" * 8192


def test_a_file_on_a_local_disk_is_direct(tmp_path: Path) -> None:
    with DirectFile.create(tmp_path / "file", nbytes=4096) as file:
        if not file.direct:
            pytest.skip("this filesystem refuses direct I/O")
        assert file.alignment in (512, 1024, 2048, 4096)
        assert fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT


def test_the_last_page_of_a_file_may_be_short(tmp_path: Path, pool: SlabPool) -> None:
    data = pattern(4096 * 3 + 1000)
    (tmp_path / "shard").write_bytes(data)
    slab = pool.acquire("chunk", 8192)
    lanes, _ = lanes_with()
    with lanes, DirectFile.open(tmp_path / "shard") as file:
        transfer = lanes.read(file, 8192, slab.view, label="tail", wanted_bytes=4096 + 1000)
        transfer.wait()
        assert transfer.nbytes == 5096
    assert slab.view[:5096] == data[8192:]
    pool.release(slab)


def test_requests_start_in_the_order_given(tmp_path: Path) -> None:
    lanes, script = lanes_with(read_threads=1, request_bytes=4096)
    views = [memoryview(bytearray(3 * 4096)) for _ in range(4)]
    with lanes, DirectFile.create(tmp_path / "file", nbytes=12 * 4096) as file:
        script.seen.clear()
        for index, view in enumerate(views):
            lanes.read(file, index * 3 * 4096, view, label=str(index))
    assert [call.offset for call in script.seen] == [4096 * i for i in range(12)]


def test_parts_of_one_transfer_take_turns(tmp_path: Path) -> None:
    lanes, script = lanes_with(read_threads=1, request_bytes=4096)
    view = memoryview(bytearray(6 * 4096))
    with (
        lanes,
        DirectFile.create(tmp_path / "a", nbytes=16384) as a,
        DirectFile.create(tmp_path / "b", nbytes=16384) as b,
    ):
        script.seen.clear()
        parts = [Part(a, 0, view[:16384], 16384), Part(b, 0, view[16384:], 8192)]
        lanes.transfer_parts(Operation.READ, parts, label="striped").wait()
    assert [call.path.name for call in script.seen] == ["a", "b", "a", "b", "a", "a"]


@pytest.mark.parametrize("got_bytes", [0, 1, 100, 4096, 4097, MIB - 4096])
@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE])
def test_short_results_are_continued(
    tmp_path: Path, pool: SlabPool, operation: Operation, got_bytes: int
) -> None:
    nbytes = 2 * MIB + 5
    data = pattern(nbytes)
    slab = pool.acquire("chunk", nbytes)
    fault = Fault(FaultKind.SHORT, operation, got_bytes=got_bytes, times=2)
    lanes, script = lanes_with(fault, read_threads=1, write_threads=1)
    with lanes, DirectFile.create(tmp_path / "file", nbytes=nbytes) as file:
        slab.view[:nbytes] = data
        lanes.write(file, 0, slab.view[:nbytes], label="chunk").wait()
        slab.view[:] = bytes(slab.nbytes)
        lanes.read(file, 0, slab.view[:nbytes], label="chunk").wait()
    assert slab.view[:nbytes] == data
    least = 2 * 3  # two directions of three requests, had nothing been short
    assert len(script.seen) > least
    pool.release(slab)


@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE])
def test_interrupted_calls_are_repeated(tmp_path: Path, operation: Operation) -> None:
    view = memoryview(bytearray(pattern(MIB)))
    lanes, _ = lanes_with(Fault(FaultKind.ERROR, operation, code=errno.EINTR, times=3))
    with lanes, DirectFile.create(tmp_path / "file", nbytes=MIB) as file:
        lanes.write(file, 0, view, label="chunk").wait()
        view[:] = bytes(MIB)
        lanes.read(file, 0, view, label="chunk").wait()
    assert view == pattern(MIB)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE])
def test_an_error_names_everything_and_stops_the_lanes(
    tmp_path: Path, operation: Operation, code: int
) -> None:
    fault = Fault(FaultKind.ERROR, operation, nth=2, code=code)
    lanes, _ = lanes_with(fault, read_threads=1, write_threads=1, request_bytes=4096)
    view = memoryview(bytearray(3 * 4096))
    path = tmp_path / "file"
    with lanes, DirectFile.create(path, nbytes=3 * 4096) as file:
        move = lanes.read if operation is Operation.READ else lanes.write
        transfer = move(file, 0, view, label="layers.3")
        with pytest.raises(LaneError) as caught:
            transfer.wait()
        message = str(caught.value)
        for part in ("layers.3", "4,096 bytes", "offset 4,096", str(path), errno.errorcode[code]):
            assert part in message
        cause = caught.value.__cause__
        assert isinstance(cause, OSError)
        assert (cause.errno, cause.filename) == (code, str(path))
        with pytest.raises(LaneError) as again:
            transfer.wait()
        assert str(again.value) == message
        for call in (lanes.read, lanes.write):
            with pytest.raises(LaneError, match="have stopped") as later:
                call(file, 0, view, label="layers.4")
            assert isinstance(later.value.__cause__, OSError)


def test_transfers_behind_a_failure_fail_too(tmp_path: Path) -> None:
    hang = Fault(FaultKind.HANG, Operation.READ, seconds=20.0)
    lanes, script = lanes_with(hang, Fault(FaultKind.ERROR, Operation.READ), read_threads=1)
    view = memoryview(bytearray(4096))
    with lanes, DirectFile.create(tmp_path / "file", nbytes=4096) as file:
        first = lanes.read(file, 0, view, label="first")
        second = lanes.read(file, 0, view, label="second")
        script.release()
        for transfer in (first, second):
            with pytest.raises(LaneError, match=transfer.label):
                transfer.wait()


def test_a_file_that_lost_its_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lanes, _ = lanes_with()
    with lanes, DirectFile.create(path, nbytes=16384) as file:
        os.truncate(path, 5000)
        transfer = lanes.read(file, 0, memoryview(bytearray(16384)), label="chunk")
        with pytest.raises(LaneError, match=r"stopped at 5,000 bytes.*5,000 bytes"):
            transfer.wait()


def test_a_hook_sees_all_bytes_of_a_read(tmp_path: Path) -> None:
    data = pattern(5 * 4096)
    (tmp_path / "file").write_bytes(data)
    view, seen = memoryview(bytearray(5 * 4096)), []
    lanes, _ = lanes_with(request_bytes=4096)
    with lanes, DirectFile.open(tmp_path / "file") as file:
        lanes.read(file, 0, view, label="x", hook=lambda: seen.append(bytes(view))).wait()
    assert seen == [data]


def test_what_a_hook_raises_fails_its_transfer(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ValueError("checksum differs")

    view = memoryview(bytearray(4096))
    for direction in ("read", "write"):
        lanes, _ = lanes_with()
        with lanes, DirectFile.create(tmp_path / direction, nbytes=4096) as file:
            move = lanes.read if direction == "read" else lanes.write
            with pytest.raises(LaneError, match="checksum differs") as caught:
                move(file, 0, view, label="chunk", hook=refuse).wait()
            assert isinstance(caught.value.__cause__, ValueError)


def test_a_transfer_waits_for_the_one_it_comes_after(tmp_path: Path) -> None:
    lanes, script = lanes_with(Fault(FaultKind.HANG, Operation.WRITE, seconds=20.0))
    source, target = memoryview(bytearray(b"n" * 4096)), memoryview(bytearray(4096))
    with lanes, DirectFile.create(tmp_path / "file", nbytes=4096) as file:
        write = lanes.write(file, 0, source, label="write")
        read = lanes.read(file, 0, target, label="read", after=[write])
        assert script.hanging.wait(10)
        assert not any(call.operation is Operation.READ for call in script.seen)
        assert not read.done()
        script.release()
        read.wait()
    assert target == source


def test_a_hanging_disk_is_reported_with_lane_transfer_and_seconds(tmp_path: Path) -> None:
    hang = Fault(FaultKind.HANG, Operation.READ, seconds=20.0)
    lanes, script = lanes_with(hang, hang_timeout_seconds=0.1)
    with lanes, DirectFile.create(tmp_path / "file", nbytes=4096) as file:
        transfer = lanes.read(file, 0, memoryview(bytearray(4096)), label="layers.7")
        with pytest.raises(StuckLaneError, match=r"disk_read is stuck for \d.*layers\.7.*offset 0"):
            transfer.wait()
        script.release()
        transfer.wait()


def test_closing_over_a_hanging_disk_reports_it_too(tmp_path: Path) -> None:
    hang = Fault(FaultKind.HANG, Operation.WRITE, seconds=20.0)
    lanes, script = lanes_with(hang, hang_timeout_seconds=0.1, write_threads=1)
    file = DirectFile.create(tmp_path / "file", nbytes=4096)
    view = memoryview(bytearray(4096))
    with pytest.raises(StuckLaneError, match="disk_write is stuck"), lanes:
        hanging = lanes.write(file, 0, view, label="layers.7")
        queued = lanes.write(file, 0, view, label="layers.8")
        behind = lanes.read(file, 0, view, label="layers.9", after=[queued])
    for transfer in (hanging, queued, behind):
        with pytest.raises(StuckLaneError, match=transfer.label):
            transfer.wait()
    script.release()
    file.close()


def test_a_caller_may_set_its_own_limit(tmp_path: Path) -> None:
    lanes, script = lanes_with(Fault(FaultKind.HANG, Operation.READ, seconds=20.0))
    with lanes, DirectFile.create(tmp_path / "file", nbytes=4096) as file:
        transfer = lanes.read(file, 0, memoryview(bytearray(4096)), label="layers.7")
        with pytest.raises(StuckLaneError, match=r"layers\.7.*within 0\.05 seconds"):
            transfer.wait(timeout_seconds=0.05)
        script.release()
        transfer.wait()


def _lane_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("headrace-disk")]


def test_no_thread_outlives_the_block(tmp_path: Path) -> None:
    lanes, _ = lanes_with()
    with lanes, DirectFile.create(tmp_path / "file", nbytes=MIB) as file:
        lanes.write(file, 0, memoryview(bytearray(MIB)), label="chunk")
        assert _lane_threads()
        assert not any(t.daemon for t in threading.enumerate() if t.name in _lane_threads())
    assert not _lane_threads()
    with pytest.raises(LaneError, match="not open"):
        lanes.write(file, 0, memoryview(bytearray(512)), label="late")


def test_a_failure_that_nobody_waited_for_is_raised_at_the_end(tmp_path: Path) -> None:
    lanes, _ = lanes_with(Fault(FaultKind.ERROR, Operation.WRITE))
    with (
        DirectFile.create(tmp_path / "file", nbytes=4096) as file,
        pytest.raises(LaneError, match="have stopped"),
        lanes,
    ):
        lanes.write(file, 0, memoryview(bytearray(4096)), label="forgotten")


def test_a_file_is_closed_only_when_its_transfers_have_ended(tmp_path: Path) -> None:
    lanes, script = lanes_with(Fault(FaultKind.HANG, Operation.WRITE, seconds=20.0))
    with lanes:
        file = DirectFile.create(tmp_path / "file", nbytes=8192)
        fd = file.fileno()
        transfer = lanes.write(file, 0, memoryview(b"x" * 8192), label="chunk")
        assert script.hanging.wait(10)
        file.close()
        assert os.fstat(fd).st_size == 8192
        with pytest.raises(ValueError, match="closed"):
            lanes.write(file, 0, memoryview(b"x" * 8192), label="late")
        script.release()
        transfer.wait()
        with pytest.raises(ValueError, match="closed"):
            file.fileno()
    assert (tmp_path / "file").read_bytes() == b"x" * 8192


def test_leaving_by_an_exception_drops_what_has_not_started(tmp_path: Path) -> None:
    lanes, script = lanes_with(
        Fault(FaultKind.HANG, Operation.WRITE, seconds=20.0), write_threads=1
    )
    file = DirectFile.create(tmp_path / "file", nbytes=16384)
    view = memoryview(bytearray(4096))
    with pytest.raises(KeyError), lanes:
        first = lanes.write(file, 0, view, label="first")
        second = lanes.write(file, 4096, view, label="second")
        assert script.hanging.wait(10)
        threading.Timer(0.05, script.release).start()
        raise KeyError("the block's own error")
    assert first.done()
    with pytest.raises(LaneError, match="closed before"):
        second.wait()
    assert not _lane_threads()
    file.close()


@pytest.mark.parametrize("fails", [False, True])
def test_slabs_are_free_as_soon_as_a_transfer_has_ended(tmp_path: Path, fails: bool) -> None:
    for _ in range(20):
        pool = SlabPool(Budget(Tier.HOST, limit_bytes=64 * MIB))
        slab = pool.acquire("chunk", MIB)
        faults = [Fault(FaultKind.ERROR, Operation.READ, nth=3)] if fails else []
        lanes, _ = lanes_with(*faults, request_bytes=65536)
        path = tmp_path / "file"
        with lanes, DirectFile.create(path, nbytes=MIB) as file:
            lanes.write(file, 0, slab.view, label="write", hook=slab.view.tobytes).wait()
            read = lanes.read(file, 0, slab.view, label="read", hook=slab.view.tobytes)
            if fails:
                with pytest.raises(LaneError):
                    read.wait()
                # Requests that had begun beside the failed one are waited for by the block.
            else:
                read.wait()
                pool.release(slab)
                assert pool.trim() == MIB
        if fails:
            pool.release(slab)
        pool.close()
        path.unlink()


def test_spans_and_bytes_are_reported(tmp_path: Path) -> None:
    timeline = Timeline()
    view = memoryview(bytearray(10 * 4096))
    with (
        DiskLanes(timeline=timeline, request_bytes=4096) as lanes,
        DirectFile.create(tmp_path / "file", nbytes=10 * 4096) as file,
    ):
        lanes.write(file, 0, view, label="layers.0").wait()
        lanes.read(file, 0, view[:4096], label="layers.0").wait()
    statistics = timeline.statistics()
    assert statistics[LaneName.DISK_WRITE].nbytes == 10 * 4096
    assert statistics[LaneName.DISK_WRITE].count == 10
    assert statistics[LaneName.DISK_READ].nbytes == 4096
    assert {span.label for span in timeline.spans()} == {"layers.0"}


@pytest.mark.parametrize(
    ("offset", "nbytes", "reason"),
    [(1, 10, "multiple"), (-4096, 10, "multiple"), (4096, 4097, "pass the end")],
)
def test_impossible_requests_are_refused(
    tmp_path: Path, offset: int, nbytes: int, reason: str
) -> None:
    lanes, _ = lanes_with()
    with lanes, DirectFile.create(tmp_path / "file", nbytes=8192) as file:
        for move in (lanes.read, lanes.write):
            with pytest.raises(ValueError, match=reason):
                move(file, offset, memoryview(bytearray(nbytes)), label="chunk")


def test_a_file_opened_for_reading_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    lanes, _ = lanes_with()
    with lanes, DirectFile.open(tmp_path / "file") as file:
        with pytest.raises(ValueError, match="reading only"):
            lanes.write(file, 0, memoryview(bytearray(4096)), label="chunk")


@pytest.mark.parametrize("options", [{"read_threads": 0}, {"request_bytes": 5000}])
def test_impossible_lanes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DiskLanes(timeline=Timeline(), **options)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        DirectFile.open(tmp_path / "pipe")


def _refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return really_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("nbytes", SIZES)
def test_without_direct_io_bytes_go_through_the_page_cache_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    _refuse_direct(monkeypatch)
    data = pattern(nbytes)
    short = Fault(FaultKind.SHORT, got_bytes=max(nbytes // 3, 1), times=3)
    interrupted = Fault(FaultKind.ERROR, Operation.READ, code=errno.EINTR)
    lanes, _ = lanes_with(interrupted, short)
    view = memoryview(bytearray(data))
    with lanes:
        with pytest.warns(BufferedIOWarning, match="page cache"):
            file = DirectFile.create(tmp_path / "file", nbytes=nbytes)
        assert not file.direct
        lanes.write(file, 0, view, label="chunk").wait()
        view[:] = bytes(nbytes)
        lanes.read(file, 0, view, label="chunk").wait()
    assert view == data
    file.close()
    assert not _lane_threads()


def test_buffered_errors_are_as_complete_as_direct_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_direct(monkeypatch)
    lanes, _ = lanes_with(Fault(FaultKind.ERROR, Operation.READ))
    with lanes:
        with pytest.warns(BufferedIOWarning):
            file = DirectFile.create(tmp_path / "file", nbytes=4096)
        with pytest.raises(LaneError, match=r"chunk.*4,096 bytes at offset 0.*EIO"):
            lanes.read(file, 0, memoryview(bytearray(4096)), label="chunk").wait()
    file.close()


def test_address_of_read_only_memory() -> None:
    data = np.arange(100, dtype=np.uint8)
    view = memoryview(data.tobytes())
    assert address_of(view[3:]) == address_of(view) + 3
