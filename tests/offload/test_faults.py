"""The rows of docs/faults.md: what is injected, what the user sees, what is lost."""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace.offload.errors import HeadraceError, LaneError, StoreError, StuckLaneError
from headrace.offload.faults import Fault, FaultKind, Operation, ScriptedFaults
from headrace.offload.io import DiskLanes
from headrace.offload.store import Region, Store
from headrace.offload.timeline import LaneName, Timeline

NBYTES = 300_000
NAMES = ("weights/layers.0", "states/layers.0", "weights/layers.1")


def content(name: str, step: int) -> bytes:
    return random.Random(f"{name} {step}").randbytes(NBYTES)


@contextmanager
def store_at_step_2(
    folder: Path, *, hang_timeout_seconds: float | None = None
) -> Iterator[tuple[Store, ScriptedFaults]]:
    script = ScriptedFaults([])
    with (
        DiskLanes(
            timeline=Timeline(),
            faults=script,
            request_bytes=65536,
            hang_timeout_seconds=hang_timeout_seconds,
        ) as lanes,
        Store.create(
            [folder],
            [Region(name, NBYTES) for name in NAMES],
            durability="step",
            fingerprint={},
            meta=None,
            lanes=lanes,
        ) as store,
    ):
        for step in (1, 2):
            do_step(store, step)
        yield store, script


def do_step(store: Store, step: int) -> None:
    view = memoryview(bytearray(NBYTES))
    for name in NAMES:
        if store.written(name):
            store.read(name, view).wait()
            assert view == content(name, step - 1)
        store.write(name, memoryview(content(name, step)))
    store.commit({"step": step}, blobs={"rng": bytes([step]) * 50})


def assert_nothing_lost(folder: Path, step: int) -> None:
    with DiskLanes(timeline=Timeline()) as lanes, Store.open([folder], lanes=lanes) as store:
        assert store.step == step
        assert store.last_user == {"step": step}
        assert store.last_blobs == {"rng": bytes([step]) * 50}
        view = memoryview(bytearray(NBYTES))
        for name in NAMES:
            store.read(name, view).wait()
            assert view == content(name, step)
        do_step(store, step + 1)


@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(FaultKind.SHORT, got_bytes=10_000, times=5),
        Fault(FaultKind.SHORT, got_bytes=8192, times=5),
        Fault(FaultKind.ERROR, code=errno.EINTR, times=5),
        Fault(FaultKind.SLOW, seconds=0.02, times=3),
    ],
    ids=["short off the grid", "short", "EINTR", "slow"],
)
def test_what_the_lanes_put_right(tmp_path: Path, operation: Operation, fault: Fault) -> None:
    with store_at_step_2(tmp_path) as (store, script):
        script.arm(
            Fault(
                fault.kind,
                operation,
                times=fault.times,
                code=fault.code,
                got_bytes=fault.got_bytes,
                seconds=fault.seconds,
            )
        )
        do_step(store, 3)
    assert_nothing_lost(tmp_path, 3)


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        (Operation.READ, "extents"),
        (Operation.WRITE, "extents"),
        (Operation.SYNC, "extents"),
        (Operation.WRITE, "blobs"),
        (Operation.SYNC, "blobs"),
        (Operation.WRITE, "commit.json"),
        (Operation.SYNC, "commit.json"),
        (Operation.RENAME, "commit.json"),
    ],
)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_an_error_costs_the_step_in_progress_only(
    tmp_path: Path, operation: Operation, part: str, code: int
) -> None:
    with (
        pytest.raises(HeadraceError, match=f"{part}.*|{os.strerror(code)}") as caught,
        store_at_step_2(tmp_path) as (store, script),
    ):
        script.arm(Fault(FaultKind.ERROR, operation, path_part=part, code=code))
        do_step(store, 3)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == code
    assert_nothing_lost(tmp_path, 2)


def test_an_error_behind_the_rename_is_raised_though_the_step_may_be_real(tmp_path: Path) -> None:
    with (
        pytest.raises(LaneError, match="commit of step 3"),
        store_at_step_2(tmp_path) as (store, script),
    ):
        # Syncs of a commit: extents, blobs, the record's draft, and the folder.
        script.arm(Fault(FaultKind.ERROR, Operation.SYNC, nth=4))
        do_step(store, 3)
    assert_nothing_lost(tmp_path, 3)


@pytest.mark.parametrize(
    "operation", [Operation.READ, Operation.WRITE, Operation.SYNC, Operation.RENAME]
)
def test_a_hanging_disk_is_named_instead_of_waited_for(
    tmp_path: Path, operation: Operation
) -> None:
    lane = LaneName.DISK_READ if operation is Operation.READ else LaneName.DISK_WRITE
    with (
        pytest.raises(StuckLaneError, match=rf"{lane.value} is stuck for \d"),
        store_at_step_2(tmp_path, hang_timeout_seconds=0.2) as (store, script),
    ):
        script.arm(Fault(FaultKind.HANG, operation, seconds=20.0))
        try:
            do_step(store, 3)
        finally:
            script.release()  # a real one would stay; the test's threads must end


def test_a_step_that_fails_elsewhere_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), store_at_step_2(tmp_path) as (store, _):
        for name in NAMES:
            store.write(name, memoryview(content(name, 3)))
        raise ZeroDivisionError("the training code's own error")
    assert_nothing_lost(tmp_path, 2)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    with store_at_step_2(tmp_path) as (store, _):
        pass
    calls: list[Callable[[], object]] = [
        lambda: store.commit({}),
        lambda: store.read(NAMES[0], memoryview(bytearray(NBYTES))),
        lambda: list(store.verify()),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="is closed"):
            call()
    store.close()


def test_every_row_of_the_fault_table_names_a_test_that_exists() -> None:
    root = Path(__file__).parents[2]
    table = (root / "docs" / "faults.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 12
    for row in rows:
        named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (root / file).read_text(), f"{file}::{test}"
