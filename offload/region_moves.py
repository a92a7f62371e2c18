"""Moves regions between memory and extents, in order, and checks what was read.  No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from .disk_transfer import DiskTransfer, Part
from .errors import StoreFormatError
from .faults import Operation
from .files import DirectFile
from .io import DiskLanes
from .record import Valid, checksum_of
from .region_state import PendingWrite, RegionState


@final
class RegionMoves:
    """Cuts a region into the segments of an extent and hands them to the lanes."""

    def __init__(self, files: Sequence[DirectFile], lanes: DiskLanes) -> None:
        self._files = tuple(files)
        self._lanes = lanes

    def submit(
        self,
        operation: Operation,
        state: RegionState,
        extent: int,
        view: memoryview,
        hook: Callable[[], None] | None,
    ) -> DiskTransfer:
        """Start a read or write of an extent behind what is in flight on it."""
        parts, start = [], 0
        for segment in state.layout.extents[extent]:
            wanted = min(segment.nbytes, state.layout.nbytes - start)
            part = view[start : start + segment.nbytes]
            parts.append(Part(self._files[segment.member], segment.offset, part, wanted))
            start += segment.nbytes
        # Reads and writes run on lanes of their own: order on one extent is kept here.
        users = state.users_of(extent)
        transfer = self._lanes.transfer_parts(
            operation,
            parts,
            label=f"{operation.value} {state.layout.name}",
            hook=hook,
            after=users,
        )
        users.append(transfer)
        return transfer

    def verify(
        self, state: RegionState, extent: int, view: memoryview, named: PendingWrite | Valid
    ) -> None:
        """Compare what was read with the checksum that the record, or the write, gives it."""
        found, wanted = checksum_of(view), named.checksum
        if found != wanted:
            segment = state.layout.extents[extent][0]
            path = self._files[segment.member].path
            raise StoreFormatError(
                f"{path}: region {state.layout.name!r} at offset {segment.offset:,} has checksum "
                f"{found}, its record says {wanted}. Bits have changed on the disk; restore the "
                f"store from a copy."
            )
        state.verified = True
