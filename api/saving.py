"""Folders that appear whole or not at all.

The result is written to a hidden sibling of its folder, flushed to the disk, and renamed into
place; whatever ends the work before that removes the sibling again.  A folder that holds
something is never replaced.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made: it holds something, or its parent is not writable."""
    if folder.is_dir():
        if any(folder.iterdir()):
            raise InputError(f"--out {folder} holds files already; give a new folder")
    elif folder.exists() or folder.is_symlink():
        raise InputError(f"--out {folder} is not a folder; give a new folder")
    ancestor = next(parent for parent in folder.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder} cannot be made: {ancestor} cannot be written to")


def check_room(folder: Path, nbytes: int) -> None:
    """Refuse a folder whose disk lacks the room for ``nbytes``, with the bytes that are missing."""
    ancestor = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(ancestor).free
    if nbytes > free:
        raise InputError(
            f"{folder} needs {nbytes:,} bytes, but its disk has {free:,} free: "
            f"{nbytes - free:,} bytes are missing; free them, or give a folder on another disk"
        )


@contextmanager
def numbered_errors(path: Path) -> Iterator[None]:
    """Raise what the system refuses a safetensors file as the ``OSError`` that it is.

    It comes as text; what is the user's to change (a full disk) must be told from our faults.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


@contextmanager
def kept_in(store: Path | None) -> Iterator[None]:
    """Where the body cannot write the result of a run, say that ``store`` holds the run."""
    try:
        yield
    except (InputError, OSError) as error:
        refused = isinstance(error, InputError) or error.errno in _DISK_ERRNOS
        if store is None or not refused:
            raise
        raise InputError(
            f"{error}; the run is kept in {store}: once that is mended, "
            f"headrace tune --resume {store} takes it up there"
        ) from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Lend an empty sibling folder; rename it to ``folder`` if the body succeeds."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Random: two that write the same folder, threads of one process too, must not meet.
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(8)}"
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True):
            flush(path)
        flush(partial)
        os.rename(partial, folder)
        flush(folder.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def flush(path: Path) -> None:
    """Make a file, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
