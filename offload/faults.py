"""The system calls of the disk half, and faults that tests inject into them.  No torch.

``SystemCalls`` is the only way in which lanes and stores touch file contents: each call passes
an optional ``Faults`` object first, which may raise an ``OSError``, wait, shorten a result or
kill the process.  Without one the calls go straight to the kernel.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import final


class Operation(Enum):
    """What a system call does to a file."""

    READ = "read"
    WRITE = "write"
    SYNC = "sync"
    RENAME = "rename"
    ALLOCATE = "allocate"


class FaultKind(Enum):
    """What goes wrong."""

    SHORT = "short"
    ERROR = "error"
    SLOW = "slow"
    HANG = "hang"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Call:
    """One system call about to happen: ``nbytes`` wanted at ``offset`` of ``path``."""

    operation: Operation
    path: Path
    offset: int = 0
    nbytes: int = 0


class Faults(ABC):
    """Decides what goes wrong; called from every lane thread at once."""

    @abstractmethod
    def before(self, call: Call) -> None:
        """Let the call happen by returning; raise ``OSError`` to fail it, or wait to delay it."""

    @abstractmethod
    def after(self, call: Call, got_bytes: int) -> int:
        """Return the number of bytes that the caller is told were moved."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong at the ``nth`` matching call (from 1), ``times`` times.

    ``path_part`` restricts the fault to paths that contain it, ``operation`` to one kind of
    call.  ``code`` is the errno of an ``ERROR``; ``got_bytes`` what a ``SHORT`` call reports;
    ``seconds`` how long a ``SLOW`` or ``HANG`` call is held up (0 for a
    ``HANG``: until released).
    """

    kind: FaultKind
    operation: Operation | None = None
    path_part: str = ""
    nth: int = 1
    times: int = 1
    code: int = errno.EIO
    got_bytes: int = 4096
    seconds: float = 0.0


@final
class ScriptedFaults(Faults):
    """Faults at counted calls, so that a test fails at the same place every time.

    A ``HANG`` holds its thread until ``release`` is called.  ``seen`` lists every call in the
    order in which it was made.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = list(faults)
        self._matched = [0] * len(self._faults)
        self._lock = threading.Lock()
        self._released = threading.Event()
        self.hanging = threading.Event()
        self.seen: list[Call] = []

    def arm(self, fault: Fault) -> None:
        """Add a fault; its matching calls are counted from now on."""
        with self._lock:
            self._faults.append(fault)
            self._matched.append(0)

    def release(self) -> None:
        """Let every hanging call go on, now and later."""
        self._released.set()

    def _strike(self, call: Call, kinds: frozenset[FaultKind]) -> list[Fault]:
        struck = []
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.kind not in kinds or fault.operation not in (None, call.operation):
                    continue
                if fault.path_part not in str(call.path):
                    continue
                self._matched[index] += 1
                if fault.nth <= self._matched[index] < fault.nth + fault.times:
                    struck.append(fault)
        return struck

    def before(self, call: Call) -> None:
        """Kill, delay, hold up or fail the call as the script says."""
        with self._lock:
            self.seen.append(call)
        kinds = frozenset(FaultKind) - {FaultKind.SHORT}
        for fault in self._strike(call, kinds):
            if fault.kind is FaultKind.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.kind is FaultKind.SLOW:
                time.sleep(fault.seconds)
            elif fault.kind is FaultKind.HANG:
                self.hanging.set()
                self._released.wait(fault.seconds or None)
            else:
                raise OSError(fault.code, os.strerror(fault.code), str(call.path))

    def after(self, call: Call, got_bytes: int) -> int:
        """Shorten the result as the script says."""
        for fault in self._strike(call, frozenset({FaultKind.SHORT})):
            got_bytes = min(got_bytes, fault.got_bytes)
        return got_bytes


@final
class SystemCalls:
    """The calls that move, sync, rename and allocate; every one may be made to fail."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults

    def move(self, call: Call, action: Callable[[], int]) -> int:
        """Run ``action``, a read or write that returns its byte count, through the faults."""
        if self._faults is None:
            return action()
        self._faults.before(call)
        return self._faults.after(call, action())

    def _run(self, call: Call, action: Callable[[], None]) -> None:
        if self._faults is not None:
            self._faults.before(call)
        action()

    def sync(self, path: Path, fd: int) -> None:
        """Make the file's data, and the metadata needed to read it, durable (fdatasync)."""
        self._run(Call(Operation.SYNC, path), lambda: os.fdatasync(fd))

    def sync_folder(self, folder: Path) -> None:
        """Make a folder's entries durable, so that a rename in it survives a power cut."""

        def action() -> None:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        self._run(Call(Operation.SYNC, folder), action)

    def rename(self, source: Path, target: Path) -> None:
        """Replace ``target`` by ``source`` in one step."""
        self._run(Call(Operation.RENAME, target), lambda: os.replace(source, target))

    def allocate(self, path: Path, fd: int, nbytes: int) -> None:
        """Reserve disk blocks for the first ``nbytes`` of a file."""
        call = Call(Operation.ALLOCATE, path, 0, nbytes)
        self._run(call, lambda: os.posix_fallocate(fd, 0, nbytes))

    def write_all(self, path: Path, fd: int, data: bytes, *, offset: int = 0) -> None:
        """Write all of ``data`` through the page cache, continuing short writes."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            call = Call(Operation.WRITE, path, offset + done, len(view) - done)
            part, at = view[done:], offset + done
            got = self.move(call, lambda part=part, at=at: os.pwrite(fd, part, at))  # type: ignore[misc]
            if got <= 0:
                raise OSError(errno.EIO, f"wrote {done:,} of {len(view):,} bytes", str(path))
            done += got
