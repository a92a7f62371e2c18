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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, final

from .disk_transfer import DiskTransfer, Order, Part, Watchdog, checked_part
from .errors import LaneError, StuckLaneError
from .faults import Faults, Operation, SystemCalls
from .files import DirectFile
from .pool import round_up
from .requests import Requests
from .timeline import LaneName, Timeline

__all__ = ["DirectFile", "DiskLanes", "DiskTransfer", "Part"]

# A transfer is cut evenly over its lane's threads, within these bounds.  Few large requests: beside
# busy Python threads every request waits for the GIL, up to 5 ms (2.8 GB/s of reads beside a
# pure-Python loop fell to 1.5 with requests of 8 MiB, 1.9 with 16 and 2.4 with 32).
MAX_REQUEST_BYTES = 32 << 20
MIN_REQUEST_BYTES = 4 << 20
_LANE_OF = {
    Operation.READ: LaneName.DISK_READ,
    Operation.WRITE: LaneName.DISK_WRITE,
    Operation.SYNC: LaneName.DISK_WRITE,
}


@dataclass(frozen=True, slots=True)
class _Running:
    """What a thread is busy with, for the watchdog."""

    lane: LaneName
    what: str
    since: float


@final
class DiskLanes(Watchdog):
    """Two lanes of threads that move bytes between files and host memory.

    ``request_bytes`` (a multiple of 4096) is the most that one system call moves;
    ``hang_timeout_seconds`` bounds how long one request may take before waiting transfers raise
    ``StuckLaneError``.

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
        request_bytes: int = MAX_REQUEST_BYTES,
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
        self._failure_raised = False
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
        part = checked_part(Operation.READ, file, offset, view, wanted_bytes)
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
        part = checked_part(Operation.WRITE, file, offset, view, None)
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
        transfer = DiskTransfer(label, nbytes, self)
        even = round_up(-(-nbytes // self._threads[_LANE_OF[operation]]))
        request_bytes = min(self.request_bytes, max(even, MIN_REQUEST_BYTES))
        order = Order(operation, transfer, parts, request_bytes, hook)
        with self._lock:
            if self._closed or not self._pools:
                raise LaneError(f"{label}: the disk lanes are not open; use them inside `with`")
            with ExitStack() as held:
                for part in parts:
                    part.file.hold()
                    held.callback(part.file.let_go)
                held.pop_all()  # from here on the order lets go
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
        with self.watched(f"fdatasync of {file.path} for {label}"):
            self.calls.sync(file.path, file.fileno())
        self.timeline.record(LaneName.DISK_WRITE, f"sync {label}", start, time.perf_counter())

    def watched(self, what: str) -> AbstractContextManager[None]:
        """Let the watchdog see disk work that this thread does itself, as part of the write lane.

        The body's length counts against ``hang_timeout_seconds``.
        """
        return self._watched(LaneName.DISK_WRITE, what)

    # Running #

    def _start(self, order: Order) -> None:
        pool = self._pools[_LANE_OF[order.operation]]
        count = len(order.requests)
        beside = order.hook is not None and order.operation is Operation.WRITE
        if not count and not beside:
            self._finish(order)
        try:
            for _ in range(count):
                pool.submit(self._carry_out, order)
            if beside:
                pool.submit(self._run_hook_beside, order)
        except RuntimeError as error:  # the lanes were closed over a disk that hung until now
            self._stop(error)
            self._finish(order)

    def _carry_out(self, order: Order) -> None:
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

    def _run_hook_beside(self, order: Order) -> None:
        self._run_hook(order)
        self._count_down(order)

    def _run_hook(self, order: Order) -> None:
        hook, order.hook = order.hook, None
        if hook is None or self._failure is not None:
            return
        try:
            hook()
        except BaseException as error:  # noqa: BLE001  (kept, and raised to whoever waits)
            self._stop(error)

    def _count_down(self, order: Order) -> None:
        if not order.request_ended():
            return
        if order.operation is Operation.READ:
            self._run_hook(order)
        self._finish(order)

    def _finish(self, order: Order) -> None:
        order.hook = None  # it holds the view
        # A transfer that was still open when the lanes stopped may lack bytes.
        for file in order.files:
            file.let_go()
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

    @property
    def failed(self) -> bool:
        """Whether an error has stopped the lanes."""
        return self._failure is not None

    def _watched(self, lane: LaneName, what: str) -> AbstractContextManager[None]:
        return _Watched(self._running, _Running(lane, what, time.monotonic()))

    def raise_if_failed(self) -> None:
        """Raise the error that stopped the lanes, if one did."""
        if self._failure is not None:
            self._failure_raised = True
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

    def failure_was_raised(self) -> None:
        """Note that a waiting transfer has raised the failure."""
        self._failure_raised = True

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

        Raises ``StuckLaneError`` when a request never returns: its thread cannot be ended; and
        ``LaneError`` for a failure that nobody has waited for.
        """
        with self._idle:
            if self._closed:
                return
            self._closed = True
            if cancel and self._failure is None:
                self._failure = LaneError("the disk lanes were closed before it was moved")
                self._failure_raised = True  # it is the block's own exception that matters
        try:
            while not self._all_ended(0.25):
                self.raise_if_stuck()
        except StuckLaneError as error:
            self._stop(error)
            for pool in self._pools.values():
                pool.shutdown(wait=False, cancel_futures=True)
            with self._lock:
                unfinished = list(self._unfinished)
            for transfer in unfinished:
                transfer.end(error)  # else whoever waits for a cancelled request waits for ever
            raise
        for pool in self._pools.values():
            pool.shutdown(wait=True)
        for requests in self._requests:
            requests.close()
        if self._failure is not None and not self._failure_raised and not cancel:
            self.raise_if_failed()

    def _all_ended(self, seconds: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished, timeout=seconds)


@final
class _Watched(AbstractContextManager[None]):
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
