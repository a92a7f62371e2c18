"""One read or write request, carried to its end on the calling thread.  No torch.

``Requests`` belongs to one lane thread.  Short results are continued, interrupted calls are
repeated, and what cannot be finished is an ``OSError`` with path, offset, wanted, got and errno.
Views that break the file's alignment (an address off the grid, a tail shorter than a block)
are copied through a small aligned scratch buffer of the thread.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from typing import Any, final

import aiofiles

from .faults import Call, Operation, SystemCalls
from .files import DirectFile, address_of
from .pool import round_up

SCRATCH_BYTES = 1 << 20
_MAX_STALLED_CALLS = 3


@final
class Requests:
    """Moves bytes between files and views; used by one thread at a time."""

    def __init__(self, calls: SystemCalls) -> None:
        self._calls = calls
        self._scratch: mmap.mmap | None = None
        self._buffered: _BufferedHandles | None = None

    def move(
        self,
        operation: Operation,
        file: DirectFile,
        offset: int,
        view: memoryview,
        wanted_bytes: int,
    ) -> None:
        """Move ``wanted_bytes`` between ``view`` and the file, or raise ``OSError``.

        A view longer than ``wanted_bytes`` is padding that the request may use.
        """
        if not file.direct:
            if self._buffered is None:
                self._buffered = _BufferedHandles(self._calls)
            self._buffered.move(operation, file, offset, view[:wanted_bytes])
            return
        align = file.alignment
        if address_of(view) % align:
            whole = 0
        elif len(view) >= round_up(wanted_bytes, align):
            whole = round_up(wanted_bytes, align)
        else:
            whole = wanted_bytes // align * align
        if whole:
            self._direct(operation, file, offset, view[:whole], min(whole, wanted_bytes))
        for start in range(whole, wanted_bytes, SCRATCH_BYTES):
            stop = min(start + SCRATCH_BYTES, wanted_bytes)
            self._through_scratch(operation, file, offset + start, view[start:stop])

    def _through_scratch(
        self, operation: Operation, file: DirectFile, offset: int, view: memoryview
    ) -> None:
        if self._scratch is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._scratch = mmap.mmap(-1, SCRATCH_BYTES, flags=flags)
        nbytes = len(view)
        padded = round_up(nbytes, file.alignment)
        with memoryview(self._scratch) as whole, whole[:padded] as scratch:
            if operation is Operation.WRITE:
                scratch[:nbytes] = view
                scratch[nbytes:] = bytes(padded - nbytes)
                self._direct(operation, file, offset, scratch, padded)
            else:
                self._direct(operation, file, offset, scratch, nbytes)
                view[:] = scratch[:nbytes]

    def _direct(
        self,
        operation: Operation,
        file: DirectFile,
        offset: int,
        view: memoryview,
        wanted_bytes: int,
    ) -> None:
        done = stalled = 0
        fd = file.fileno()
        system_call = os.preadv if operation is Operation.READ else os.pwritev
        while True:
            at, part = offset + done, view[done:]

            def action(at: int = at, part: memoryview = part) -> int:
                return int(system_call(fd, [part], at))

            try:
                got = self._calls.move(Call(operation, file.path, at, len(part)), action)
            except InterruptedError:
                continue
            except OSError as error:
                raise _failed(operation, file, offset, wanted_bytes, done, error.errno) from error
            if done + got >= wanted_bytes:
                return
            # The next direct request must start on the grid, so a part of a block that has
            # already been moved is moved again.
            step = got // file.alignment * file.alignment
            stalled = 0 if step else stalled + 1
            if stalled >= _MAX_STALLED_CALLS:
                raise _ended(operation, file, offset, wanted_bytes, done + got)
            done += step

    def close(self) -> None:
        """Free the scratch buffer and close buffered handles."""
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        if self._buffered is not None:
            self._buffered.close()
            self._buffered = None


def _failed(
    operation: Operation, file: DirectFile, offset: int, wanted: int, got: int, code: int | None
) -> OSError:
    number = code or errno.EIO
    return OSError(
        number,
        f"{operation.value} of {wanted:,} bytes at offset {offset:,} failed after {got:,} bytes: "
        f"{os.strerror(number)} (errno {errno.errorcode.get(number, number)})",
        str(file.path),
    )


def _ended(operation: Operation, file: DirectFile, offset: int, wanted: int, got: int) -> OSError:
    return OSError(
        errno.EIO,
        f"{operation.value} of {wanted:,} bytes at offset {offset:,} stopped at {got:,} bytes: "
        f"the file has {os.fstat(file.fileno()).st_size:,} bytes, so it is truncated or the disk "
        f"refuses to go on",
        str(file.path),
    )


@final
class _BufferedHandles:
    """Page-cache I/O of one thread through aiofiles, for files without direct I/O.

    aiofiles moves each request on a helper thread of this thread's own event loop; a handle is
    kept per file, since requests on one handle share its position.
    """

    def __init__(self, calls: SystemCalls) -> None:
        self._calls = calls
        self._runner = asyncio.Runner()
        self._handles: dict[DirectFile, Any] = {}

    def move(self, operation: Operation, file: DirectFile, offset: int, view: memoryview) -> None:
        done = stalled = 0
        while done < len(view):
            at, part = offset + done, view[done:]

            def action(at: int = at, part: memoryview = part) -> int:
                return self._runner.run(self._request(operation, file, at, part))

            try:
                got = self._calls.move(Call(operation, file.path, at, len(part)), action)
            except InterruptedError:
                continue
            except OSError as error:
                raise _failed(operation, file, offset, len(view), done, error.errno) from error
            stalled = 0 if got else stalled + 1
            if stalled >= _MAX_STALLED_CALLS:
                raise _ended(operation, file, offset, len(view), done)
            done += got

    async def _request(
        self, operation: Operation, file: DirectFile, offset: int, part: memoryview
    ) -> int:
        handle = self._handles.get(file)
        if handle is None:
            for stale in [known for known in self._handles if known.closed]:
                await self._handles.pop(stale).close()
            mode = "r+b" if file.writable else "rb"
            handle = await aiofiles.open(file.path, mode, buffering=0)
            self._handles[file] = handle
        await handle.seek(offset)
        if operation is Operation.READ:
            got = int(await handle.readinto(part))
            # Read pages are not read again before their next visit; keep them out of RAM.
            os.posix_fadvise(file.fileno(), offset, got, os.POSIX_FADV_DONTNEED)
            return got
        return int(await handle.write(part))

    async def _close_handles(self) -> None:
        for handle in self._handles.values():
            await handle.close()

    def close(self) -> None:
        self._runner.run(self._close_handles())
        self._runner.close()
