"""Where regions lie on disk: extents, striped over the members of a store by weight.  No torch.

Every extent starts on a 4096-byte boundary, as direct I/O wants.  A large region is cut over
all members in proportion to their weights, so that one transfer uses every drive; a small one
goes whole to the member that is furthest behind its share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import StoreSpaceError
from .pool import PAGE_BYTES, round_up
from .record import EXTENTS_START_BYTES, RegionLayout, Segment

# Below this a piece costs more in request overhead than a second drive gains.
MIN_STRIPE_BYTES = 2 << 20
# Room for the records, the stamps and small blobs beside the extents.
RESERVE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Region:
    """A named run of mutable bytes, read and written as a whole."""

    name: str
    nbytes: int


def weights_of(paths: Sequence[Path] | Mapping[Path, float]) -> dict[Path, float]:
    """Return folder -> weight; a sequence gives every folder the same weight."""
    if isinstance(paths, Mapping):
        weights = {Path(path): float(weight) for path, weight in paths.items()}
    else:
        weights = {Path(path): 1.0 for path in paths}
        if len(weights) != len(paths):
            raise ValueError(f"a store folder is given twice: {[str(p) for p in paths]}")
    if not weights:
        raise ValueError("a store needs at least one folder")
    for path, weight in weights.items():
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"store folder {path} has weight {weight}; give a positive number")
    return weights


def place(
    regions: Sequence[Region], weights: Sequence[float], *, extent_count: int
) -> tuple[tuple[RegionLayout, ...], tuple[int, ...]]:
    """Return the layout of every region and the size of every member's file, in bytes."""
    ends = [EXTENTS_START_BYTES] * len(weights)
    placed, names = [], set()
    for region in regions:
        if region.nbytes < 1 or not region.name or region.name in names:
            raise ValueError(
                f"region {region.name!r} ({region.nbytes:,} bytes) is empty, unnamed or given twice"
            )
        names.add(region.name)
        extents = []
        for _ in range(extent_count):
            segments = []
            for member, nbytes in _shares(round_up(region.nbytes), weights, ends):
                segments.append(Segment(member, ends[member], nbytes))
                ends[member] += nbytes
            extents.append(tuple(segments))
        placed.append(RegionLayout(region.name, region.nbytes, tuple(extents)))
    return tuple(placed), tuple(ends)


def _shares(nbytes: int, weights: Sequence[float], ends: Sequence[int]) -> list[tuple[int, int]]:
    """Cut ``nbytes`` over the members; the cut steers each member's total to its share."""
    total = sum(weights)
    if nbytes * min(weights) / total < MIN_STRIPE_BYTES:
        after = sum(ends) + nbytes
        behind = [after * weight / total - end for weight, end in zip(weights, ends, strict=True)]
        return [(max(range(len(weights)), key=behind.__getitem__), nbytes)]
    blocks = nbytes // PAGE_BYTES
    shares, given, reached = [], 0, 0.0
    for member, weight in enumerate(weights):
        reached += weight
        upto = round(blocks * reached / total)
        shares.append((member, (upto - given) * PAGE_BYTES))
        given = upto
    return shares


def check_space(folders: Sequence[Path], member_bytes: Sequence[int]) -> None:
    """Raise ``StoreSpaceError`` with the missing bytes if the disks cannot hold the members."""
    wanted: dict[int, int] = {}
    homes: dict[int, list[Path]] = {}
    for folder, nbytes in zip(folders, member_bytes, strict=True):
        device = os.stat(folder).st_dev
        wanted[device] = wanted.get(device, RESERVE_BYTES) + nbytes
        homes.setdefault(device, []).append(folder)
    for device, need in wanted.items():
        disk = os.statvfs(homes[device][0])
        free = disk.f_bavail * disk.f_frsize
        if need > free:
            where = ", ".join(str(folder) for folder in homes[device])
            raise StoreSpaceError(
                f"the store needs {need:,} bytes on the disk of {where}, which has {free:,} free: "
                f"{need - free:,} bytes are missing. Free them, add a folder on another disk, or "
                f"choose smaller optimizer states."
            )
