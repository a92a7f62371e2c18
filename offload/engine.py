"""The engine: moves the weights of chunks between disk, host and device along a schedule.

``use`` is the whole interface of the computation: it waits until a chunk is on the device, lends
its tensors, and meanwhile fetches what the schedule says comes next.  Guarantees:

* bytes on each tier never exceed its budget; when room is short, the clean chunk whose next
  visit is farthest gives way, and a *prefetch* never pushes out a chunk needed sooner;
* a chunk in use, in flight, or with unwritten bytes is never given up;
* background lanes never ask for memory, so waiting for them always ends;
* an error of a lane surfaces at the next call.

One thread at a time drives the engine: the one that runs the computation.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

from torch import Tensor

from .backing import Backing
from .budget import Budget, Tier
from .chunk import ChunkLayout
from .device_memory import DevicePool, DeviceSlot, slab_tensor
from .errors import BudgetError
from .lanes import CopyTransfer, DeviceLanes, Mark
from .pool import Slab, SlabPool
from .residency import Residency, check_move
from .schedule import Cursor, Phase, Schedule, Visit
from .timeline import Timeline
from .transfer import Transfer

PREFETCH_VISITS = 16


@final
class Chunk:
    """One chunk at run time: its layout, where its bytes are, and what is in flight."""

    def __init__(self, layout: ChunkLayout, backing: Backing, *, gathered: bool = False) -> None:
        self.name = layout.name
        self.layout = layout
        self.backing = backing
        # Gathered chunks (embedding tables) are read in host memory in the forward pass.
        self.gathered = gathered
        self.residency = Residency.DISK
        self.slab: Slab | None = None
        self.slot: DeviceSlot | None = None
        self.filling: Transfer | None = None  # the read or update that fills the slab
        self.uploading: CopyTransfer | None = None
        self.writing = 0  # writes of the slab that have not ended
        self.users = 0  # visits under way, on either tier
        self.last_use: Mark | None = None
        self.device_views: dict[str, Tensor] = {}

    def move(self, wanted: Residency) -> None:
        """Make a legal move; an illegal one raises."""
        self.residency = check_move(self.name, self.residency, wanted)

    def __repr__(self) -> str:
        return f"Chunk({self.name!r}, {self.layout.nbytes:,} bytes, {self.residency.name})"


@final
class Engine:
    """Keeps chunks where the schedule needs them, within the budgets of host and device."""

    def __init__(
        self,
        *,
        lanes: DeviceLanes,
        host: SlabPool,
        device: DevicePool,
        host_budget: Budget,
        timeline: Timeline,
        hang_seconds: float | None = None,
    ) -> None:
        self.lanes = lanes
        self.host = host
        self.device = device
        self.host_budget = host_budget
        self.timeline = timeline
        self.hang_seconds = hang_seconds
        self.chunks: dict[str, Chunk] = {}
        self._schedules: dict[str, Schedule] = {}
        self._mode = "forward"
        self._cursor: Cursor | None = None
        self._in_flight: deque[tuple[Transfer, Callable[[], None]]] = deque()
        # Set by the owner of updates: starts the pending update of a chunk, if it has one;
        # with `must` it waits for room, without it gives up (False) when there is none.
        self.start_update: Callable[[Chunk, bool], bool] = lambda chunk, must: True
        self.has_update: Callable[[Chunk], bool] = lambda chunk: False

    # Schedule

    def add(self, chunk: Chunk) -> None:
        """Register a chunk; names are unique."""
        if chunk.name in self.chunks:
            raise ValueError(f"chunk {chunk.name!r} is registered already")
        self.chunks[chunk.name] = chunk

    def set_schedule(self, mode: str, schedule: Schedule) -> None:
        """Use ``schedule`` for laps of this mode until a lap teaches a better one."""
        self._schedules[mode] = schedule

    def begin(self, mode: str) -> None:
        """Start a lap (one training step, or one forward pass) of ``mode``."""
        if self._cursor is not None:
            self._schedules[self._mode] = self._cursor.finish()
        self._mode = mode
        self._cursor = Cursor(self._schedules[mode])
        self.pump()

    @property
    def cursor(self) -> Cursor:
        """Where the current lap stands."""
        assert self._cursor is not None, "begin() a lap first"
        return self._cursor

    def schedule(self, mode: str) -> Schedule:
        """The schedule in use for ``mode``."""
        return self._schedules[mode]

    # Completion of what is in flight

    def track(self, transfer: Transfer, complete: Callable[[], None]) -> None:
        """Call ``complete`` on the driving thread once ``transfer`` has ended well."""
        self._in_flight.append((transfer, complete))

    def settle(self) -> None:
        """Complete everything that has ended; raise the first lane error."""
        for _ in range(len(self._in_flight)):
            transfer, complete = self._in_flight.popleft()
            if transfer.done():
                transfer.wait()
                complete()
            else:
                self._in_flight.append((transfer, complete))

    def wait_for(self, transfer: Transfer, reason: str) -> None:
        """Wait for one transfer, count the stall, and complete what has ended."""
        if not transfer.done():
            start = time.perf_counter()
            transfer.wait(self.hang_seconds)
            self.timeline.record_stall(reason, time.perf_counter() - start)
        self.settle()

    def settle_one(self, reason: str) -> bool:
        """Wait for the oldest transfer in flight; False: there is none."""
        if not self._in_flight:
            return False
        self.wait_for(self._in_flight[0][0], reason)
        return True

    def oldest_in_flight(self) -> Transfer:
        """The transfer that has been in flight longest; asking for it when none is, is our bug."""
        assert self._in_flight, "waiting for memory that nothing in flight will free"
        return self._in_flight[0][0]

    def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self._in_flight:
            self.wait_for(self._in_flight[0][0], "drain")

    # Memory

    def _host_candidates(self) -> Iterator[str]:
        for chunk in self.chunks.values():
            if (
                chunk.residency in (Residency.HOST, Residency.BOTH)
                and not chunk.users
                and not chunk.writing
            ):
                yield chunk.name

    def _device_candidates(self) -> Iterator[str]:
        for chunk in self.chunks.values():
            if chunk.residency in (Residency.DEVICE, Residency.BOTH) and not chunk.users:
                yield chunk.name

    def _position(self) -> int:
        return 0 if self._cursor is None else self._cursor.position

    def _evict_host(self, farther_than: int) -> bool:
        schedule = self._schedules[self._mode]
        victim = schedule.victim(
            self._host_candidates(), position=self._position(), farther_than=farther_than
        )
        if victim is None:
            return False
        chunk = self.chunks[victim]
        chunk.move(Residency.DEVICE if chunk.residency is Residency.BOTH else Residency.DISK)
        self._drop_slab(chunk)
        return True

    def _evict_device(self, farther_than: int) -> bool:
        schedule = self._schedules[self._mode]
        victim = schedule.victim(
            self._device_candidates(), position=self._position(), farther_than=farther_than
        )
        if victim is None:
            return False
        self.drop_device(self.chunks[victim])
        return True

    def free_device(self, farther_than: int) -> bool:
        """Give device memory of idle slots, or of a chunk needed late, back to the ledger."""
        before = self.device.budget.free_bytes
        self.device.trim()
        if self.device.budget.free_bytes > before:
            return True
        if not self._evict_device(farther_than):
            return False
        self.device.trim()
        return True

    def _drop_slab(self, chunk: Chunk) -> None:
        assert chunk.slab is not None
        slab, chunk.slab = chunk.slab, None
        self.host.release(slab)

    def drop_device(self, chunk: Chunk) -> None:
        """Give up a chunk's device copy (clean: updates happen in host memory)."""
        chunk.move(Residency.HOST if chunk.residency is Residency.BOTH else Residency.DISK)
        self.release_slot(chunk)

    def release_slot(self, chunk: Chunk) -> None:
        """Return a chunk's device slot to the pool."""
        assert chunk.slot is not None
        chunk.device_views.clear()  # a visit's frame may still hold the dict, not the tensors
        slot, chunk.slot = chunk.slot, None
        self.device.release(slot)

    def try_host(self, borrower: str, nbytes: int, *, farther_than: int) -> Slab | None:
        """A slab if there is room, giving up chunks needed later than ``farther_than`` visits."""
        while (slab := self.host.try_acquire(borrower, nbytes)) is None:
            if not self._evict_host(farther_than):
                return None
        return slab

    def acquire_host(self, borrower: str, nbytes: int) -> Slab:
        """A slab, waiting for lanes to free one if need be; ``BudgetError`` if they cannot."""
        while True:
            self.settle()
            slab = self.try_host(borrower, nbytes, farther_than=-1)
            if slab is not None:
                return slab
            if not self._in_flight:
                return self.host.acquire(borrower, nbytes)
            self.wait_for(self._in_flight[0][0], "host memory")

    def try_device(self, borrower: str, nbytes: int, *, farther_than: int) -> DeviceSlot | None:
        """A slot if there is room, giving up chunks needed later than ``farther_than`` visits."""
        while (slot := self.device.try_acquire(borrower, nbytes)) is None:
            if not self._evict_device(farther_than):
                return None
        return slot

    def acquire_device(self, borrower: str, nbytes: int) -> DeviceSlot:
        """A slot, waiting for lanes to free one if need be; ``BudgetError`` if they cannot."""
        while True:
            self.settle()
            slot = self.try_device(borrower, nbytes, farther_than=-1)
            if slot is not None:
                return slot
            if not self._in_flight:
                return self.device.acquire(borrower, nbytes)
            self.wait_for(self._in_flight[0][0], "device memory")

    # Movement

    def _start_read(self, chunk: Chunk, *, farther_than: int, must: bool) -> bool:
        nbytes = chunk.backing.host_nbytes
        if must:
            slab: Slab | None = self.acquire_host(chunk.name, nbytes)
        else:
            slab = self.try_host(chunk.name, nbytes, farther_than=farther_than)
        if slab is None:
            return False
        chunk.slab = slab
        chunk.move(Residency.READING)
        read = chunk.backing.read(slab.view[:nbytes], f"read {chunk.name}")
        chunk.filling = read

        def done() -> None:
            if chunk.filling is read:  # else an upload or update was queued behind it
                chunk.filling = None
            if chunk.residency is Residency.READING:
                chunk.move(Residency.HOST)

        self.track(read, done)
        return True

    def _start_upload(self, chunk: Chunk, *, farther_than: int, must: bool) -> bool:
        if must:
            slot: DeviceSlot | None = self.acquire_device(chunk.name, chunk.layout.nbytes)
        else:
            slot = self.try_device(chunk.name, chunk.layout.nbytes, farther_than=farther_than)
        if slot is None:
            return False
        if chunk.slab is None or chunk.residency not in (Residency.HOST, Residency.READING):
            # acquiring the slot let the host copy go: begin again
            self.device.release(slot)
            return False
        chunk.slot = slot
        chunk.move(Residency.UPLOADING)
        chunk.uploading = self.lanes.upload(
            f"h2d {chunk.name}",
            slab_tensor(chunk.slab),
            slot.buffer,
            chunk.backing.segments,
            after=chunk.filling,
            free=self.lanes.mark(),
        )
        self.track(chunk.uploading, lambda: self._upload_done(chunk))
        return True

    def _upload_done(self, chunk: Chunk) -> None:
        chunk.move(Residency.BOTH)

    def pump(self) -> None:
        """Start the fetches that the schedule asks for next, while there is room."""
        self.settle()
        if self._cursor is None:
            return
        device_open = True
        for ahead, visit in self.cursor.schedule.upcoming(self.cursor.position, PREFETCH_VISITS):
            chunk = self.chunks[visit.chunk]
            if self.has_update(chunk):
                # Its weights are stale until the pending update has run.
                if not self.start_update(chunk, False):
                    return
                continue
            if visit.phase is Phase.UPDATE or chunk.residency is Residency.UPDATING:
                continue
            if chunk.residency is Residency.DISK and not self._start_read(
                chunk, farther_than=ahead, must=False
            ):
                return
            if (
                visit.tier is Tier.DEVICE
                and device_open
                and chunk.residency in (Residency.HOST, Residency.READING)
            ):
                device_open = self._start_upload(chunk, farther_than=ahead, must=False)

    def _make_host(self, chunk: Chunk) -> None:
        while True:
            self.settle()
            if self.has_update(chunk):
                self.start_update(chunk, True)
            if chunk.filling is not None:
                self.wait_for(chunk.filling, f"{chunk.residency.name.lower()} {chunk.name}")
                continue
            if chunk.slab is not None:
                return
            if chunk.residency is Residency.DEVICE:
                # The host copy was given up; the device copy is as good but out of reach here.
                self.drop_device(chunk)
            self._start_read(chunk, farther_than=-1, must=True)

    def _make_device(self, chunk: Chunk) -> None:
        while True:
            self.settle()
            if self.has_update(chunk):
                self.start_update(chunk, True)
            if chunk.residency is Residency.UPDATING:
                assert chunk.filling is not None
                self.wait_for(chunk.filling, f"update {chunk.name}")
            elif chunk.residency is Residency.DISK:
                self._start_read(chunk, farther_than=-1, must=True)
            elif chunk.residency in (Residency.HOST, Residency.READING):
                self._start_upload(chunk, farther_than=-1, must=True)
            else:
                break
        assert chunk.slot is not None and chunk.uploading is not None
        start = time.perf_counter()
        self.lanes.order_after(chunk.uploading)
        self.timeline.record_stall(f"fetch {chunk.name}", time.perf_counter() - start)
        self.settle()

    @contextmanager
    def use(self, name: str, phase: Phase) -> Iterator[dict[str, Tensor]]:
        """Lend a chunk's tensors on the device; fetch what comes next meanwhile."""
        chunk = self.chunks[name]
        self.cursor.advance(Visit(name, phase, Tier.DEVICE))
        # Nested prefetches must not push the chunk out between its arrival and its use.
        chunk.users += 1
        try:
            self._make_device(chunk)
            assert chunk.slot is not None
            if not chunk.device_views:
                chunk.device_views = chunk.layout.views(chunk.slot.buffer)
            self.pump()
            yield chunk.device_views
        finally:
            chunk.users -= 1
        self.pump()

    @contextmanager
    def use_host(self, name: str, phase: Phase) -> Iterator[dict[str, Tensor]]:
        """Lend a chunk's tensors in host memory (read only); nothing goes to the device."""
        chunk = self.chunks[name]
        self.cursor.advance(Visit(name, phase, Tier.HOST))
        chunk.users += 1
        try:
            self._make_host(chunk)
            assert chunk.slab is not None
            buffer = slab_tensor(chunk.slab)
            views = {slot.name: slot.view(buffer) for slot in chunk.backing.host_slots}
            del buffer
            try:
                yield views
            finally:
                views.clear()  # the caller's frame must not keep the slab from being given up
        finally:
            chunk.users -= 1
        self.pump()

    # Updates

    def take_for_update(self, chunk: Chunk, *, must: bool) -> bool:
        """Bring the weights to a host slab and void every other copy; False: no room now.

        Afterwards the chunk is ``UPDATING``; ``chunk.filling`` is the read to wait for, or None.
        """
        self.settle()
        if chunk.residency is Residency.UPLOADING:
            if not must:
                return False
            assert chunk.uploading is not None
            self.wait_for(chunk.uploading, f"fetch {chunk.name}")
        if chunk.residency is Residency.DEVICE:
            self.drop_device(chunk)
        if chunk.residency is Residency.DISK and not self._start_read(
            chunk, farther_than=0, must=must
        ):
            return False
        if chunk.residency is Residency.BOTH:
            self.drop_device(chunk)
        chunk.move(Residency.UPDATING)
        return True

    def set_updating(self, chunk: Chunk, transfer: Transfer, complete: Callable[[], None]) -> None:
        """The update under way fills the slab; ``complete`` runs when it has ended."""
        chunk.filling = transfer

        def done() -> None:
            chunk.filling = None
            chunk.move(Residency.HOST)
            complete()

        self.track(transfer, done)

    def forget(self, chunk: Chunk) -> None:
        """Void every copy in memory: the store's bytes were rolled back."""
        self.settle()
        if chunk.residency in (Residency.BOTH, Residency.DEVICE):
            self.drop_device(chunk)
        if chunk.residency is Residency.HOST:
            chunk.move(Residency.DISK)
            self._drop_slab(chunk)
        assert chunk.residency is Residency.DISK, chunk

    def least_budgets(self) -> dict[Tier, int]:
        """The least bytes per tier with which every chunk can be visited at all."""
        host = max((c.backing.host_nbytes for c in self.chunks.values()), default=0)
        device = max((c.layout.nbytes for c in self.chunks.values() if not c.gathered), default=0)
        return {Tier.HOST: host, Tier.DEVICE: device}

    def check_budgets(self) -> None:
        """Refuse budgets that cannot hold the largest chunk, naming it and what would work."""
        least = self.least_budgets()
        for tier, budget in ((Tier.HOST, self.host_budget), (Tier.DEVICE, self.device.budget)):
            if least[tier] > budget.limit_bytes:
                sizes: dict[str, int] = {
                    c.name: c.backing.host_nbytes if tier is Tier.HOST else c.layout.nbytes
                    for c in self.chunks.values()
                }
                largest = max(sizes, key=lambda name: sizes[name])
                raise BudgetError(
                    f"chunk {largest!r} alone needs {sizes[largest]:,} bytes on {tier.name}, but "
                    f"the budget is {budget.limit_bytes:,}. Raise {tier.value}_budget to at least "
                    f"{sizes[largest]:,} bytes."
                )

    def close(self) -> None:
        """Wait for the lanes and give all memory back."""
        self.drain()
        self.lanes.close()
        for chunk in self.chunks.values():
            if chunk.slot is not None:
                self.release_slot(chunk)
            if chunk.slab is not None:
                self._drop_slab(chunk)
        self.device.close()
