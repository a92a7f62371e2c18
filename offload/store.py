"""``Store``: the mutable state on disk, which is the checkpoint.  No torch.

Guarantees: after a crash at any instant, ``open`` yields exactly the bytes, user data and blobs
of the last commit whose record reached the disk; bytes that a committed record names are never
overwritten; damage, foreign files, other models and a second run are refused with an error that
names the file.  FORMAT.md gives the rules of the files.

Durability, per store: ``"step"`` keeps two extents per region and makes every commit real;
``"checkpoint"`` makes every ``snapshot_every``-th commit real and overwrites the working extent
in between; ``"none"`` keeps one extent and no records, for scratch runs.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, final

from .commit import (
    Stamp,
    foreign_names,
    read_blobs,
    read_layout,
    read_record,
    read_stamp,
    remove_uncommitted,
    write_blobs,
    write_layout,
    write_record,
    write_stamp,
)
from .errors import StoreError, StoreFormatError, StoreSpaceError
from .extents import Region, check_space, place, weights_of
from .faults import Operation
from .files import DirectFile
from .io import DiskLanes, DiskTransfer, Part
from .lock import FolderLock
from .record import (
    BLOB_NAMES,
    COMMIT_NAME,
    EXTENTS_NAME,
    JSON,
    LAYOUT_NAME,
    CommitRecord,
    Durability,
    Layout,
    RegionLayout,
    Valid,
    checksum_of,
    encode,
)
from .requests import Requests
from .transfer import FinishedTransfer, Transfer
from .verify import RegionCheck, check_blobs, check_regions

__all__ = ["JSON", "Durability", "Region", "RegionCheck", "Store", "StoreStatistics"]

VerifyReads = Literal["first", "always", "never"]


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """A snapshot of one store: sizes, bytes moved by this process, and seconds in commits."""

    step: int
    region_count: int
    file_bytes: int
    read_bytes: int
    written_bytes: int
    records_written: int
    commit_seconds: float
    waited_for_commit_seconds: float


@dataclass(slots=True, eq=False)
class _Write:
    """Bytes given in this process: where they go, and their checksum once they are there."""

    extent: int
    transfer: DiskTransfer | None = None
    checksum: str = ""

    def take_checksum(self, source: memoryview) -> None:
        self.checksum = checksum_of(source)

    def wait(self) -> None:
        assert self.transfer is not None
        self.transfer.wait()


@dataclass(slots=True, eq=False)
class _State:
    """One region: what the durable record names, what a pending commit names, what is newer."""

    layout: RegionLayout
    committed: Valid | None = None
    pending: _Write | None = None
    working: _Write | None = None
    verified: bool = False
    in_flight: dict[int, list[DiskTransfer]] = field(default_factory=dict)

    def target(self) -> int | None:
        """The extent that the next write may overwrite, or None while a commit must end first."""
        if self.working is not None:
            return self.working.extent
        if len(self.layout.extents) == 1:
            return 0
        taken = {named.extent for named in (self.committed, self.pending) if named is not None}
        free = [extent for extent in (0, 1) if extent not in taken]
        return free[0] if free else None

    def users_of(self, extent: int) -> list[DiskTransfer]:
        """Transfers in flight on an extent, which the next one on it must wait for."""
        users = [t for t in self.in_flight.get(extent, ()) if not t.done()]
        self.in_flight[extent] = users
        return users


@final
class Store:
    """Named regions of mutable bytes that survive any crash, one committed step at a time.

    Make one with ``Store.create`` or ``Store.open``; close it before its lanes.  All methods are
    thread-safe; ``commit`` belongs to the thread that ends the step.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        files: Sequence[DirectFile],
        layout: Layout,
        record: CommitRecord | None,
        *,
        lanes: DiskLanes,
        verify_reads: VerifyReads,
        resources: ExitStack,
    ) -> None:
        self._folders = tuple(folders)
        self._files = tuple(files)
        self._layout = layout
        self._record = record
        self._lanes = lanes
        self._verify_reads = verify_reads
        self._resources = resources
        self._lock = threading.Lock()
        self._states = {region.name: _State(region) for region in layout.regions}
        if record is not None:
            for name, valid in record.regions.items():
                self._states[name].committed = valid
        self._step = record.step if record is not None else 0
        self._sequence = record.sequence if record is not None else 0
        self._committing: DiskTransfer | None = None
        self._commit_thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-commit")
        self._requests = Requests(lanes.calls)
        self._failure: BaseException | None = None
        self._closed = False
        self._read_bytes = self._written_bytes = self._records_written = 0
        self._commit_seconds = self._waited_seconds = 0.0

    # Making and opening #

    @classmethod
    def create(
        cls,
        paths: Sequence[Path] | Mapping[Path, float],
        regions: Sequence[Region],
        *,
        durability: Durability,
        fingerprint: Mapping[str, JSON],
        meta: JSON,
        lanes: DiskLanes,
        snapshot_every: int = 1,
        verify_reads: VerifyReads = "first",
    ) -> Self:
        """Make a store in new or empty folders, with all of its disk space reserved.

        ``fingerprint`` says what the state belongs to (model, library) and is compared on
        ``open``; ``meta`` is whatever the caller needs to interpret the regions.  A folder
        in which a store was begun but nothing was ever committed is used again; any other
        content is refused.
        """
        weights = weights_of(paths)
        folders = list(weights)
        if snapshot_every < 1:
            raise ValueError(f"snapshot_every={snapshot_every}; give 1 or more")
        extent_count = 1 if durability == "none" else 2
        placed, member_bytes = place(regions, list(weights.values()), extent_count=extent_count)
        layout = Layout(
            store_id=uuid.uuid4().hex,
            durability=durability,
            snapshot_every=snapshot_every if durability == "checkpoint" else 1,
            fingerprint=dict(fingerprint),
            meta=meta,
            member_bytes=member_bytes,
            regions=placed,
        )
        encode("layout", layout.to_body())  # refuses what is not JSON before any file is made
        with ExitStack() as resources:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                resources.callback(FolderLock(folder).release)
            _check_unused(folders)
            remove_uncommitted(folders)
            check_space(folders, member_bytes)
            requests = Requests(lanes.calls)
            resources.callback(requests.close)
            files = []
            for index, (folder, nbytes) in enumerate(zip(folders, member_bytes, strict=True)):
                file = _allocate(folder, nbytes, lanes)
                resources.callback(file.close)
                files.append(file)
                write_stamp(file, Stamp(layout.store_id, index, 0), requests)
                lanes.sync(file, label="a new store")
                lanes.calls.sync_folder(folder)
            for name in BLOB_NAMES:
                write_blobs(folders[0], name, {}, lanes.calls)
            write_layout(folders[0], layout, lanes.calls)
            return cls(
                folders,
                files,
                layout,
                None,
                lanes=lanes,
                verify_reads=verify_reads,
                resources=resources.pop_all(),
            )

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        *,
        lanes: DiskLanes,
        expect_fingerprint: Mapping[str, JSON] | None = None,
        verify_reads: VerifyReads = "first",
    ) -> Self:
        """Open a store at its last committed step; its folders may be given in any order."""
        folders = list(weights_of(paths))
        with ExitStack() as resources:
            for folder in folders:
                if not folder.is_dir():
                    raise StoreError(f"{folder}: there is no such folder, so no store to open")
            primary, layout = _find_layout(folders)
            for folder in folders:
                resources.callback(FolderLock(folder).release)
            # Read again under the lock: another run may have replaced it in between.
            primary, layout = _find_layout(folders)
            if expect_fingerprint is not None:
                _check_fingerprint(primary, layout.fingerprint, expect_fingerprint)
            record = read_record(primary, layout)
            if layout.durability == "none":
                raise StoreError(
                    f"{primary}: this is a scratch store (durability='none'), which keeps no "
                    f"committed state. Start a new run, with durability='step' to resume it."
                )
            if record is None:
                raise StoreError(
                    f"{primary}: the run was stopped before its first commit, so there is nothing "
                    f"to resume. Start it again on the same folder."
                )
            ordered = _order_members(folders, layout, record.sequence)
            files = []
            for folder, nbytes in zip(ordered, layout.member_bytes, strict=True):
                file = DirectFile.open(folder / EXTENTS_NAME, writable=True)
                resources.callback(file.close)
                if file.nbytes != nbytes:
                    raise StoreFormatError(
                        f"{file.path}: it has {file.nbytes:,} bytes, the layout says {nbytes:,}. "
                        f"It is truncated or belongs to another store; restore it from a copy."
                    )
                files.append(file)
            return cls(
                [primary, *(folder for folder in ordered if folder != primary)],
                files,
                layout,
                record,
                lanes=lanes,
                verify_reads=verify_reads,
                resources=resources.pop_all(),
            )

    # Reading and writing #

    def read(self, region: str, view: memoryview) -> Transfer:
        """Read a region's latest bytes: what this process wrote last, else what is committed.

        ``view`` has the region's size or more; a multiple of 4096 saves a copy of the tail.
        """
        with self._lock:
            state = self._usable(region, view)
            newest = state.working or state.pending
            if newest is not None:
                extent = newest.extent
                check = self._verify_reads == "always"
            elif state.committed is not None:
                extent = state.committed.extent
                check = self._verify_reads == "always" or (
                    self._verify_reads == "first" and not state.verified
                )
            else:
                raise StoreError(f"region {region!r} of {self._folders[0]} was never written")
            hook = None
            if check:
                named = newest or state.committed
                assert named is not None
                target = view[: state.layout.nbytes]
                hook = partial(self._verify, state, extent, target, named)
            transfer = self._submit(Operation.READ, state, extent, view, f"read {region}", hook)
            self._read_bytes += state.layout.nbytes
            return transfer

    def write(self, region: str, view: memoryview) -> Transfer:
        """Write a region to the extent that no record names; ``view`` stays as it is until then.

        While a pending commit still needs both extents of the region, this waits for it.
        """
        while True:
            with self._lock:
                state = self._usable(region, view)
                extent = state.target()
                if extent is not None:
                    write = _Write(extent)
                    hook = partial(write.take_checksum, view[: state.layout.nbytes])
                    write.transfer = self._submit(
                        Operation.WRITE, state, extent, view, f"write {region}", hook
                    )
                    state.working = write
                    self._written_bytes += state.layout.nbytes
                    return write.transfer
            start = time.perf_counter()
            self._wait_for_commit()
            self._waited_seconds += time.perf_counter() - start

    def _submit(
        self,
        operation: Operation,
        state: _State,
        extent: int,
        view: memoryview,
        label: str,
        hook: Callable[[], None] | None,
    ) -> DiskTransfer:
        parts, start = [], 0
        for segment in state.layout.extents[extent]:
            wanted = min(segment.nbytes, state.layout.nbytes - start)
            part = view[start : start + segment.nbytes]
            parts.append(Part(self._files[segment.member], segment.offset, part, wanted))
            start += segment.nbytes
        # Reads and writes run on lanes of their own: order on one extent is kept here.
        users = state.users_of(extent)
        transfer = self._lanes.transfer_parts(
            operation,
            parts,
            label=label,
            hook=hook,
            after=users,
        )
        users.append(transfer)
        return transfer

    def _verify(self, state: _State, extent: int, view: memoryview, named: _Write | Valid) -> None:
        found, wanted = checksum_of(view), named.checksum
        if found != wanted:
            segment = state.layout.extents[extent][0]
            path = self._files[segment.member].path
            raise StoreFormatError(
                f"{path}: region {state.layout.name!r} at offset {segment.offset:,} has checksum "
                f"{found}, its record says {wanted}. Bits have changed on the disk; restore the "
                f"store from a copy."
            )
        state.verified = True

    def _usable(self, region: str, view: memoryview | None = None) -> _State:
        self._raise_if_unusable()
        state = self._states.get(region)
        if state is None:
            raise StoreError(
                f"{self._folders[0]} has no region {region!r}; it has {len(self._states)} others"
            )
        if view is not None and len(view) < state.layout.nbytes:
            raise ValueError(
                f"region {region!r} has {state.layout.nbytes:,} bytes, the view {len(view):,}"
            )
        return state

    def _raise_if_unusable(self) -> None:
        if self._failure is not None:
            raise StoreError(
                f"a commit of {self._folders[0]} failed: {self._failure}. The state of the last "
                f"commit before it is intact; repair the cause and resume."
            ) from self._failure
        if self._closed:
            raise StoreError(f"the store {self._folders[0]} is closed")

    def written(self, region: str) -> bool:
        """Whether the region holds bytes: states are made only when they are first needed."""
        with self._lock:
            state = self._usable(region)
            return any((state.working, state.pending, state.committed))

    # Steps #

    def can_roll_back(self) -> bool:
        """Whether ``roll_back`` can undo the writes since the last commit."""
        return self._layout.durability == "step"

    def roll_back(self) -> list[str]:
        """Make regions written since the last commit hold its bytes again; return their names."""
        if not self.can_roll_back():
            raise StoreError(
                f"{self._folders[0]} has durability={self._layout.durability!r} and overwrites "
                f"regions in place; only durability='step' can undo a step"
            )
        self._wait_for_commit()
        with self._lock:
            names = [name for name, state in self._states.items() if state.working is not None]
            for name in names:
                self._states[name].working = None
            return names

    def commit(self, user: JSON, *, blobs: Mapping[str, bytes] | None = None) -> None:
        """End the step: when this returns, its writes, ``user`` and ``blobs`` survive a crash.

        ``blobs`` are the small resident things of a run (random states, adapters, their
        optimizer states); they replace those of the step before.
        """
        self.commit_async(user, blobs=blobs).wait()

    def commit_async(self, user: JSON, *, blobs: Mapping[str, bytes] | None = None) -> Transfer:
        """Begin a commit and return the transfer that ends when it is durable.

        The next step may read and write at once: its writes never touch an extent that this
        commit or the one before it names.
        """
        kept = {name: bytes(data) for name, data in (blobs or {}).items()}
        encode("commit", {"user": user})  # refuses what is not JSON before the step counts
        self._wait_for_commit()
        with self._lock:
            self._raise_if_unusable()
            self._step += 1
            if self._layout.durability == "none" or self._step % self._layout.snapshot_every:
                return FinishedTransfer(f"commit of step {self._step}")
            moved = [state for state in self._states.values() if state.working is not None]
            for state in moved:
                state.pending, state.working = state.working, None
            nbytes = sum(state.layout.nbytes for state in moved)
            label = f"commit of step {self._step}"
            transfer = DiskTransfer(label, nbytes, self._lanes.raise_if_stuck)
            self._committing = transfer
        self._commit_thread.submit(self._carry_out, transfer, moved, self._step, user, kept)
        return transfer

    def _carry_out(
        self,
        transfer: DiskTransfer,
        moved: Sequence[_State],
        step: int,
        user: JSON,
        blobs: Mapping[str, bytes],
    ) -> None:
        try:
            writes = [(state, state.pending) for state in moved]
            for _, write in writes:
                assert write is not None
                write.wait()
            start = time.perf_counter()
            valid = {
                name: state.committed
                for name, state in self._states.items()
                if state.committed is not None
            }
            valid |= {
                state.layout.name: Valid(write.extent, write.checksum)
                for state, write in writes
                if write is not None
            }
            record = self._make_durable(step, user, blobs, valid)
        except BaseException as error:  # noqa: BLE001  (kept, and raised to whoever waits)
            with self._lock:
                self._failure = error
            transfer.end(error)
            return
        with self._lock:
            for state in moved:
                state.committed, state.pending = valid[state.layout.name], None
                # These bytes were in this process's memory a moment ago.
                state.verified = True
            self._record = record
            self._sequence = record.sequence
            self._records_written += 1
            self._commit_seconds += time.perf_counter() - start
        transfer.end()

    def _make_durable(
        self,
        step: int,
        user: JSON,
        blobs: Mapping[str, bytes],
        valid: Mapping[str, Valid],
    ) -> CommitRecord:
        """Stamp, sync the extents, sync the blobs, then replace the record: in this order."""
        sequence, calls = self._sequence + 1, self._lanes.calls
        label = f"step {step}"
        for member, file in enumerate(self._files):
            write_stamp(file, Stamp(self._layout.store_id, member, sequence), self._requests)
        for file in self._files:
            self._lanes.sync(file, label=label)
        # The record in force names the other blob file.
        blob_file = BLOB_NAMES[sequence % 2]
        entries = write_blobs(self._folders[0], blob_file, blobs, calls)
        record = CommitRecord(
            store_id=self._layout.store_id,
            sequence=sequence,
            step=step,
            user=user,
            regions=valid,
            blob_file=blob_file,
            blobs=entries,
        )
        write_record(self._folders[0], record, calls)
        return record

    def _wait_for_commit(self) -> None:
        committing = self._committing
        if committing is not None:
            committing.wait()

    # Facts #

    @property
    def step(self) -> int:
        """How many commits have been made, in this process and before."""
        return self._step

    @property
    def meta(self) -> JSON:
        """What ``create`` was given as ``meta``."""
        return self._layout.meta

    @property
    def fingerprint(self) -> Mapping[str, JSON]:
        """What ``create`` was given as ``fingerprint``."""
        return dict(self._layout.fingerprint)

    @property
    def durability(self) -> Durability:
        """Which commits are made real."""
        return self._layout.durability

    @property
    def regions(self) -> tuple[Region, ...]:
        """Every region, in the order given to ``create``."""
        return tuple(Region(r.name, r.nbytes) for r in self._layout.regions)

    @property
    def last_user(self) -> JSON:
        """The user data of the last durable commit, or None before the first."""
        with self._lock:
            return self._record.user if self._record is not None else None

    @property
    def last_blobs(self) -> dict[str, bytes]:
        """The blobs of the last durable commit, read from disk and checked."""
        self._wait_for_commit()
        record = self._record
        return read_blobs(self._folders[0], record) if record is not None else {}

    def verify(self) -> Iterator[RegionCheck]:
        """Read every committed region and blob and compare checksums; 16 MiB of memory."""
        self._wait_for_commit()
        with self._lock:
            self._raise_if_unusable()
            committed = [
                (state.layout, state.committed)
                for state in self._states.values()
                if state.committed is not None
            ]
            record = self._record
        yield from check_regions(committed, self._files, self._lanes.calls)
        if record is not None:
            yield from check_blobs(self._folders[0], record)

    def statistics(self) -> StoreStatistics:
        """Return an immutable snapshot."""
        with self._lock:
            return StoreStatistics(
                step=self._step,
                region_count=len(self._states),
                file_bytes=sum(self._layout.member_bytes),
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
                records_written=self._records_written,
                commit_seconds=self._commit_seconds,
                waited_for_commit_seconds=self._waited_seconds,
            )

    # Lifetime #

    def close(self) -> None:
        """Wait for a pending commit, then free files and locks; uncommitted writes are dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            in_flight = [
                transfer
                for state in self._states.values()
                for transfers in state.in_flight.values()
                for transfer in transfers
            ]
        with self._resources:
            self._commit_thread.shutdown(wait=True)
            ended = threading.Semaphore(0)
            for transfer in in_flight:
                transfer.when_ended(ended.release)
            for _ in in_flight:
                while not ended.acquire(timeout=0.25):
                    self._lanes.raise_if_stuck()
            self._requests.close()
        if self._failure is None:
            self._wait_for_commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_unused(folders: Sequence[Path]) -> None:
    """Refuse folders that hold foreign files or anything that was ever committed."""
    begun = set()
    for folder in folders:
        foreign = foreign_names(folder)
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise StoreError(
                f"{folder} holds files that are no part of a store: "
                f"{', '.join(foreign[:3])}{more}. Give a new or empty folder."
            )
        layout = read_layout(folder)
        if (folder / COMMIT_NAME).exists():
            if layout is None:
                raise StoreFormatError(
                    f"{folder / LAYOUT_NAME}: it is missing, but {COMMIT_NAME} is there. The store "
                    f"is damaged; restore it, or remove the folder."
                )
            record = read_record(folder, layout)
            step = record.step if record is not None else 0
            raise StoreError(
                f"{folder} already holds a store with {step} committed steps of "
                f"{dict(layout.fingerprint)!r}. Resume it, give another folder, or remove it."
            )
        if layout is not None:
            begun.add(layout.store_id)
    for folder in folders:
        stamp = read_stamp(folder / EXTENTS_NAME)
        # Sequence 1 without a record is a first commit that never became real.
        if stamp is not None and not (
            stamp.sequence == 0 or (stamp.sequence == 1 and stamp.store_id in begun)
        ):
            raise StoreError(
                f"{folder / EXTENTS_NAME}: it belongs to store {stamp.store_id}, which has "
                f"committed {stamp.sequence} times and has its record elsewhere. "
                f"Give another folder."
            )


def _allocate(folder: Path, nbytes: int, lanes: DiskLanes) -> DirectFile:
    path = folder / EXTENTS_NAME
    try:
        return DirectFile.create(path, nbytes=nbytes, calls=lanes.calls)
    except OSError as error:
        raise StoreSpaceError(
            f"{path}: {nbytes:,} bytes cannot be reserved ({error.strerror}). Free space on that "
            f"disk or add a folder on another one."
        ) from error


def _find_layout(folders: Sequence[Path]) -> tuple[Path, Layout]:
    found = [(folder, layout) for folder in folders if (layout := read_layout(folder)) is not None]
    if not found:
        raise StoreError(
            f"{', '.join(map(str, folders))}: no store here ({LAYOUT_NAME} is missing). If the "
            f"store has several folders, give all of them."
        )
    if len(found) > 1:
        raise StoreError(
            f"{found[0][0]} and {found[1][0]} are different stores; open them one at a time"
        )
    return found[0]


def _check_fingerprint(
    folder: Path, found: Mapping[str, JSON], expected: Mapping[str, JSON]
) -> None:
    differing = [
        f"{key}: the store has {found.get(key)!r}, this run {expected.get(key)!r}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    if differing:
        raise StoreError(
            f"{folder} belongs to another run: {'; '.join(differing)}. "
            f"Give the store of this model, or a new folder."
        )


def _order_members(folders: Sequence[Path], layout: Layout, sequence: int) -> list[Path]:
    """Return the folders in member order, after checking that all are there and in step."""
    members: dict[int, Path] = {}
    for folder in folders:
        path = folder / EXTENTS_NAME
        stamp = read_stamp(path)
        if stamp is None:
            raise StoreFormatError(f"{path}: it is missing or was never stamped")
        if stamp.store_id != layout.store_id:
            raise StoreFormatError(
                f"{path}: it belongs to store {stamp.store_id}, the layout to {layout.store_id}"
            )
        if not sequence <= stamp.sequence <= sequence + 1:
            raise StoreFormatError(
                f"{path}: it is of commit {stamp.sequence}, the record of commit {sequence}: one "
                f"of them is a stale copy. Restore all files of the store from the same moment."
            )
        if stamp.member in members or stamp.member >= len(layout.member_bytes):
            raise StoreFormatError(f"{path}: it is member {stamp.member}, which is there already")
        members[stamp.member] = folder
    missing = sorted(set(range(len(layout.member_bytes))) - set(members))
    if missing:
        raise StoreError(
            f"the store has {len(layout.member_bytes)} folders, and {len(folders)} were given: "
            f"member {missing[0]} is missing. Give all of its folders."
        )
    return [members[index] for index in sorted(members)]
