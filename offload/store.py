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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, final

from .commit import make_durable, read_blobs
from .disk_transfer import DiskTransfer, Part
from .errors import StoreError, StoreFormatError, StuckLaneError
from .extents import Region, place, weights_of
from .faults import Operation
from .io import DiskLanes
from .members import OpenStore, make_members, open_members
from .record import (
    BLOB_NAMES,
    JSON,
    CommitRecord,
    Durability,
    Layout,
    Valid,
    checksum_of,
    encode,
)
from .region_state import PendingWrite, RegionState
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


@final
class Store:
    """Named regions of mutable bytes that survive any crash, one committed step at a time.

    Make one with ``Store.create`` or ``Store.open``; close it before its lanes.  All methods are
    thread-safe; ``commit`` belongs to the thread that ends the step.
    """

    def __init__(
        self,
        opened: OpenStore,
        *,
        lanes: DiskLanes,
        verify_reads: VerifyReads,
        resources: ExitStack,
    ) -> None:
        """Use ``create`` or ``open``; ``resources`` holds the locks and files."""
        self._folders = opened.folders
        self._files = opened.files
        self._layout = layout = opened.layout
        self._record = record = opened.record
        self._lanes = lanes
        self._verify_reads = verify_reads
        self._resources = resources
        self._lock = threading.Lock()
        self._states = {region.name: RegionState(region) for region in layout.regions}
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
            files = make_members(folders, layout, lanes, resources)
            return cls(
                OpenStore(tuple(folders), files, layout, None),
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
            opened = open_members(folders, expect_fingerprint, resources)
            return cls(
                opened, lanes=lanes, verify_reads=verify_reads, resources=resources.pop_all()
            )

    # Reading and writing #

    def read(self, region: str, view: memoryview) -> Transfer:
        """Read a region's latest bytes: what this process wrote last, else what is committed.

        ``view`` has the region's size or more; a multiple of 4096 saves a copy of the tail.
        """
        view = view.cast("B")
        with self._lock:
            state = self._usable(region, view.nbytes)
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
        view = view.cast("B")
        while True:
            with self._lock:
                state = self._usable(region, view.nbytes)
                extent = state.target()
                if extent is not None:
                    write = PendingWrite(extent)
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
        state: RegionState,
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

    def _verify(
        self, state: RegionState, extent: int, view: memoryview, named: PendingWrite | Valid
    ) -> None:
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

    def _usable(self, region: str, nbytes: int | None = None) -> RegionState:
        self._raise_if_unusable()
        state = self._states.get(region)
        if state is None:
            raise StoreError(
                f"{self._folders[0]} has no region {region!r}; it has {len(self._states)} others"
            )
        if nbytes is not None and nbytes < state.layout.nbytes:
            raise ValueError(
                f"region {region!r} has {state.layout.nbytes:,} bytes, the view {nbytes:,}"
            )
        return state

    def _raise_if_unusable(self) -> None:
        self._raise_if_failed()
        if self._closed:
            raise StoreError(f"the store {self._folders[0]} is closed")

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise StoreError(
                f"a commit of {self._folders[0]} failed: {self._failure}. The state of the last "
                f"commit before it is intact; repair the cause and resume."
            ) from self._failure

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
            transfer = DiskTransfer(label, nbytes, self._lanes)
            self._committing = transfer
        self._commit_thread.submit(self._carry_out, transfer, moved, self._step, user, kept)
        return transfer

    def _carry_out(
        self,
        transfer: DiskTransfer,
        moved: Sequence[RegionState],
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
            record = CommitRecord(
                store_id=self._layout.store_id,
                sequence=self._sequence + 1,
                step=step,
                user=user,
                regions=valid,
                # The record in force names the other blob file.
                blob_file=BLOB_NAMES[(self._sequence + 1) % 2],
                blobs={},
            )
            record = make_durable(
                self._folders[0], self._files, record, blobs, self._lanes, self._requests
            )
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
        """Wait for a pending commit, then free files and locks; uncommitted writes are dropped.

        Raises ``StoreError`` if a commit failed.
        """
        self._end(raise_failure=True)

    def _end(self, *, raise_failure: bool) -> None:
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
            try:
                for transfer in (*filter(None, [self._committing]), *in_flight):
                    transfer.settle()
            except StuckLaneError:
                self._commit_thread.shutdown(wait=False)
                raise
            self._commit_thread.shutdown(wait=True)
            self._requests.close()
        if raise_failure:
            self._raise_if_failed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # An exception of the block is not to be hidden behind the commit that it broke.
        self._end(raise_failure=exc is None)
