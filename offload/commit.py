"""Reads and writes the small files of a store: layout, stamps, blobs and the commit record.

The record is replaced by rename after it and everything it names have been synced, so a reader
finds the old state or the new one, never a mixture.  Each member's file begins with two pages of
*stamps*, written alternately before each record: they say which store and member the file is and
which commit last touched it, so that a record or a member restored from an old copy is refused.
No torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import StoreFormatError
from .faults import Operation, SystemCalls
from .files import DirectFile
from .io import DiskLanes
from .pool import PAGE_BYTES
from .record import (
    BLOB_NAMES,
    COMMIT_NAME,
    EXTENTS_NAME,
    JSON,
    LAYOUT_NAME,
    PREVIOUS_NAME,
    BlobEntry,
    CommitRecord,
    Fields,
    Layout,
    checksum_of,
    decode,
    encode,
    read_small_file,
    refuse,
)
from .requests import Requests


def replace_file(path: Path, data: bytes, calls: SystemCalls) -> None:
    """Make ``path`` hold ``data`` in one durable step: a crash leaves the old file or the new."""
    draft = path.with_name(path.name + ".tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(draft, flags, 0o644)
    try:
        calls.write_all(draft, fd, data)
        calls.sync(draft, fd)
    finally:
        os.close(fd)
    calls.rename(draft, path)
    calls.sync_folder(path.parent)


def write_layout(folder: Path, layout: Layout, calls: SystemCalls) -> None:
    """Write the layout, which makes a folder a store."""
    replace_file(folder / LAYOUT_NAME, encode("layout", layout.to_body()), calls)


def read_layout(folder: Path) -> Layout | None:
    """Return the folder's layout, or None if it has none."""
    path = folder / LAYOUT_NAME
    try:
        data = read_small_file(path)
    except FileNotFoundError:
        return None
    return Layout.from_body(decode("layout", data, path), path)


def write_record(folder: Path, record: CommitRecord, calls: SystemCalls) -> None:
    """Make a commit real."""
    replace_file(folder / COMMIT_NAME, encode("commit", record.to_body()), calls)


def keep_record(folder: Path, calls: SystemCalls) -> None:
    """Give the record in force a second name, under which the next commit leaves it.

    Durable with the next record, whose commit syncs the folder after both renames.
    """
    draft = folder / (PREVIOUS_NAME + ".tmp")
    with suppress(FileNotFoundError):
        os.unlink(draft)
    try:
        os.link(folder / COMMIT_NAME, draft)
    except FileNotFoundError:  # the first commit
        return
    calls.rename(draft, folder / PREVIOUS_NAME)


def bring_back_record(folder: Path, calls: SystemCalls) -> None:
    """Put the record before the last in force again."""
    calls.rename(folder / PREVIOUS_NAME, folder / COMMIT_NAME)
    calls.sync_folder(folder)


def read_record(folder: Path, layout: Layout, name: str = COMMIT_NAME) -> CommitRecord | None:
    """Return the last committed record (or the one before it), or None if there is none."""
    path = folder / name
    try:
        data = read_small_file(path)
    except FileNotFoundError:
        return None
    return CommitRecord.from_body(decode("commit", data, path), layout, path)


# Stamps #


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which store and member an extents file is, and the newest commit that was begun on it."""

    store_id: str
    member: int
    sequence: int


def write_stamp(file: DirectFile, stamp: Stamp, requests: Requests) -> None:
    """Write a stamp over the older of the file's two; the next sync makes it durable."""
    body: dict[str, JSON] = {
        "store_id": stamp.store_id,
        "member": stamp.member,
        "sequence": stamp.sequence,
    }
    page = encode("stamp", body).ljust(PAGE_BYTES, b"\0")
    offset = stamp.sequence % 2 * PAGE_BYTES
    requests.move(Operation.WRITE, file, offset, memoryview(page), PAGE_BYTES)


