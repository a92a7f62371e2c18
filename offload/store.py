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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, final

from .commit import make_durable, read_blobs
from .disk_transfer import DiskTransfer
from .errors import StoreError, StuckLaneError
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
    encode,
)
from .region_moves import RegionMoves
from .region_state import PendingWrite, RegionState, StoreStatistics
from .requests import Requests
from .transfer import FinishedTransfer, Transfer
from .verify import RegionCheck, check_blobs, check_regions

__all__ = ["JSON", "Durability", "Region", "RegionCheck", "Store", "StoreStatistics"]

VerifyReads = Literal["first", "always", "never"]


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
        keep_previous: bool,
        resources: ExitStack,
    ) -> None:
        """Use ``create`` or ``open``; ``resources`` holds the locks and files."""
        self._folders = opened.folders
        self._files = opened.files
        self._layout = layout = opened.layout
        self._record = record = opened.record
        self._lanes = lanes
        self._verify_reads = verify_reads
        self._keep_previous = keep_previous
        self._resources = resources
        self._lock = threading.Lock()
        self._states = {region.name: RegionState(region) for region in layout.regions}
        if record is not None:
            for name, valid in record.regions.items():
                self._states[name].committed = valid
        self._step = record.step if record is not None else 0
        self._sequence = record.sequence if record is not None else 0
        self._committing: DiskTransfer | None = None
        # The last commit while no record holds it, and whether writes have spoilt it since.
        self._unrecorded: tuple[JSON, Mapping[str, bytes]] | None = None
        self._torn = False
        self._moves = RegionMoves(self._files, lanes)
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
        keep_previous: bool = False,
    ) -> Self:
        """Make a store in new or empty folders, with all of its disk space reserved.

        ``fingerprint`` says what the state belongs to (model, library) and is compared on
        ``open``; ``meta`` is whatever the caller needs to interpret the regions.  A folder
        in which a store was begun but nothing was ever committed is used again; any other
        content is refused.  ``keep_previous`` keeps the record before the last as well, so that
        several stores whose commits belong together can be opened at a step that all of them
        have; its bytes are valid until the first write after a commit.
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
                keep_previous=keep_previous,
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
        keep_previous: bool = False,
        step: int | None = None,
    ) -> Self:
        """Open a store at its last committed step; its folders may be given in any order.

        ``step`` asks for one of ``committed_steps``: an older one is in force from then on.
        """
        folders = list(weights_of(paths))
        with ExitStack() as resources:
            opened = open_members(folders, expect_fingerprint, resources, lanes=lanes, step=step)
            return cls(
                opened,
                lanes=lanes,
                verify_reads=verify_reads,
                keep_previous=keep_previous,
                resources=resources.pop_all(),
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
                hook = partial(self._moves.verify, state, extent, target, named)
            transfer = self._moves.submit(Operation.READ, state, extent, view, hook)
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
                    write.transfer = self._moves.submit(Operation.WRITE, state, extent, view, hook)
                    state.working, self._torn = write, True
                    self._written_bytes += state.layout.nbytes
                    return write.transfer
            start = time.perf_counter()
            self._wait_for_commit()
            self._waited_seconds += time.perf_counter() - start

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
        optimizer states); they replace those of the step before.  With
        ``durability="checkpoint"`` only every ``snapshot_every``-th commit survives a crash,
        and ``flush`` or ``close`` keep the last one.
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
            if self._layout.durability == "none":
                return FinishedTransfer(f"commit of step {self._step}")
            if self._step % self._layout.snapshot_every:
                self._unrecorded, self._torn = (user, kept), False
                return FinishedTransfer(f"commit of step {self._step}")
            return self._begin_record(user, kept)

    def flush(self) -> None:
        """Make the last commit real if it is not: after training with ``"checkpoint"``, say.

        Refused when regions were written since: they overwrote what that commit meant.
        """
        self._wait_for_commit()
        with self._lock:
            self._raise_if_unusable()
            if self._unrecorded is None:
                return
            if self._torn:
                raise StoreError(
                    f"{self._folders[0]}: regions were written since the commit of step "
                    f"{self._step}, so it cannot be kept. Commit the step, then flush."
                )
            transfer = self._begin_record(*self._unrecorded)
        transfer.wait()

    def _begin_record(self, user: JSON, blobs: Mapping[str, bytes]) -> Transfer:
        self._unrecorded = None
        moved = [state for state in self._states.values() if state.working is not None]
        for state in moved:
            state.pending, state.working = state.working, None
        nbytes = sum(state.layout.nbytes for state in moved)
        transfer = DiskTransfer(f"commit of step {self._step}", nbytes, self._lanes)
        self._committing = transfer
        self._commit_thread.submit(self._carry_out, transfer, moved, self._step, user, blobs)
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
                self._folders[0],
                self._files,
                record,
                blobs,
                self._lanes,
                self._requests,
                keep_previous=self._keep_previous,
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

        A commit that no record holds yet is made real if no region was written since.  Raises
        ``StoreError`` if a commit failed.
        """
        self._end(raise_failure=True)

    def _end(self, *, raise_failure: bool) -> None:
        usable = not self._closed and self._failure is None and not self._lanes.failed
        if usable and self._unrecorded is not None and not self._torn:
            self.flush()
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
