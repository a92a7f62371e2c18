"""``DiskLanes``: the disk read lane and the disk write lane.  No torch.

Guarantees: transfers of a lane start in the order in which they were given; every byte asked
for has moved when ``Transfer.wait`` returns; the first error stops both lanes and is raised at
the next call and by every transfer it reached, with its cause; no thread outlives the ``with``
block.  Each lane has its own few threads, so that reads and writes overlap and every drive of
a striped store has requests in flight.

Assumes that the caller leaves a view alone from the call until its transfer has ended.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self, final

from .errors import LaneError, StuckLaneError
from .faults import Faults, Operation, SystemCalls
from .files import DirectFile
from .requests import Requests
from .timeline import LaneName, Timeline
from .transfer import Transfer

__all__ = ["DirectFile", "DiskLanes", "DiskTransfer", "Part"]

DEFAULT_REQUEST_BYTES = 8 << 20
_LANE_OF = {
    Operation.READ: LaneName.DISK_READ,
    Operation.WRITE: LaneName.DISK_WRITE,
    Operation.SYNC: LaneName.DISK_WRITE,
}


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous piece of a transfer: ``wanted_bytes`` of ``file`` at ``offset``.

    ``view`` may be longer than ``wanted_bytes``: the rest is padding for direct I/O.
    """

    file: DirectFile
    offset: int
    view: memoryview
    wanted_bytes: int


@final
class DiskTransfer(Transfer):
    """A transfer on a disk lane; ends when its last request and its hook have ended."""

    def __init__(self, label: str, nbytes: int, watch: Callable[[], None]) -> None:
        self.label = label
        self.nbytes = nbytes
        self._watch = watch
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._then: list[Callable[[], None]] = []

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait until every byte has moved; raise ``LaneError`` with the cause if one did not."""
        limit = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not self._ended.is_set():
            rest = 0.25 if limit is None else min(0.25, limit - time.monotonic())
            if self._ended.wait(max(rest, 0.0)):
                break
            self._watch()
            if limit is not None and time.monotonic() >= limit:
                raise StuckLaneError(
                    f"{self.label} ({self.nbytes:,} bytes) did not end within {timeout_seconds:g} "
                    f"seconds. Look at the system log for the disk, or raise the time limit."
                )
        if self._error is not None:
            kind = type(self._error) if isinstance(self._error, LaneError) else LaneError
            cause = self._error.__cause__ or self._error
            raise kind(f"{self.label} ({self.nbytes:,} bytes) failed: {self._error}") from cause

    def done(self) -> bool:
        """Whether the transfer has ended."""
        return self._ended.is_set()

    def when_ended(self, action: Callable[[], None]) -> None:
        """Run ``action`` once the transfer has ended, well or badly; at once if it has."""
        with self._lock:
            if not self._ended.is_set():
                self._then.append(action)
                return
        action()

    def end(self, error: BaseException | None = None) -> None:
        """End the transfer; only the first call counts."""
        with self._lock:
            if self._ended.is_set():
                return
            self._error = error
            self._ended.set()
            then, self._then = self._then, []
        for action in then:
            action()


@dataclass(frozen=True, slots=True)
class _Running:
    """What a thread is busy with, for the watchdog."""

    lane: LaneName
    what: str
    since: float


class _Order:
    """One transfer's requests while they are carried out; freed when the transfer ends."""

    def __init__(
        self,
        operation: Operation,
        transfer: DiskTransfer,
        parts: Sequence[Part],
        request_bytes: int,
        hook: Callable[[], None] | None,
    ) -> None:
        self.operation = operation
        self.transfer = transfer
        # A deque, not arguments of the executor's work items: those outlive the request, and
        # a view that is alive when the transfer has ended keeps its slab from being unmapped.
        self.requests = deque(_requests(parts, request_bytes))
        self.hook = hook
        self.lock = threading.Lock()
        self.left = len(self.requests)
        if hook is not None and operation is Operation.WRITE:
            self.left += 1  # the hook runs beside the requests, on any thread of the lane

    def request_ended(self) -> bool:
        """Count one request down and return whether it was the last."""
        with self.lock:
            self.left -= 1
            return self.left == 0


