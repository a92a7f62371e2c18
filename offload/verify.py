"""Compares a store's committed bytes with the checksums of its record.  No torch.

Reads piece by piece through one 16 MiB buffer of its own, so that checking a store of any size
needs no room in the host budget.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from .commit import read_blobs
from .errors import StoreFormatError
from .faults import Operation, SystemCalls
from .files import DirectFile
from .record import CommitRecord, RegionLayout, Valid
from .requests import Requests

_BUFFER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RegionCheck:
    """The result for one region or blob; ``reason`` says what is wrong if it is not ``ok``."""

    name: str
    nbytes: int
    ok: bool
    reason: str = ""


def check_regions(
    committed: Sequence[tuple[RegionLayout, Valid]],
    files: Sequence[DirectFile],
    calls: SystemCalls,
) -> Iterator[RegionCheck]:
    """Yield the result of each region as soon as it has been read."""
    requests = Requests(calls)
    buffer = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(buffer)
    try:
        for region, valid in committed:
            yield _check(region, valid, files, requests, view)
    finally:
        view.release()
        buffer.close()
        requests.close()


def _check(
    region: RegionLayout,
    valid: Valid,
    files: Sequence[DirectFile],
    requests: Requests,
    view: memoryview,
) -> RegionCheck:
    digest, left = xxhash.xxh3_64(), region.nbytes
    for segment in region.extents[valid.extent]:
        file = files[segment.member]
        for start in range(0, segment.nbytes, _BUFFER_BYTES):
            nbytes = min(_BUFFER_BYTES, segment.nbytes - start)
            try:
                requests.move(Operation.READ, file, segment.offset + start, view[:nbytes], nbytes)
            except OSError as error:
                return RegionCheck(region.name, region.nbytes, False, str(error))
            digest.update(view[: min(nbytes, left)])
            left -= min(nbytes, left)
    if digest.hexdigest() != valid.checksum:
        first = region.extents[valid.extent][0]
        return RegionCheck(
            region.name,
            region.nbytes,
            False,
            f"{files[first.member].path}: {region.nbytes:,} bytes at offset {first.offset:,} have "
            f"checksum {digest.hexdigest()}, the record says {valid.checksum}",
        )
    return RegionCheck(region.name, region.nbytes, True)


def check_blobs(folder: Path, record: CommitRecord) -> Iterator[RegionCheck]:
    """Yield the result of each blob of a record."""
    for name, entry in record.blobs.items():
        try:
            read_blobs(folder, replace(record, blobs={name: entry}))
        except StoreFormatError as error:
            yield RegionCheck(f"blob {name}", entry.nbytes, False, str(error))
        else:
            yield RegionCheck(f"blob {name}", entry.nbytes, True)
