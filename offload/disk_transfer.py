"""``DiskTransfer`` and the requests that it is cut into.  No torch.

An ``Order`` is a transfer on its way: its requests are taken by the threads of a lane in turn,
and its last request ends the transfer.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from .errors import LaneError, StuckLaneError
from .faults import Operation
from .files import DirectFile
from .pool import round_up
from .transfer import Transfer


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous piece of a transfer: ``wanted_bytes`` of ``file`` at ``offset``.

    ``view`` may be longer than ``wanted_bytes``: the rest is padding for direct I/O.
    """

    file: DirectFile
    offset: int
    view: memoryview
    wanted_bytes: int


class Watchdog(ABC):
    """Who a waiting transfer asks whether waiting has any sense, and tells what it raised."""

    @abstractmethod
    def raise_if_stuck(self) -> None:
        """Raise ``StuckLaneError`` if a request has been running for too long."""

    @abstractmethod
    def failure_was_raised(self) -> None:
        """Note that the caller has seen the failure, so that it need not be raised at the end."""


@final
class DiskTransfer(Transfer):
    """A transfer on a disk lane; ends when its last request and its hook have ended."""

    def __init__(self, label: str, nbytes: int, watchdog: Watchdog) -> None:
        self.label = label
        self.nbytes = nbytes
        self._watchdog = watchdog
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
            self._watchdog.raise_if_stuck()
            if limit is not None and time.monotonic() >= limit:
                raise StuckLaneError(
                    f"{self.label} ({self.nbytes:,} bytes) did not end within {timeout_seconds:g} "
                    f"seconds. Look at the system log for the disk, or raise the time limit."
                )
        if self._error is not None:
            self._watchdog.failure_was_raised()
            kind = type(self._error) if isinstance(self._error, LaneError) else LaneError
            cause = self._error.__cause__ or self._error
            raise kind(f"{self.label} ({self.nbytes:,} bytes) failed: {self._error}") from cause

    def settle(self) -> None:
        """Wait until the transfer has ended, well or badly; raise only if its lane is stuck."""
        while not self._ended.wait(0.25):
            self._watchdog.raise_if_stuck()

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


@final
class Order:
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
        self.files = [part.file for part in parts]
        # A deque, not arguments of the executor's work items: those outlive the request, and
        # a view that is alive when the transfer has ended keeps its slab from being unmapped.
        self.requests = deque(cut(parts, request_bytes))
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


def cut(parts: Sequence[Part], request_bytes: int) -> Iterator[Part]:
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


def checked_part(
    operation: Operation,
    file: DirectFile,
    offset: int,
    view: memoryview,
    wanted_bytes: int | None,
) -> Part:
    """Check a request's numbers against the file before any system call sees them."""
    view = view.cast("B")
    wanted = len(view) if wanted_bytes is None else wanted_bytes
    if not 0 <= wanted <= len(view):
        raise ValueError(f"{wanted:,} bytes of {file.path} do not fit a {len(view):,}-byte view")
    if offset < 0 or offset % file.alignment:
        raise ValueError(
            f"offset {offset:,} of {file.path} is not a multiple of {file.alignment} bytes"
        )
    # A write's tail is padded up to the alignment, and must not make the file longer.
    moved = wanted if operation is Operation.READ else round_up(wanted, file.alignment)
    if offset + moved > file.nbytes:
        raise ValueError(
            f"{wanted:,} bytes at offset {offset:,} pass the end of {file.path} "
            f"({file.nbytes:,} bytes)"
        )
    return Part(file, offset, view, wanted)
