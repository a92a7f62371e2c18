"""``DirectFile``: one file opened for direct I/O where the filesystem allows it.  No torch.

Direct I/O moves bytes between the disk and a slab without the page cache, at a tenth of the CPU
time; it asks that addresses, offsets and lengths be multiples of an alignment.  The alignment
is what the kernel says (statx, STATX_DIOALIGN) or, where it says nothing, 4096, tried once.
Where direct I/O is refused the file is marked ``direct=False`` and the lanes move its bytes
through the page cache; that is announced once per filesystem.

Assumes Linux.  Symbolic links are followed (download caches are made of them); whatever is not a
regular file is refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self, final

import numpy as np

from .faults import SystemCalls
from .pool import PAGE_BYTES, round_up

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256


class BufferedIOWarning(UserWarning):
    """A filesystem refuses direct I/O, so bytes pass through the page cache."""


def address_of(view: memoryview) -> int:
    """Return the address of a contiguous view's first byte, read-only views included."""
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])


def _stated_alignment(fd: int) -> tuple[int, int] | None:
    """Return (memory, offset) alignment from statx; (0, 0) means refused, None not stated."""
    libc = ctypes.CDLL(None, use_errno=True)
    record = ctypes.create_string_buffer(_STATX_BYTES)
    failed = libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, record)
    if failed:
        return None  # a kernel without statx states nothing; the trial decides
    mask = int.from_bytes(record.raw[0:4], "little")
    if not mask & _STATX_DIOALIGN:
        return None
    memory = int.from_bytes(record.raw[152:156], "little")
    offset = int.from_bytes(record.raw[156:160], "little")
    return memory, offset


@final
class DirectFile:
    """A regular file of ``nbytes`` bytes whose bytes lanes move.

    ``direct`` says whether the page cache is passed by; ``alignment`` is the multiple that
    addresses and offsets of direct requests need (at most 4096).
    """

    def __init__(self, path: Path, fd: int, *, writable: bool) -> None:
        self.path = path
        self.writable = writable
        self._fd: int | None = fd
        self._lock = threading.Lock()
        self._holders = 0
        self._closing = False
        self.nbytes = os.fstat(fd).st_size
        self.direct, self.alignment = self._turn_direct(fd)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Self:
        """Open an existing regular file."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            return cls(path, fd, writable=writable)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, path: Path, *, nbytes: int, calls: SystemCalls | None = None) -> Self:
        """Make a new file of ``nbytes`` (rounded up to 4096) whose disk blocks are reserved."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            (calls or SystemCalls()).allocate(path, fd, round_up(nbytes))
            return cls(path, fd, writable=True)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise

    def _turn_direct(self, fd: int) -> tuple[bool, int]:
        stated = _stated_alignment(fd)
        if stated == (0, 0):
            return self._refused("the filesystem states that it has none")
        try:
            self._reopen_direct(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return self._refused(os.strerror(error.errno))
        alignment = max(stated) if stated is not None else PAGE_BYTES
        if alignment > PAGE_BYTES:
            return self._refused(f"it asks for {alignment:,}-byte alignment")
        return True, alignment

    def _reopen_direct(self, fd: int) -> None:
        # The same descriptor number is kept, so that nothing else in this class cares.
        access = os.O_RDWR if self.writable else os.O_RDONLY
        direct = os.open(self.path, access | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            same, mine = os.fstat(direct), os.fstat(fd)
            if (same.st_dev, same.st_ino) != (mine.st_dev, mine.st_ino):
                raise OSError(errno.ESTALE, "the file was replaced while it was opened")
            os.dup2(direct, fd, inheritable=False)
        finally:
            os.close(direct)

    def _refused(self, reason: str) -> tuple[bool, int]:
        warnings.warn(
            f"{self.path.parent}: direct I/O is refused ({reason}). Its files are moved through "
            f"the page cache: expect a third of the bandwidth, 20-30x the CPU time, and memory "
            f"used outside host_budget. Put them on a local ext4, xfs or btrfs disk.",
            BufferedIOWarning,
            stacklevel=5,
        )
        return False, 1

    def fileno(self) -> int:
        """The open descriptor."""
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether the descriptor has been closed."""
        return self._fd is None

    def hold(self) -> None:
        """Keep the descriptor open until ``let_go``, for a transfer in flight."""
        with self._lock:
            if self._closing:
                raise ValueError(f"{self.path} is closed")
            self._holders += 1

    def let_go(self) -> None:
        """End one ``hold``."""
        with self._lock:
            self._holders -= 1
        self._close_if_free()

    def close(self) -> None:
        """Take no more transfers and close the descriptor once those in flight have ended.

        Closing it under them could hand its number, and their bytes, to another file.
        """
        with self._lock:
            self._closing = True
        self._close_if_free()

    def _close_if_free(self) -> None:
        with self._lock:
            if not self._closing or self._holders or self._fd is None:
                return
            fd, self._fd = self._fd, None
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DirectFile({str(self.path)!r}, {self.nbytes:,} bytes, direct={self.direct})"