def _requests(parts: Sequence[Part], request_bytes: int) -> Iterator[Part]:
    """Cut parts into requests, taking the parts in turn so that all their drives are busy."""
    done = [0] * len(parts)
    open_parts = list(range(len(parts)))
    while open_parts:
        for index in tuple(open_parts):
            part, start = parts[index], done[index]
            stop = start + request_bytes
            if stop >= part.wanted_bytes:
                # The last request keeps the padding behind it.
                open_parts.remove(index)
                yield Part(
                    part.file, part.offset + start, part.view[start:], part.wanted_bytes - start
                )
            else:
                yield Part(part.file, part.offset + start, part.view[start:stop], request_bytes)
            done[index] = stop


@final
class DiskLanes:
    """Two lanes of threads that move bytes between files and host memory.

    ``request_bytes`` (a multiple of 4096) is what one system call moves; ``hang_timeout_seconds``
    bounds how long one request may take before waiting transfers raise ``StuckLaneError``.

    >>> from headrace.offload.timeline import Timeline
    >>> import tempfile, pathlib
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name, "numbers")
    >>> _ = path.write_bytes(bytes(range(200)))
    >>> into = bytearray(100)
    >>> with DiskLanes(timeline=Timeline()) as lanes, DirectFile.open(path) as file:
    ...     lanes.read(file, 0, memoryview(into), label="numbers").wait()
    >>> into[99]
    99
    >>> folder.cleanup()
    """

    def __init__(
        self,
        *,
        timeline: Timeline,
        read_threads: int = 4,
        write_threads: int = 4,
        request_bytes: int = DEFAULT_REQUEST_BYTES,
        faults: Faults | None = None,
        hang_timeout_seconds: float | None = None,
    ) -> None:
        if min(read_threads, write_threads) < 1:
            raise ValueError(
                f"read_threads={read_threads} and write_threads={write_threads}: give 1 or more"
            )
        if request_bytes < 4096 or request_bytes % 4096:
            raise ValueError(f"request_bytes={request_bytes:,} is not a positive multiple of 4096")
        self.timeline = timeline
        self.calls = SystemCalls(faults)
        self.request_bytes = request_bytes
        self._hang_timeout_seconds = hang_timeout_seconds
        self._threads = {LaneName.DISK_READ: read_threads, LaneName.DISK_WRITE: write_threads}
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._pools: dict[LaneName, ThreadPoolExecutor] = {}
        self._requests: list[Requests] = []
        self._local = threading.local()
        self._running: dict[int, _Running] = {}
        self._unfinished: set[DiskTransfer] = set()
        self._failure: BaseException | None = None
        self._closed = False

    # Transfers #

    def read(
        self,
        file: DirectFile,
        offset: int,
        view: memoryview,
        *,
        label: str,
        wanted_bytes: int | None = None,
        hook: Callable[[], None] | None = None,
        after: Sequence[DiskTransfer] = (),
    ) -> DiskTransfer:
        """Read into ``view``; ``wanted_bytes`` of it must arrive, the rest may pass the end.

        ``hook`` runs on a lane thread after the last byte; what it raises fails the transfer.
        The read starts when the transfers in ``after`` have ended.
        """
        part = _checked(file, offset, view, wanted_bytes)
        return self.transfer_parts(Operation.READ, [part], label=label, hook=hook, after=after)

    def write(
        self,
        file: DirectFile,
        offset: int,
        view: memoryview,
        *,
        label: str,
        hook: Callable[[], None] | None = None,
        after: Sequence[DiskTransfer] = (),
    ) -> DiskTransfer:
        """Write ``view``, which stays unchanged until the transfer ends.

        A length off the alignment grid is padded with zeroes up to it.  ``hook`` runs on a lane
        thread while the bytes are written (to checksum them, say).
        """
        if not file.writable:
            raise ValueError(f"{file.path} was opened for reading only; cannot write {label}")
        part = _checked(file, offset, view, None)
        return self.transfer_parts(Operation.WRITE, [part], label=label, hook=hook, after=after)

    def transfer_parts(
        self,
        operation: Operation,
        parts: Sequence[Part],
        *,
        label: str,
        hook: Callable[[], None] | None = None,
        after: Sequence[DiskTransfer] = (),
    ) -> DiskTransfer:
        """Move several parts, perhaps of several files, as one transfer."""
        self.raise_if_failed()
        nbytes = sum(part.wanted_bytes for part in parts)
        transfer = DiskTransfer(label, nbytes, self.raise_if_stuck)
        order = _Order(operation, transfer, parts, self.request_bytes, hook)
        with self._lock:
            if self._closed or not self._pools:
                raise LaneError(f"{label}: the disk lanes are not open; use them inside `with`")
            self._unfinished.add(transfer)
        waiting = [earlier for earlier in after if not earlier.done()]
        if not waiting:
            self._start(order)
            return transfer
        left = [len(waiting)]
        lock = threading.Lock()

        def one_ended() -> None:
            with lock:
                left[0] -= 1
                last = left[0] == 0
            if last:
                self._start(order)

        for earlier in waiting:
            earlier.when_ended(one_ended)
        return transfer

    def sync(self, file: DirectFile, *, label: str) -> None:
        """Make everything written to ``file`` durable, on this thread, seen by the watchdog."""
        start = time.perf_counter()
        with self._watched(LaneName.DISK_WRITE, f"fdatasync of {file.path} for {label}"):
            self.calls.sync(file.path, file.fileno())
        self.timeline.record(LaneName.DISK_WRITE, f"sync {label}", start, time.perf_counter())

    # Running #

    def _start(self, order: _Order) -> None:
        pool = self._pools[_LANE_OF[order.operation]]
        count = len(order.requests)
        beside = order.hook is not None and order.operation is Operation.WRITE
        if not count and not beside:
            self._finish(order)
        for _ in range(count):
            pool.submit(self._carry_out, order)
        if beside:
            pool.submit(self._run_hook_beside, order)

    def _carry_out(self, order: _Order) -> None:
        lane = _LANE_OF[order.operation]
        transfer = order.transfer
        request = order.requests.popleft()
        if self._failure is None:
            what = (
                f"{transfer.label}: {order.operation.value} of {request.wanted_bytes:,} bytes at "
                f"offset {request.offset:,} of {request.file.path}"
            )
            start = time.perf_counter()
            try:
                with self._watched(lane, what):
                    self._thread_requests().move(
                        order.operation,
                        request.file,
                        request.offset,
                        request.view,
                        request.wanted_bytes,
                    )
            except BaseException as error:  # noqa: BLE001  (kept, and raised to whoever waits)
                self._stop(error)
            else:
                end = time.perf_counter()
                self.timeline.record(lane, transfer.label, start, end, request.wanted_bytes)
        del request
        self._count_down(order)

    def _run_hook_beside(self, order: _Order) -> None:
        self._run_hook(order)
        self._count_down(order)

    def _run_hook(self, order: _Order) -> None:
        hook, order.hook = order.hook, None
        if hook is None or self._failure is not None:
            return
        try:
            hook()
        except BaseException as error:  # noqa: BLE001  (kept, and raised to whoever waits)
            self._stop(error)

    def _count_down(self, order: _Order) -> None:
        if not order.request_ended():
            return
        if order.operation is Operation.READ:
            self._run_hook(order)
        self._finish(order)

    def _finish(self, order: _Order) -> None:
        order.hook = None  # it holds the view
        # A transfer that was still open when the lanes stopped may lack bytes.
        order.transfer.end(self._failure)
        with self._idle:
            self._unfinished.discard(order.transfer)
            self._idle.notify_all()

    def _stop(self, error: BaseException) -> None:
        _drop_frames(error)
        with self._lock:
            if self._failure is None:
                self._failure = error

    def _thread_requests(self) -> Requests:
        mine: Requests | None = getattr(self._local, "requests", None)
        if mine is None:
            mine = Requests(self.calls)
            self._local.requests = mine
            with self._lock:
                self._requests.append(mine)
        return mine

    # Failures #

    def _watched(self, lane: LaneName, what: str) -> _Watched:
        return _Watched(self._running, _Running(lane, what, time.monotonic()))

    def raise_if_failed(self) -> None:
        """Raise the error that stopped the lanes, if one did."""
        if self._failure is not None:
            raise LaneError(
                f"the disk lanes have stopped: {self._failure}. "
                f"Repair the cause, then resume from the last committed step."
            ) from self._failure

    def raise_if_stuck(self) -> None:
        """Raise ``StuckLaneError`` if a request has been running for longer than the limit."""
        if self._hang_timeout_seconds is None:
            return
        now = time.monotonic()
        for running in list(self._running.values()):
            seconds = now - running.since
            if seconds > self._hang_timeout_seconds:
                raise StuckLaneError(
                    f"lane {running.lane.value} is stuck for {seconds:.1f} seconds (limit "
                    f"{self._hang_timeout_seconds:g}) in {running.what}. The disk does not answer: "
                    f"look at the system log. Nothing committed is lost."
                )

    # Lifetime #

    def __enter__(self) -> Self:
        if self._pools or self._closed:
            raise ValueError("disk lanes are opened once; make new ones")
        self._pools = {
            lane: ThreadPoolExecutor(count, thread_name_prefix=f"headrace-{lane.value}")
            for lane, count in self._threads.items()
        }
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=exc is not None)

    def close(self, *, cancel: bool = False) -> None:
        """Wait for every transfer (or drop those not started) and end the threads.

        Raises ``StuckLaneError`` when a request never returns: its thread cannot be ended.
        """
        with self._idle:
            if self._closed:
                return
            self._closed = True
            if cancel and self._failure is None and self._unfinished:
                self._failure = LaneError("the disk lanes were closed before it was moved")
        try:
            while not self._all_ended(0.25):
                self.raise_if_stuck()
        except StuckLaneError:
            for pool in self._pools.values():
                pool.shutdown(wait=False, cancel_futures=True)
            raise
        for pool in self._pools.values():
            pool.shutdown(wait=True)
        for requests in self._requests:
            requests.close()

    def _all_ended(self, seconds: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished, timeout=seconds)


