"""Makes and opens the folders of a store: locks, space, identity, completeness.  No torch.

A store has one or more *members*, each a folder with one extents file; the first also holds the
layout, the record and the blobs.  Nothing is removed or overwritten here unless it is certain
that nothing was ever committed in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .commit import (
    Stamp,
    bring_back_record,
    foreign_names,
    read_layout,
    read_record,
    read_stamp,
    remove_uncommitted,
    write_blobs,
    write_layout,
    write_stamp,
)
from .errors import StoreError, StoreFormatError, StoreSpaceError
from .extents import check_space
from .files import DirectFile
from .io import DiskLanes
from .lock import FolderLock
from .record import (
    BLOB_NAMES,
    COMMIT_NAME,
    EXTENTS_NAME,
    JSON,
    LAYOUT_NAME,
    PREVIOUS_NAME,
    CommitRecord,
    Layout,
)
from .requests import Requests


@dataclass(frozen=True, slots=True)
class OpenStore:
    """A locked store: its folders (the first holds the record), files by member, and state."""

    folders: tuple[Path, ...]
    files: tuple[DirectFile, ...]
    layout: Layout
    record: CommitRecord | None


def make_members(
    folders: Sequence[Path], layout: Layout, lanes: DiskLanes, resources: ExitStack
) -> tuple[DirectFile, ...]:
    """Lock the folders and make a new store in them; ``resources`` closes what is opened."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        resources.callback(FolderLock(folder).release)
    _check_unused(folders)
    remove_uncommitted(folders)
    check_space(folders, layout.member_bytes)
    requests = Requests(lanes.calls)
    files = []
    try:
        for index, (folder, nbytes) in enumerate(zip(folders, layout.member_bytes, strict=True)):
            file = _allocate(folder, nbytes, lanes)
            resources.callback(file.close)
            files.append(file)
            write_stamp(file, Stamp(layout.store_id, index, 0), requests)
            lanes.sync(file, label="a new store")
            lanes.calls.sync_folder(folder)
    finally:
        requests.close()
    for name in BLOB_NAMES:
        write_blobs(folders[0], name, {}, lanes.calls)
    # Last: the layout is what makes the folder a store.
    write_layout(folders[0], layout, lanes.calls)
    return tuple(files)


def committed_steps(folders: Sequence[Path]) -> tuple[int, ...]:
    """The steps at which a store can be opened, newest first: one, or two if it keeps both."""
    primary, layout = _find_layout(folders)
    records = (read_record(primary, layout, name) for name in (COMMIT_NAME, PREVIOUS_NAME))
    return tuple(sorted({record.step for record in records if record is not None}, reverse=True))


def open_members(
    folders: Sequence[Path],
    expected: Mapping[str, JSON] | None,
    resources: ExitStack,
    *,
    lanes: DiskLanes,
    step: int | None = None,
) -> OpenStore:
    """Lock and check a store's folders; ``resources`` closes what is opened.

    ``step``: open at this step, the last one or the one before it (if that was kept).
    """
    for folder in folders:
        if not folder.is_dir():
            raise StoreError(f"{folder}: there is no such folder, so no store to open")
    # Before a lock file is left in a folder that is no store.
    if not any(os.path.lexists(folder / LAYOUT_NAME) for folder in folders):
        _refuse_no_store(folders)
    for folder in folders:
        resources.callback(FolderLock(folder).release)
    primary, layout = _find_layout(folders)
    if expected is not None:
        _check_fingerprint(primary, layout.fingerprint, expected)
    if layout.durability == "none":
        raise StoreError(
            f"{primary}: this is a scratch store (durability='none'), which keeps no committed "
            f"state. Start a new run, with durability='step' to resume it."
        )
    record = read_record(primary, layout)
    if record is None:
        raise StoreError(
            f"{primary}: the run was stopped before its first commit, so there is nothing to "
            f"resume. Start it again on the same folder."
        )
    if step is not None and record.step != step:
        previous = read_record(primary, layout, PREVIOUS_NAME)
        if previous is None or previous.step != step:
            raise StoreError(
                f"{primary}: it was asked for step {step}, but it holds "
                f"{' and '.join(map(str, committed_steps(folders)))}. Resume from another copy."
            )
        _order_members(folders, layout, previous.sequence)  # refuses before anything changes
        bring_back_record(primary, lanes.calls)
        record = previous
    ordered = _order_members(folders, layout, record.sequence)
    files = []
    for folder, nbytes in zip(ordered, layout.member_bytes, strict=True):
        file = DirectFile.open(folder / EXTENTS_NAME, writable=True)
        resources.callback(file.close)
        if file.nbytes != nbytes:
            raise StoreFormatError(
                f"{file.path}: it has {file.nbytes:,} bytes, the layout says {nbytes:,}. It is "
                f"truncated or belongs to another store; restore it from a copy."
            )
        files.append(file)
    others = tuple(folder for folder in ordered if folder != primary)
    return OpenStore((primary, *others), tuple(files), layout, record)


