"""Where a chunk's bytes are, which moves are legal, and what each place costs.  No torch."""

from __future__ import annotations

from enum import Enum, auto

from .errors import ResidencyError


class Residency(Enum):
    """Where the valid bytes of a chunk live, and what memory that costs.

    - ``DISK``: only the file holds them. Costs no memory.
    - ``READING``: disk to host copy in flight. Costs one host slab.
    - ``HOST``: a host slab holds them. Costs one host slab.
    - ``UPLOADING``: host to device copy in flight, perhaps queued behind the read that feeds it.
      Costs a host slab and a device slot.
    - ``DEVICE``: a device slot holds them. Costs one device slot.
    - ``BOTH``: slab and slot hold the same bytes. Costs both.
    - ``UPDATING``: the host update is producing new bytes in a host slab; the old ones are void.
    """

    DISK = auto()
    READING = auto()
    HOST = auto()
    UPLOADING = auto()
    DEVICE = auto()
    BOTH = auto()
    UPDATING = auto()


_R = Residency
LEGAL_MOVES: frozenset[tuple[Residency, Residency]] = frozenset(
    {
        (_R.DISK, _R.READING),
        (_R.READING, _R.HOST),
        (_R.READING, _R.DISK),  # the read failed
        (_R.READING, _R.UPLOADING),  # the upload is queued behind the read
        (_R.HOST, _R.UPLOADING),
        (_R.UPLOADING, _R.BOTH),
        (_R.UPLOADING, _R.HOST),  # the upload failed
        (_R.BOTH, _R.HOST),  # the slot is given up
        (_R.BOTH, _R.DEVICE),  # the slab is given up
        (_R.DEVICE, _R.BOTH),  # bytes that a visit changed come down to a new slab
        (_R.HOST, _R.DISK),  # the slab is given up: the store holds the same bytes
        (_R.DEVICE, _R.DISK),  # the slot is given up
        # the update of a chunk voids every other copy of its weights
        (_R.DISK, _R.UPDATING),
        (_R.HOST, _R.UPDATING),
        (_R.READING, _R.UPDATING),  # the update is queued behind the read
        (_R.BOTH, _R.UPDATING),
        (_R.DEVICE, _R.UPDATING),
        (_R.UPDATING, _R.HOST),  # the slab holds the new bytes
        (_R.UPDATING, _R.DISK),  # the update failed, or the step was rolled back
    }
)


def check_move(chunk: str, now: Residency, wanted: Residency) -> Residency:
    """Return ``wanted`` if the move is legal, else raise a ``ResidencyError`` naming the chunk.

    >>> check_move("layers.3", Residency.DISK, Residency.READING).name
    'READING'
    """
    if (now, wanted) not in LEGAL_MOVES:
        legal = ", ".join(sorted(b.name for a, b in LEGAL_MOVES if a is now))
        raise ResidencyError(
            f"chunk {chunk!r} cannot go from {now.name} to {wanted.name}; "
            f"from {now.name} it can go to: {legal}"
        )
    return wanted


def host_slabs(residency: Residency) -> int:
    """Host slabs that a chunk in this state costs."""
    return 0 if residency in (_R.DISK, _R.DEVICE) else 1


def device_slots(residency: Residency) -> int:
    """Device slots that a chunk in this state costs."""
    return 1 if residency in (_R.UPLOADING, _R.DEVICE, _R.BOTH) else 0
