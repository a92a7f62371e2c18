"""The store: what is committed survives, what is not leaves no trace, damage is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.offload.errors import (
    LaneError,
    StoreError,
    StoreFormatError,
    StoreLockedError,
    StoreSpaceError,
)
from headrace.offload.extents import MIN_STRIPE_BYTES, place, weights_of
from headrace.offload.faults import Call, Fault, FaultKind, Faults, Operation, ScriptedFaults
from headrace.offload.io import DiskLanes
from headrace.offload.record import Durability
from headrace.offload.store import Region, Store
from headrace.offload.timeline import Timeline

REGIONS = [Region("weights/layers.0", 10_000), Region("weights/layers.1", 4096), Region("s", 3)]
FINGERPRINT = {"model": "tiny", "version": 1}


@contextmanager
def lanes_with(faults: Faults | None = None, **options: Any) -> Iterator[DiskLanes]:
    options = {"read_threads": 1, "write_threads": 1} | options
    with DiskLanes(timeline=Timeline(), faults=faults, **options) as lanes:
        yield lanes


@pytest.fixture
def lanes() -> Iterator[DiskLanes]:
    with lanes_with() as made:
        yield made


def make(
    lanes: DiskLanes, *folders: Path, durability: Durability = "step", **options: Any
) -> Store:
    named = {"fingerprint": FINGERPRINT, "meta": None} | options
    return Store.create(folders, REGIONS, durability=durability, lanes=lanes, **named)


def content(name: str, step: int) -> bytes:
    """What a region holds after a step: unlike any other step and region."""
    nbytes = next(region.nbytes for region in REGIONS if region.name == name)
    return random.Random(f"{name} {step}").randbytes(nbytes)


def write(store: Store, name: str, step: int) -> None:
    store.write(name, memoryview(content(name, step)))


def read(store: Store, name: str) -> bytes:
    nbytes = next(region.nbytes for region in store.regions if region.name == name)
    view = memoryview(bytearray(nbytes))
    store.read(name, view).wait()
    return bytes(view)


def run_steps(store: Store, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for region in REGIONS:
            write(store, region.name, step)
        store.commit({"loss": step / 3}, blobs={"rng": bytes([step]) * 100, "empty": b""})


def assert_at_step(store: Store, step: int) -> None:
    assert store.step == step
    assert store.last_user == {"loss": step / 3}
    assert store.last_blobs == {"rng": bytes([step]) * 100, "empty": b""}
    for region in REGIONS:
        assert read(store, region.name) == content(region.name, step)
    assert all(check.ok for check in store.verify())


# Committing and resuming #


def test_a_store_opens_at_its_last_commit(tmp_path: Path, lanes: DiskLanes) -> None:
    meta = {"layers": [1, 2.5, None, "x"]}
    with make(lanes, tmp_path / "run", meta=meta) as store:
        run_steps(store, 1, 3)
        write(store, "s", 4)  # never committed
    with Store.open([tmp_path / "run"], lanes=lanes, expect_fingerprint=FINGERPRINT) as store:
        assert_at_step(store, 3)
        assert store.meta == meta
        assert store.regions == tuple(REGIONS)
        run_steps(store, 4, 4)
    with Store.open([tmp_path / "run"], lanes=lanes) as store:
        assert_at_step(store, 4)


def test_latest_bytes_are_read_before_they_are_committed(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 1)
        write(store, "s", 2)
        assert read(store, "s") == content("s", 2)
        assert read(store, "weights/layers.1") == content("weights/layers.1", 1)


def test_regions_are_written_when_first_needed(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        assert not store.written("s")
        with pytest.raises(StoreError, match=r"'s'.*never written"):
            read(store, "s")
        write(store, "s", 1)
        assert store.written("s")
        store.commit(None)
        assert not store.written("weights/layers.1")
    with Store.open([tmp_path], lanes=lanes) as store:
        assert store.written("s")
        assert not store.written("weights/layers.1")
        assert store.last_user is None
        assert store.last_blobs == {}


def test_a_commit_without_writes_keeps_every_region(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 1)
        store.commit({"only": "user data"})
    with Store.open([tmp_path], lanes=lanes) as store:
        assert store.step == 2
        assert read(store, "s") == content("s", 1)


def test_several_folders_stripe_and_open_in_any_order(tmp_path: Path, lanes: DiskLanes) -> None:
    big = Region("big", 3 * MIN_STRIPE_BYTES + 777)
    folders = [tmp_path / "fast", tmp_path / "slow"]
    data = random.Random(1).randbytes(big.nbytes)
    with Store.create(
        {folders[0]: 2.0, folders[1]: 1.0},
        [big, *REGIONS],
        durability="step",
        fingerprint={},
        meta=None,
        lanes=lanes,
    ) as store:
        store.write("big", memoryview(data)).wait()
        store.commit(1)
        assert read(store, "big") == data
    sizes = [(folder / "extents.bin").stat().st_size for folder in folders]
    assert 1.8 < sizes[0] / sizes[1] < 2.2
    moved = tmp_path / "elsewhere"
    shutil.move(folders[0], moved)
    with Store.open([folders[1], moved], lanes=lanes) as store:
        assert read(store, "big") == data
        store.commit(2)
    with pytest.raises(StoreError, match=r"2 folders, and 1 were given: member 1"):
        Store.open([moved], lanes=lanes)
    with pytest.raises(StoreError, match="no store here"):
        Store.open([folders[1]], lanes=lanes)


def test_nothing_is_pickled_and_small_files_are_json(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 2)
    names = {"lock", "layout.json", "commit.json", "extents.bin", "blobs.0.bin", "blobs.1.bin"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in ("layout.json", "commit.json"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line)
        assert str(tmp_path) not in (tmp_path / name).read_text()


@pytest.mark.parametrize("user", [float("nan"), {1, 2}, {"a": b"bytes"}])
def test_what_is_not_json_is_refused_before_the_step_counts(
    tmp_path: Path, lanes: DiskLanes, user: Any
) -> None:
    with make(lanes, tmp_path) as store:
        with pytest.raises((TypeError, ValueError)):
            store.commit(user)
        assert store.step == 0
        run_steps(store, 1, 1)
        assert_at_step(store, 1)


# Rolling back #


def test_a_step_can_be_undone(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 2)
        write(store, "s", 3)
        write(store, "weights/layers.1", 3)
        assert store.can_roll_back()
        assert sorted(store.roll_back()) == ["s", "weights/layers.1"]
        assert_at_step(store, 2)
        assert store.roll_back() == []
        run_steps(store, 3, 3)
        assert_at_step(store, 3)


def test_a_region_first_written_in_an_undone_step_is_unwritten(
    tmp_path: Path, lanes: DiskLanes
) -> None:
    with make(lanes, tmp_path) as store:
        write(store, "s", 1)
        assert store.roll_back() == ["s"]
        assert not store.written("s")


@pytest.mark.parametrize("durability", ["checkpoint", "none"])
def test_stores_that_overwrite_cannot_undo(
    tmp_path: Path, lanes: DiskLanes, durability: Durability
) -> None:
    with make(lanes, tmp_path, durability=durability) as store:
        assert not store.can_roll_back()
        with pytest.raises(StoreError, match="durability='step'"):
            store.roll_back()


# Durability #


def test_checkpoint_stores_open_at_the_last_snapshot(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path, durability="checkpoint", snapshot_every=3) as store:
        run_steps(store, 1, 5)
        assert store.step == 5
        assert store.statistics().records_written == 1
        assert read(store, "s") == content("s", 5)
        write(store, "s", 6)  # spoils step 5, which no record holds
        with pytest.raises(StoreError, match="written since the commit of step 5"):
            store.flush()
    with Store.open([tmp_path], lanes=lanes) as store:
        assert_at_step(store, 3)
        run_steps(store, 4, 6)
    with Store.open([tmp_path], lanes=lanes) as store:
        assert_at_step(store, 6)


@pytest.mark.parametrize("how", ["flush", "close"])
def test_the_last_commit_of_a_finished_run_is_kept(
    tmp_path: Path, lanes: DiskLanes, how: str
) -> None:
    store = make(lanes, tmp_path, durability="checkpoint", snapshot_every=10)
    run_steps(store, 1, 4)
    if how == "flush":
        store.flush()
        store.flush()
        assert store.statistics().records_written == 1
        write(store, "s", 5)
    store.close()
    with Store.open([tmp_path], lanes=lanes) as store:
        assert_at_step(store, 4)
        run_steps(store, 5, 5)
        assert store.statistics().records_written == 0


def test_scratch_stores_take_half_the_room_and_are_not_resumed(
    tmp_path: Path, lanes: DiskLanes
) -> None:
    with make(lanes, tmp_path / "none", durability="none") as store:
        run_steps(store, 1, 3)
        assert read(store, "s") == content("s", 3)
        scratch_bytes = store.statistics().file_bytes
    with make(lanes, tmp_path / "step") as store:
        assert store.statistics().file_bytes - 8192 == 2 * (scratch_bytes - 8192)
    with pytest.raises(StoreError, match="scratch store"):
        Store.open([tmp_path / "none"], lanes=lanes)
    make(lanes, tmp_path / "none", durability="none").close()


# Committing while the next step runs #


def test_a_pending_commit_shields_both_its_extents_and_the_older_ones(tmp_path: Path) -> None:
    script = ScriptedFaults(
        [Fault(FaultKind.HANG, Operation.RENAME, path_part="commit.json", nth=2, seconds=20.0)]
    )
    with lanes_with(script) as lanes, make(lanes, tmp_path) as store:
        run_steps(store, 1, 1)
        write(store, "s", 2)
        pending = store.commit_async({"loss": 2 / 3}, blobs={})
        assert script.hanging.wait(10)
        # Not part of the pending commit: its other extent is free.
        write(store, "weights/layers.1", 3)
        assert read(store, "s") == content("s", 2)
        assert not pending.done()
        with lanes_with() as other_lanes:
            copy = tmp_path.with_name(tmp_path.name + "-crashed")
            shutil.copytree(tmp_path, copy)
            with Store.open([copy], lanes=other_lanes) as crashed:
                assert_at_step(crashed, 1)
        script.release()
        write(store, "s", 3)  # waits for the commit, whose two extents are both needed until then
        assert pending.done()
        assert read(store, "s") == content("s", 3)
        store.roll_back()
        assert read(store, "s") == content("s", 2)
        assert read(store, "weights/layers.1") == content("weights/layers.1", 1)


def test_a_failed_commit_is_raised_by_every_later_call(tmp_path: Path) -> None:
    script = ScriptedFaults(
        [Fault(FaultKind.ERROR, Operation.RENAME, path_part="commit.json", nth=2)]
    )
    with lanes_with(script) as lanes:
        store = make(lanes, tmp_path)
        run_steps(store, 1, 1)
        write(store, "s", 2)
        pending = store.commit_async({})
        with pytest.raises(LaneError, match="commit of step 2") as caught:
            pending.wait()
        assert isinstance(caught.value.__cause__, OSError)
        for call in (lambda: write(store, "s", 3), lambda: read(store, "s"), store.close):
            with pytest.raises(StoreError, match=r"commit of .* failed"):
                call()
    with lanes_with() as lanes, Store.open([tmp_path], lanes=lanes) as store:
        assert_at_step(store, 1)


# Every instant #


@final
class _Photographer(Faults):
    """Copies a folder before and after every system call: what a crash at that instant leaves."""

    def __init__(self, folder: Path, album: Path) -> None:
        self.folder = folder
        self.album = album
        self.pictures: list[Path] = []

    def _take(self) -> None:
        picture = self.album / f"{len(self.pictures):04}"
        shutil.copytree(self.folder, picture)
        self.pictures.append(picture)

    def before(self, call: Call) -> None:
        self._take()

    def after(self, call: Call, got_bytes: int) -> int:
        self._take()
        return got_bytes


@final
class _PowerCut(Faults):
    """Pictures of what a power cut leaves at the worst: nothing that was not synced.

    A file holds what it held at its last sync, and a folder the names of its last sync.
    """

    def __init__(self, folder: Path, album: Path) -> None:
        self.folder = folder
        self.album = album
        self.pictures: list[Path] = []
        self._data: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._effect: Call | None = None

    def before(self, call: Call) -> None:
        # A sync has taken effect when the next call is made: the test does one thing at a time.
        if self._effect is not None and self._effect.operation is Operation.SYNC:
            if self._effect.path == self.folder:
                self._names = {path.name: path.stat().st_ino for path in self.folder.iterdir()}
            else:
                path = self._effect.path
                self._data[path.stat().st_ino] = path.read_bytes()
        self._effect = call
        picture = self.album / f"{len(self.pictures):04}"
        picture.mkdir(parents=True)
        for name, inode in self._names.items():
            (picture / name).write_bytes(self._data.get(inode, b""))
        self.pictures.append(picture)

    def after(self, call: Call, got_bytes: int) -> int:
        return got_bytes


@pytest.mark.parametrize("camera_of", [_Photographer, _PowerCut])
@pytest.mark.parametrize("durability", ["step", "checkpoint"])
def test_a_crash_at_any_system_call_leaves_the_last_commit(
    tmp_path: Path,
    durability: Durability,
    camera_of: type[_Photographer] | type[_PowerCut],
) -> None:
    folder = tmp_path / "run"
    camera = camera_of(folder, tmp_path / "album")
    real_steps = {"step": [1, 2, 3, 4], "checkpoint": [2, 4]}[durability]
    committed_by: dict[int, int] = {}
    with lanes_with(camera) as lanes:
        folder.mkdir()
        with make(lanes, folder, durability=durability, snapshot_every=2) as store:
            for step in range(1, 6):
                run_steps(store, step, step)
                # The picture before a commit's last sync took effect is the last without it.
                committed_by[step] = len(camera.pictures)
                if durability == "step":
                    write(store, "s", 99)
                    store.roll_back()
    seen = set()
    with lanes_with() as lanes:
        for index, picture in enumerate(camera.pictures):
            least = max((s for s in real_steps if committed_by[s] <= index), default=0)
            try:
                store = Store.open([picture], lanes=lanes)
            except StoreError as error:
                assert least == 0, f"picture {index}: {error}"
                # Nothing was committed yet, and the same folder can be used again.
                if index % 5 == 0:
                    make(lanes, picture, durability=durability).close()
                continue
            with store:
                following = [s for s in (*real_steps, 5) if s > least][:1]
                assert store.step in (least, *following)
                assert_at_step(store, store.step)
                seen.add(store.step)
    assert seen >= set(real_steps)


# A model of the store #

_MOVES = st.one_of(
    st.tuples(st.just("write"), st.sampled_from([region.name for region in REGIONS])),
    st.tuples(st.just("read"), st.sampled_from([region.name for region in REGIONS])),
    st.tuples(st.sampled_from(["commit", "commit_async", "roll_back", "reopen"]), st.just("")),
)


@settings(deadline=None, max_examples=60)
@given(
    moves=st.lists(_MOVES, max_size=30),
    durability=st.sampled_from(["step", "checkpoint"]),
    member_count=st.integers(1, 2),
)
def test_the_store_behaves_like_two_dictionaries(
    moves: list[tuple[str, str]], durability: Durability, member_count: int
) -> None:
    with tempfile.TemporaryDirectory() as root, lanes_with() as lanes:
        folders = [Path(root, str(index)) for index in range(member_count)]
        store = make(lanes, *folders, durability=durability, snapshot_every=2)
        durable: Mapping[str, bytes] | None = None
        committed: dict[str, bytes] = {}
        latest: dict[str, bytes] = {}
        durable_step, torn = 0, False
        for stamp, (move, name) in enumerate(moves):
            if move == "write":
                write(store, name, stamp)
                latest[name] = content(name, stamp)
                torn = True
            elif move == "read" and name in latest:
                assert read(store, name) == latest[name]
            elif move in ("commit", "commit_async"):
                (store.commit if move == "commit" else store.commit_async)(stamp)
                committed, torn = dict(latest), False
                if durability == "step" or store.step % 2 == 0:
                    durable, durable_step = dict(latest), store.step
            elif move == "roll_back" and durability == "step":
                store.roll_back()
                latest, torn = dict(committed), False
            elif move == "reopen" and store.step > 0 and (durable is not None or not torn):
                if not torn:  # closing keeps the last commit
                    durable, durable_step = dict(committed), store.step
                store.close()
                store = Store.open(folders, lanes=lanes)
                assert store.step == durable_step
                assert durable is not None
                latest, committed, torn = dict(durable), dict(durable), False
            assert {r.name for r in REGIONS if store.written(r.name)} == set(latest)
        for name, data in latest.items():
            assert read(store, name) == data
        store.close()


# Refusals #


def test_a_second_run_gets_one_clear_line(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 1)
        line = rf"in use by process {os.getpid()} on .*Stop that run"
        with pytest.raises(StoreLockedError, match=line):
            Store.open([tmp_path], lanes=lanes)
        with pytest.raises(StoreLockedError, match=line):
            make(lanes, tmp_path)
    Store.open([tmp_path], lanes=lanes).close()


def test_another_model_is_told_apart(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 1)
    with pytest.raises(StoreError, match=r"model: the store has 'tiny', this run 'large'"):
        Store.open([tmp_path], lanes=lanes, expect_fingerprint=FINGERPRINT | {"model": "large"})
    Store.open([tmp_path], lanes=lanes).close()  # the refused open left no lock


def test_a_committed_store_is_never_made_anew(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 2)
    with pytest.raises(StoreError, match=r"2 committed steps.*Resume it"):
        make(lanes, tmp_path)
    with Store.open([tmp_path], lanes=lanes) as store:
        assert_at_step(store, 2)


def test_a_folder_of_another_store_is_never_overwritten(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path / "a", tmp_path / "b") as store:
        run_steps(store, 1, 2)
    with pytest.raises(StoreError, match="record elsewhere"):
        make(lanes, tmp_path / "b")
    with Store.open([tmp_path / "a", tmp_path / "b"], lanes=lanes) as store:
        assert_at_step(store, 2)


def test_foreign_files_are_left_alone(tmp_path: Path, lanes: DiskLanes) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"thesis\.tex.*new or empty folder"):
        make(lanes, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_begun_but_uncommitted_store_is_used_again(tmp_path: Path, lanes: DiskLanes) -> None:
    make(lanes, tmp_path).close()
    with pytest.raises(StoreError, match="before its first commit"):
        Store.open([tmp_path], lanes=lanes)
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 1)


@pytest.mark.parametrize("where", ["missing", "empty"])
def test_a_folder_without_a_store_is_not_opened(
    tmp_path: Path, lanes: DiskLanes, where: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=str(tmp_path / where)):
        Store.open([tmp_path / where], lanes=lanes)
    assert list((tmp_path / "empty").iterdir()) == []


def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path, lanes: DiskLanes) -> None:
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    with pytest.raises(StoreSpaceError, match=r"[\d,]+ bytes are missing") as caught:
        Store.create(
            [tmp_path / "a", tmp_path / "b"],
            [Region("huge", free)],
            durability="step",
            fingerprint={},
            meta=None,
            lanes=lanes,
        )
    missing = int(str(caught.value).split(" bytes are missing")[0].split()[-1].replace(",", ""))
    assert 0.9 * free < missing < 1.1 * free
    assert not (tmp_path / "a" / "extents.bin").exists()


def test_a_disk_that_fills_up_meanwhile_leaves_the_folder_usable(tmp_path: Path) -> None:
    full = Fault(FaultKind.ERROR, Operation.ALLOCATE, code=errno.ENOSPC)
    with lanes_with(ScriptedFaults([full])) as lanes:
        with pytest.raises(StoreSpaceError, match=r"extents\.bin.*cannot be reserved"):
            make(lanes, tmp_path)
        with make(lanes, tmp_path) as store:
            run_steps(store, 1, 1)


def test_unknown_regions_and_small_views_are_named(tmp_path: Path, lanes: DiskLanes) -> None:
    with make(lanes, tmp_path) as store:
        with pytest.raises(StoreError, match=r"no region 'layers\.9'"):
            store.write("layers.9", memoryview(bytes(10)))
        with pytest.raises(ValueError, match=r"'s' has 3 bytes, the view 2"):
            store.write("s", memoryview(bytes(2)))
    with pytest.raises(StoreError, match="closed"):
        store.written("s")


@pytest.mark.parametrize(
    "regions", [[Region("a", 0)], [Region("", 5)], [Region("a", 5), Region("a", 6)]]
)
def test_impossible_regions_are_refused(
    tmp_path: Path, lanes: DiskLanes, regions: list[Region]
) -> None:
    with pytest.raises(ValueError, match="empty, unnamed or given twice"):
        Store.create([tmp_path], regions, durability="step", fingerprint={}, meta=None, lanes=lanes)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_weights_are_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        weights_of({tmp_path: weight})


# Verification #


def _flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_at_the_first_read_and_by_verify(
    tmp_path: Path, lanes: DiskLanes
) -> None:
    with make(lanes, tmp_path) as store:
        run_steps(store, 1, 1)
        layout = store._layout.regions[0].extents[0][0]
    path = tmp_path / "extents.bin"
    _flip_bit(path, layout.offset + 5000)
    with lanes_with() as own, Store.open([tmp_path], lanes=own) as store:
        bad = [check for check in store.verify() if not check.ok]
        assert [check.name for check in bad] == ["weights/layers.0"]
        assert str(path) in bad[0].reason
        assert read(store, "s") == content("s", 1)
        with pytest.raises(LaneError, match=r"extents\.bin: region 'weights/layers\.0'.*checksum"):
            read(store, "weights/layers.0")
    with (
        lanes_with() as own,
        Store.open([tmp_path], lanes=own, verify_reads="never") as store,
    ):
        assert read(store, "weights/layers.0") != content("weights/layers.0", 1)


def test_every_read_can_be_verified(tmp_path: Path) -> None:
    with lanes_with() as lanes, make(lanes, tmp_path, verify_reads="always") as store:
        run_steps(store, 1, 1)
        offset = store._layout.regions[1].extents[0][0].offset
        assert read(store, "weights/layers.1") == content("weights/layers.1", 1)
        _flip_bit(tmp_path / "extents.bin", offset)
        with pytest.raises(LaneError, match="Bits have changed") as caught:
            read(store, "weights/layers.1")
        assert isinstance(caught.value.__cause__, StoreFormatError)


# Placement #


@given(
    sizes=st.lists(st.integers(1, 20 * MIN_STRIPE_BYTES), min_size=1, max_size=20),
    weights=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4),
    extent_count=st.integers(1, 2),
)
def test_extents_are_aligned_disjoint_and_balanced(
    sizes: list[int], weights: list[float], extent_count: int
) -> None:
    regions = [Region(str(index), nbytes) for index, nbytes in enumerate(sizes)]
    placed, member_bytes = place(regions, weights, extent_count=extent_count)
    spans = sorted(
        (segment.member, segment.offset, segment.nbytes)
        for region in placed
        for extent in region.extents
        for segment in extent
    )
    reached = [8192] * len(weights)
    for member, offset, nbytes in spans:
        assert offset == reached[member]
        assert nbytes > 0
        assert nbytes % 4096 == 0
        reached[member] += nbytes
    assert tuple(reached) == member_bytes
    for region in placed:
        for extent in region.extents:
            assert 0 <= sum(s.nbytes for s in extent) - region.nbytes < 4096
    total = sum(member_bytes)
    slack = len(weights) * 8192 + 2 * len(weights) * MIN_STRIPE_BYTES * sum(weights) / min(weights)
    for nbytes, weight in zip(member_bytes, weights, strict=True):
        assert abs(nbytes - total * weight / sum(weights)) <= slack
