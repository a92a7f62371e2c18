"""Scales of encoded weights that a run trains: masters in host memory, copied in at visits.

The codes around them stay as they are on disk; nothing is written.  Memory: the scales themselves
(fp32: 4 bytes a block of the codec), from the host budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

from torch import Tensor

from ..offload.device_memory import slab_tensor
from ..offload.pool import Slab
from ..offload.runtime import Runtime
from ..offload.schedule import Phase


@final
class HeldScales:
    """The trained scales of a model, by parameter name."""

    def __init__(self, runtime: Runtime, chunk_of: Mapping[str, str]) -> None:
        """Reads the masters from their chunks: one pass over those."""
        self._engine = engine = runtime.engine
        self._slabs: list[Slab] = []
        self._masters: dict[str, Tensor] = {}
        self._names: dict[str, list[str]] = {}
        self._stale: dict[str, bool] = {}
        for name, chunk in chunk_of.items():
            self._names.setdefault(chunk, []).append(name)
        if self._names:
            engine.begin("forward")
        for chunk, names in self._names.items():
            layout = engine.chunks[chunk].layout.restricted_to(frozenset(names))
            slab = engine.acquire_host(f"scales of {chunk}", layout.nbytes)
            self._slabs.append(slab)
            self._masters |= layout.views(slab_tensor(slab))
            with engine.use_host(chunk, Phase.FORWARD) as views:
                for name in names:
                    self._masters[name].copy_(views[name])
            self._stale[chunk] = True
        self._chunk_of = dict(chunk_of)

    def __contains__(self, name: str) -> bool:
        return name in self._masters

    def master(self, name: str) -> Tensor:
        """The scales as trained so far."""
        return self._masters[name]

    def change(self, name: str, update: Callable[[Tensor], None]) -> None:
        """Update the scales of one weight in place."""
        update(self._masters[name])
        self._stale[self._chunk_of[name]] = True

    def forget(self, chunk: str) -> None:
        """The chunk's device bytes are those on disk again."""
        self._stale[chunk] = True

    def refresh(self, chunk: str, views: Mapping[str, Tensor]) -> None:
        """Make the chunk's device bytes hold the masters, inside its visit."""
        if not self._stale.get(chunk, False):
            return
        for name in self._names.get(chunk, ()):
            views[name].copy_(self._masters[name])
        self._stale[chunk] = False

    def close(self) -> None:
        """Give the memory back."""
        self._masters.clear()
        while self._slabs:
            self._engine.host.release(self._slabs.pop())