def _check_unused(folders: Sequence[Path]) -> None:
    """Refuse folders that hold foreign files or anything that was ever committed."""
    begun = set()
    for folder in folders:
        foreign = foreign_names(folder)
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise StoreError(
                f"{folder} holds files that are no part of a store: "
                f"{', '.join(foreign[:3])}{more}. Give a new or empty folder."
            )
        layout = read_layout(folder)
        if (folder / COMMIT_NAME).exists():
            if layout is None:
                raise StoreFormatError(
                    f"{folder / LAYOUT_NAME}: it is missing, but {COMMIT_NAME} is there. The store "
                    f"is damaged; restore it, or remove the folder."
                )
            record = read_record(folder, layout)
            step = record.step if record is not None else 0
            raise StoreError(
                f"{folder} already holds a store with {step} committed steps of "
                f"{dict(layout.fingerprint)!r}. Resume it, give another folder, or remove it."
            )
        if layout is not None:
            begun.add(layout.store_id)
    for folder in folders:
        stamp = read_stamp(folder / EXTENTS_NAME)
        # Sequence 1 without a record is a first commit that never became real.
        if stamp is not None and not (
            stamp.sequence == 0 or (stamp.sequence == 1 and stamp.store_id in begun)
        ):
            raise StoreError(
                f"{folder / EXTENTS_NAME}: it belongs to store {stamp.store_id}, which has "
                f"committed {stamp.sequence} times and has its record elsewhere. "
                f"Give another folder."
            )


def _allocate(folder: Path, nbytes: int, lanes: DiskLanes) -> DirectFile:
    path = folder / EXTENTS_NAME
    try:
        return DirectFile.create(path, nbytes=nbytes, calls=lanes.calls)
    except OSError as error:
        raise StoreSpaceError(
            f"{path}: {nbytes:,} bytes cannot be reserved ({error.strerror}). Free space on that "
            f"disk or add a folder on another one."
        ) from error


def _refuse_no_store(folders: Sequence[Path]) -> NoReturn:
    raise StoreError(
        f"{', '.join(map(str, folders))}: no store here ({LAYOUT_NAME} is missing). If the store "
        f"has several folders, give all of them."
    )


def _find_layout(folders: Sequence[Path]) -> tuple[Path, Layout]:
    found = [(folder, layout) for folder in folders if (layout := read_layout(folder)) is not None]
    if not found:
        _refuse_no_store(folders)
    if len(found) > 1:
        raise StoreError(
            f"{found[0][0]} and {found[1][0]} are different stores; open them one at a time"
        )
    return found[0]


def _check_fingerprint(
    folder: Path, found: Mapping[str, JSON], expected: Mapping[str, JSON]
) -> None:
    differing = [
        f"{key}: the store has {found.get(key)!r}, this run {expected.get(key)!r}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    if differing:
        raise StoreError(
            f"{folder} belongs to another run: {'; '.join(differing)}. "
            f"Give the store of this model, or a new folder."
        )


def _order_members(folders: Sequence[Path], layout: Layout, sequence: int) -> list[Path]:
    """Return the folders in member order, after checking that all are there and in step."""
    members: dict[int, Path] = {}
    for folder in folders:
        path = folder / EXTENTS_NAME
        stamp = read_stamp(path)
        if stamp is None:
            raise StoreFormatError(f"{path}: it is missing or was never stamped")
        if stamp.store_id != layout.store_id:
            raise StoreFormatError(
                f"{path}: it belongs to store {stamp.store_id}, the layout to {layout.store_id}"
            )
        if not sequence <= stamp.sequence <= sequence + 1:
            raise StoreFormatError(
                f"{path}: it is of commit {stamp.sequence}, the record of commit {sequence}: one "
                f"of them is a stale copy. Restore all files of the store from the same moment."
            )
        if stamp.member in members or stamp.member >= len(layout.member_bytes):
            raise StoreFormatError(f"{path}: it is member {stamp.member}, which is there already")
        members[stamp.member] = folder
    missing = sorted(set(range(len(layout.member_bytes))) - set(members))
    if missing:
        raise StoreError(
            f"the store has {len(layout.member_bytes)} folders, and {len(folders)} were given: "
            f"member {missing[0]} is missing. Give all of its folders."
        )
    return [members[index] for index in sorted(members)]
