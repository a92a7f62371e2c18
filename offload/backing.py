"""Where a chunk's weights come from: frozen shards read in place, or the mutable store.

A ``Backing`` fills a host slab with a chunk's bytes and says where each slot lies in that slab.
The engine does not care which kind it has, except that only a mutable one can be written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from .chunk import ChunkLayout, Segment, Slot, segments_between
from .source import ReadPlan
from .store import Store
from .transfer import Transfer


class Backing(ABC):
    """The disk side of one chunk's weights."""

    host_nbytes: int
    host_slots: tuple[Slot, ...]
    segments: tuple[Segment, ...]

    @abstractmethod
    def read(self, view: memoryview, label: str) -> Transfer:
        """Fill a host slab of ``host_nbytes``."""


@final
class SourceBacking(Backing):
    """Frozen weights, read in place from safetensors shards; never written."""

    def __init__(self, plan: ReadPlan, layout: ChunkLayout, keys: dict[str, str]) -> None:
        """``keys`` maps a slot's name to the tensor's name in the shards."""
        self._plan = plan
        self.host_nbytes = plan.nbytes
        offsets = {slot.name: plan.offsets[keys[slot.name]] for slot in layout.slots}
        self.host_slots = tuple(
            Slot(s.name, s.shape, s.dtype, offsets[s.name]) for s in layout.slots
        )
        self.segments = segments_between(offsets.items(), layout)

    def read(self, view: memoryview, label: str) -> Transfer:
        """Read the enclosing aligned ranges of the chunk's tensors."""
        return self._plan.read(view, label=label)


@final
class StoreBacking(Backing):
    """Mutable weights, one region of the store, in the chunk's own layout."""

    def __init__(self, store: Store, layout: ChunkLayout) -> None:
        self.store = store
        self.region = f"weights/{layout.name}"
        self.host_nbytes = layout.nbytes
        self.host_slots = layout.slots
        self.segments = (Segment(0, 0, layout.nbytes),)

    def read(self, view: memoryview, label: str) -> Transfer:
        """Read the latest bytes of the region."""
        return self.store.read(self.region, view)

    def write(self, view: memoryview) -> Transfer:
        """Write new weights; they are real once the store commits."""
        return self.store.write(self.region, view)
