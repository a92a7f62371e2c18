"""Frozen tensors, read in place from the safetensors shards that the user already has.

``SafetensorsIndex`` says which tensor lies where; ``ReadPlan`` reads a list of tensors with
direct I/O: the enclosing 4096-aligned ranges go into one slab, and every tensor has an offset
in it.  No second copy of the checkpoint is made, on disk or in memory.  Headers are checked
before use (``safetensors_header``).  No torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, final

from .errors import SourceError
from .faults import Operation
from .files import DirectFile
from .io import DiskLanes, Part
from .pool import PAGE_BYTES, round_up
from .safetensors_header import (
    DTYPE_BITS,
    ShardHeader,
    TensorEntry,
    read_header,
    read_shard_map,
)
from .transfer import FinishedTransfer, Transfer

__all__ = ["ReadPlan", "SafetensorsIndex", "TensorEntry"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Reading this much too much is cheaper than a request of its own.
_MAX_GAP_BYTES = 64 << 10


@final
class SafetensorsIndex(Mapping[str, TensorEntry]):
    """Every tensor of a checkpoint: name -> file, dtype, shape and byte range.

    Open one with ``SafetensorsIndex.open``; shards are opened when first read and closed by
    ``close``.
    """

    def __init__(self, path: Path, shards: Sequence[ShardHeader], names: Mapping[str, str]) -> None:
        self.path = path
        by_name = {shard.path.name: shard for shard in shards}
        self._shards = {shard.path: shard for shard in shards}
        self._entries = {name: by_name[file].entries[name] for name, file in names.items()}
        self._files: dict[Path, DirectFile] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the headers of a folder, of one ``.safetensors`` file, or of an index file."""
        path = Path(path)
        if path.is_dir():
            path = _checkpoint_of(path)
        if path.name.endswith(".json"):
            names = read_shard_map(path)
            shards = [read_header(path.parent / file) for file in sorted(set(names.values()))]
        else:
            shards = [read_header(path)]
            names = dict.fromkeys(shards[0].entries, path.name)
        held = {shard.path.name: shard.entries for shard in shards}
        for name, file in names.items():
            if name not in held[file]:
                raise SourceError(
                    f"{path}: it says that {name!r} is in {file}, which does not hold it. "
                    f"Download the checkpoint again."
                )
        return cls(path, shards, names)

    def __getitem__(self, name: str) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise KeyError(f"{self.path} holds no tensor {name!r}")
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

    def metadata(self) -> dict[str, dict[str, str]]:
        """The ``__metadata__`` of each shard, by file name."""
        return {path.name: dict(shard.metadata) for path, shard in self._shards.items()}

    def file(self, path: Path) -> DirectFile:
        """The open shard at ``path``, opened on first use; its size must not have changed."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                try:
                    file = DirectFile.open(path)
                except OSError as error:
                    raise SourceError(f"{path}: it cannot be opened ({error.strerror})") from error
                if file.nbytes != self._shards[path].file_bytes:
                    file.close()
                    raise SourceError(
                        f"{path}: it had {self._shards[path].file_bytes:,} bytes when its header "
                        f"was read and has {file.nbytes:,} now; load the model again."
                    )
                self._files[path] = file
            return file

    def close(self) -> None:
        """Close the shards; reading again opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _checkpoint_of(folder: Path) -> Path:
    for name in (SINGLE_NAME, INDEX_NAME):
        if (folder / name).exists():
            return folder / name
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    hint = (
        f"{pickled[0]} is a pickle, which can run code and is never read: convert it to "
        f"safetensors (save_pretrained does)."
        if pickled
        else "Give the folder of a downloaded model, or one .safetensors file."
    )
    raise SourceError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there. {hint}")


@dataclass(frozen=True, slots=True)
class _Range:
    """An aligned range of a shard and where it goes in the slab; the file may end inside it."""

    path: Path
    start: int
    stop: int
    slab_offset: int


@dataclass(frozen=True, slots=True)
class _Move:
    """A tensor that begins inside an element of its type, moved behind the rest after the read."""

    source: int
    target: int
    nbytes: int