@final
class _Watched:
    """Notes what this thread is busy with for the length of a ``with`` block."""

    __slots__ = ("_running", "_what")

    def __init__(self, running: dict[int, _Running], what: _Running) -> None:
        self._running = running
        self._what = what

    def __enter__(self) -> None:
        self._running[threading.get_ident()] = self._what

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._running[threading.get_ident()]


def _drop_frames(error: BaseException) -> None:
    """Free what the frames of a kept error hold: views, which would keep slabs mapped."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _checked(file: DirectFile, offset: int, view: memoryview, wanted_bytes: int | None) -> Part:
    """Check a request's numbers against the file before any system call sees them."""
    if not view.contiguous or view.itemsize != 1:
        view = view.cast("B")
    wanted = len(view) if wanted_bytes is None else wanted_bytes
    if not 0 <= wanted <= len(view):
        raise ValueError(f"{wanted:,} bytes of {file.path} do not fit a {len(view):,}-byte view")
    if offset < 0 or offset % file.alignment:
        raise ValueError(
            f"offset {offset:,} of {file.path} is not a multiple of {file.alignment} bytes"
        )
    if offset + wanted > file.nbytes:
        raise ValueError(
            f"{wanted:,} bytes at offset {offset:,} pass the end of {file.path} "
            f"({file.nbytes:,} bytes)"
        )
    return Part(file, offset, view, wanted)
