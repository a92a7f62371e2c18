"""Which of a region's extents may be read and which may be overwritten.  No torch.

The one rule that everything rests on: an extent that the record in force names, or that a commit
under way names, is never overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .disk_transfer import DiskTransfer
from .record import RegionLayout, Valid, checksum_of


@dataclass(slots=True, eq=False)
class PendingWrite:
    """Bytes given in this process: where they go, and their checksum once they are there."""

    extent: int
    transfer: DiskTransfer | None = None
    checksum: str = ""

    def take_checksum(self, source: memoryview) -> None:
        self.checksum = checksum_of(source)

    def wait(self) -> None:
        assert self.transfer is not None
        self.transfer.wait()


@dataclass(slots=True, eq=False)
class RegionState:
    """One region: what the durable record names, what a pending commit names, what is newer."""

    layout: RegionLayout
    committed: Valid | None = None
    pending: PendingWrite | None = None
    working: PendingWrite | None = None
    verified: bool = False
    in_flight: dict[int, list[DiskTransfer]] = field(default_factory=dict)

    def target(self) -> int | None:
        """The extent that the next write may overwrite, or None while a commit must end first."""
        if self.working is not None:
            return self.working.extent
        if len(self.layout.extents) == 1:
            return 0
        taken = {named.extent for named in (self.committed, self.pending) if named is not None}
        free = [extent for extent in (0, 1) if extent not in taken]
        return free[0] if free else None

    def users_of(self, extent: int) -> list[DiskTransfer]:
        """Transfers in flight on an extent, which the next one on it must wait for."""
        users = [t for t in self.in_flight.get(extent, ()) if not t.done()]
        self.in_flight[extent] = users
        return users


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """A snapshot of one store: sizes, bytes moved by this process, and seconds in commits."""

    step: int
    region_count: int
    file_bytes: int
    read_bytes: int
    written_bytes: int
    records_written: int
    commit_seconds: float
    waited_for_commit_seconds: float