def read_stamp(path: Path) -> Stamp | None:
    """Return the newest valid stamp, or None if both pages are still zero.

    One damaged page is what a power cut during a commit leaves, and is no error.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        refuse(path, "it is not a regular file")
    with path.open("rb") as file:
        pages = [file.read(PAGE_BYTES) for _ in range(2)]
    if not any(any(page) for page in pages):
        return None
    stamps = []
    failure: StoreFormatError | None = None
    for page in pages:
        try:
            body = decode("stamp", page.rstrip(b"\0"), path)
        except StoreFormatError as error:
            failure = error
            continue
        fields = Fields(body, path, "the stamp")
        stamps.append(
            Stamp(fields.text("store_id"), fields.integer("member"), fields.integer("sequence"))
        )
    if not stamps:
        raise StoreFormatError(f"{path}: neither of its stamps can be read") from failure
    return max(stamps, key=lambda stamp: stamp.sequence)


# Blobs #


def write_blobs(
    folder: Path, name: str, blobs: Mapping[str, bytes], calls: SystemCalls
) -> dict[str, BlobEntry]:
    """Write blobs one behind the other, sync them, and return where each lies."""
    path = folder / name
    entries, offset = {}, 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        for blob_name, data in blobs.items():
            calls.write_all(path, fd, data, offset=offset)
            entries[blob_name] = BlobEntry(offset, len(data), checksum_of(data))
            offset += len(data)
        os.ftruncate(fd, offset)
        calls.sync(path, fd)
    finally:
        os.close(fd)
    return entries


def read_blobs(folder: Path, record: CommitRecord) -> dict[str, bytes]:
    """Return the record's blobs; a missing, short or changed one is a ``StoreFormatError``."""
    if not record.blobs:
        return {}
    path = folder / record.blob_file
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        refuse(path, f"it cannot be opened as a plain file ({error.strerror})")
    blobs = {}
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            refuse(path, "it is not a regular file")
        for name, entry in record.blobs.items():
            if entry.offset + entry.nbytes > status.st_size:
                refuse(
                    path,
                    f"it is truncated: blob {name!r} ends at {entry.offset + entry.nbytes:,}, "
                    f"the file at {status.st_size:,}",
                )
            file.seek(entry.offset)
            data = file.read(entry.nbytes)
            if checksum_of(data) != entry.checksum:
                refuse(path, f"blob {name!r} does not match its checksum: bits have changed")
            blobs[name] = data
    return blobs


def make_durable(
    folder: Path,
    files: Sequence[DirectFile],
    record: CommitRecord,
    blobs: Mapping[str, bytes],
    lanes: DiskLanes,
    requests: Requests,
    *,
    keep_previous: bool = False,
) -> CommitRecord:
    """Make a record real and return it with its blobs: stamps, extents, blobs, then the record.

    The order is the guarantee: whatever the record names is on the disk before the record is.
    ``keep_previous`` leaves the record that it replaces under a name of its own.
    """
    step = f"step {record.step}"
    for member, file in enumerate(files):
        with lanes.watched(f"the stamp of {file.path} for {step}"):
            write_stamp(file, Stamp(record.store_id, member, record.sequence), requests)
    for file in files:
        lanes.sync(file, label=step)
    with lanes.watched(f"the blobs of {step} in {folder}"):
        entries = write_blobs(folder, record.blob_file, blobs, lanes.calls)
    record = replace(record, blobs=entries)
    with lanes.watched(f"the record of {step} in {folder}"):
        if keep_previous:
            keep_record(folder, lanes.calls)
        write_record(folder, record, lanes.calls)
    return record


# Folders #

OUR_NAMES = frozenset(
    {LAYOUT_NAME, COMMIT_NAME, EXTENTS_NAME, *BLOB_NAMES, "lock"}
    | {LAYOUT_NAME + ".tmp", COMMIT_NAME + ".tmp", PREVIOUS_NAME, PREVIOUS_NAME + ".tmp"}
)
# A drive's own folder at the root of its filesystem.
_HARMLESS_NAMES = frozenset({"lost+found"})


def foreign_names(folder: Path) -> list[str]:
    """Return names in a folder that no store makes."""
    return sorted(set(os.listdir(folder)) - OUR_NAMES - _HARMLESS_NAMES)


def remove_uncommitted(folders: Sequence[Path]) -> None:
    """Remove the files of a store in which nothing was ever committed."""
    for folder in folders:
        # The layout goes first: without it the rest is recognised as an interrupted creation.
        for name in (LAYOUT_NAME, *sorted(OUR_NAMES - {LAYOUT_NAME, COMMIT_NAME, "lock"})):
            with suppress(FileNotFoundError):
                os.unlink(folder / name)
