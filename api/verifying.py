"""``headrace verify``: whether files on disk hold what they should, without loading a model.

A store has a checksum for every region: all committed bytes are read and compared, through one
buffer of 16 MiB.  A checkpoint's safetensors shards hold no checksums: there, every shard must be
present, and every tensor's dtype, shape and byte range must agree with its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from headrace.offload.io import DiskLanes
from headrace.offload.record import LAYOUT_NAME
from headrace.offload.source import SafetensorsIndex
from headrace.offload.store import Store
from headrace.offload.timeline import Timeline

from .errors import InputError


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One part that was checked; ``reason`` says what is wrong if it is not ``ok``."""

    name: str
    nbytes: int
    ok: bool
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a dict that ``json.dumps`` takes."""
        return asdict(self)


def verify(folders: Sequence[Path]) -> Iterator[Check]:
    """Yield the result for each part of a store (one folder or several) or of a checkpoint.

    What cannot be opened at all raises: a missing folder, a store in use, a hostile header.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    if any((folder / LAYOUT_NAME).exists() for folder in folders):
        with (
            DiskLanes(timeline=Timeline()) as lanes,
            Store.open(list(folders), lanes=lanes, verify_reads="never") as store,
        ):
            for region in store.verify():
                yield Check(region.name, region.nbytes, region.ok, region.reason)
        return
    if len(folders) != 1:
        raise InputError("several folders were given, but they hold no store; give one checkpoint")
    index = SafetensorsIndex.open(folders[0])
    try:
        for name, entry in index.items():
            yield Check(name, entry.nbytes, True)
    finally:
        index.close()