@final
class ReadPlan:
    """How a list of tensors is read into one slab of ``nbytes`` bytes.

    ``offsets[name]`` is the tensor's first byte in the slab, a multiple of its element's size, as
    views need it.  Tensors that lie next to each other are read together; a slab holds their pages
    and at most 64 KiB of neighbours between two of them.  Only a tensor whose file breaks that
    rule (safetensors' own writers keep it) is held twice.
    """

    def __init__(self, index: SafetensorsIndex, names: Sequence[str], *, lanes: DiskLanes) -> None:
        self._index = index
        self._lanes = lanes
        entries = [index[name] for name in dict.fromkeys(names)]
        self._ranges = tuple(_coalesced(entries))
        end = 0
        if self._ranges:
            last = self._ranges[-1]
            end = last.slab_offset + last.stop - last.start
        offsets, moves = {}, []
        for entry in entries:
            offset = self._offset_of(entry) if entry.nbytes else 0
            # A 4-bit folder's codes often lie behind an odd number of fp32 numbers: a wider grid
            # than their own would move, and so hold twice, nearly all bytes of a chunk.
            if offset % _element_bytes(entry):
                end = round_up(end, _element_bytes(entry))
                moves.append(_Move(offset, end, entry.nbytes))
                offset, end = end, end + entry.nbytes
            offsets[entry.name] = offset
        self.offsets: Mapping[str, int] = MappingProxyType(offsets)
        self.nbytes = round_up(end)
        self.read_bytes = sum(r.stop - r.start for r in self._ranges)
        self._moves = tuple(moves)

    def _offset_of(self, entry: TensorEntry) -> int:
        for piece in self._ranges:
            if piece.path == entry.path and piece.start <= entry.offset < piece.stop:
                return piece.slab_offset + entry.offset - piece.start
        raise AssertionError(f"no range of the plan covers {entry}")

    def read(
        self, view: memoryview, *, label: str, then: Callable[[], None] | None = None
    ) -> Transfer:
        """Read every tensor of the plan into a slab's view of ``nbytes`` bytes or more.

        ``then`` runs on a lane's thread when all bytes are there, before the transfer ends.
        """
        if len(view) < self.nbytes:
            raise ValueError(f"{label} needs {self.nbytes:,} bytes, the view has {len(view):,}")
        parts = []
        for piece in self._ranges:
            file = self._index.file(piece.path)
            nbytes = piece.stop - piece.start
            target = view[piece.slab_offset : piece.slab_offset + nbytes]
            # The last page of a shard is short; asking direct I/O for all of it is allowed.
            wanted = min(nbytes, file.nbytes - piece.start)
            parts.append(Part(file, piece.start, target, wanted))
        if not parts:
            if then is not None:
                then()
            return FinishedTransfer(label)
        hook = then
        if self._moves:
            hook = partial(_move_all, view, self._moves, then)
        return self._lanes.transfer_parts(Operation.READ, parts, label=label, hook=hook)


def _element_bytes(entry: TensorEntry) -> int:
    return max(DTYPE_BITS[entry.dtype] // 8, 1)


def _coalesced(entries: Sequence[TensorEntry]) -> Iterator[_Range]:
    """Yield the aligned ranges that cover all entries, in file order, packed into a slab."""
    slab_offset = 0
    path: Path | None = None
    start = stop = 0
    for entry in sorted(entries, key=lambda e: (e.path, e.offset)):
        if not entry.nbytes:
            continue
        first = entry.offset // PAGE_BYTES * PAGE_BYTES
        behind = round_up(entry.offset + entry.nbytes)
        if path == entry.path and first <= stop + _MAX_GAP_BYTES:
            stop = max(stop, behind)
            continue
        if path is not None:
            yield _Range(path, start, stop, slab_offset)
            slab_offset += stop - start
        path, start, stop = entry.path, first, behind
    if path is not None:
        yield _Range(path, start, stop, slab_offset)


def _move_all(view: memoryview, moves: Sequence[_Move], then: Callable[[], None] | None) -> None:
    for move in moves:
        view[move.target : move.target + move.nbytes] = view[
            move.source : move.source + move.nbytes
        ]
    if then is not None:
        then()
