"""Scratch room on disk for what need not outlive a run: parked activations, waiting gradients.

Each extent is a file of its own, reserved when first needed, overwritten in place and reused
for later requests of the same size.  Nothing here is part of a checkpoint; the folder is
emptied when the run starts and removed when it ends.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import final

from .chunk import PAGE_BYTES, round_up
from .io import DirectFile, DiskLanes
from .transfer import Transfer


@final
class Scratch:
    """Lends disk extents and moves bytes to and from them.  Not thread-safe."""

    def __init__(self, folder: Path, lanes: DiskLanes) -> None:
        self._folder = folder
        self._lanes = lanes
        self._idle: dict[int, list[DirectFile]] = {}
        self._files: list[DirectFile] = []

    def take(self, nbytes: int) -> DirectFile:
        """An extent of at least ``nbytes``."""
        size = round_up(nbytes, PAGE_BYTES)
        idle = self._idle.setdefault(size, [])
        if idle:
            return idle.pop()
        if not self._files:
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._folder.mkdir(parents=True)
        path = self._folder / f"extent-{len(self._files):05d}"
        file = DirectFile.create(path, nbytes=size)
        self._files.append(file)
        return file

    def give_back(self, extent: DirectFile, nbytes: int) -> None:
        """Return an extent for reuse; nothing may be in flight on it."""
        self._idle[round_up(nbytes, PAGE_BYTES)].append(extent)

    def write(self, extent: DirectFile, view: memoryview, *, label: str) -> Transfer:
        """Write a view (a multiple of 4096 bytes) to an extent."""
        return self._lanes.write(extent, 0, view, label=label)

    def read(self, extent: DirectFile, view: memoryview, *, label: str) -> Transfer:
        """Read an extent back."""
        return self._lanes.read(extent, 0, view, label=label)

    def close(self) -> None:
        """Close and remove every extent."""
        for file in self._files:
            file.close()
        if self._files:
            shutil.rmtree(self._folder)
        self._files.clear()
        self._idle.clear()
