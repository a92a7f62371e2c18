"""One run per store: a lock file held through flock, which the kernel frees when its holder dies.

No torch.  The file names the holder's process for the error message only; what counts is the
lock.  Assumes a filesystem where flock works between the processes that could share the store.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import final

from .errors import StoreError, StoreLockedError

LOCK_NAME = "lock"


@final
class FolderLock:
    """An exclusive lock on a folder, from construction to ``release``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be locked ({error.strerror})") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StoreError(f"{self.path}: cannot be locked (it is not a regular file)")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(fd)
            raise StoreLockedError(
                f"the store {folder} is in use by {holder}. Stop that run, or give another folder."
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._fd: int | None = fd

    def release(self) -> None:
        """Free the lock; a second call does nothing.  The file stays: removing it would race."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)
