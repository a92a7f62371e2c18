"""The exception tree of the package: what a user can meet, and what is our bug.

Every message says what was refused with its values, which object by qualified name, and what
to do about it. ``assert`` is kept for our own invariants; nothing here is raised for those.

::

    HeadraceError
    ├── BudgetError          a tier's byte budget cannot hold what was asked of it
    ├── ResidencyError       a chunk was asked to make an illegal move (our bug, if seen)
    ├── LaneError            a transfer failed; the cause is attached
    │   └── StuckLaneError   a transfer did not end within its time limit
    ├── StoreError           the folder of mutable state cannot be used
    │   ├── StoreLockedError     another run holds it
    │   ├── StoreSpaceError      the disk has too little room
    │   └── StoreFormatError     a file is damaged, foreign or hostile
    ├── SourceError          a checkpoint's shards cannot be read (missing, truncated, hostile)
    └── UnsupportedModelError    a module cannot be streamed; names it and says what to do
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose."""


class BudgetError(HeadraceError, ValueError):
    """A tier's byte budget cannot hold what was asked of it."""


class ResidencyError(HeadraceError, RuntimeError):
    """A chunk was asked to make a move its state does not allow."""


class LaneError(HeadraceError, RuntimeError):
    """A transfer on a lane failed; ``__cause__`` is the original error."""


class StuckLaneError(LaneError):
    """A transfer did not end within its time limit."""


class StoreError(HeadraceError, ValueError):
    """The folder of mutable state cannot be used as asked."""


class StoreLockedError(StoreError):
    """Another run holds the store."""


class StoreSpaceError(StoreError):
    """The disk has too little room for the store."""


class StoreFormatError(StoreError):
    """A file of the store is damaged, foreign or hostile."""


class SourceError(HeadraceError, ValueError):
    """A checkpoint's shards cannot be read as their headers claim."""


class UnsupportedModelError(HeadraceError, ValueError):
    """A module cannot be streamed."""
