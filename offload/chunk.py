"""``Chunk`` layouts: where each tensor of a module lies in one contiguous flat buffer.

A layout is fixed before any byte moves: slots start at multiples of 64 bytes (so that the
kernels that read them see the alignment that torch's own allocator gives, and choose the same
code path), the whole is a multiple of 4096 bytes (so that it moves by direct I/O).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .protocols import TensorSpec, UpdateRule

SLOT_ALIGNMENT_BYTES = 64
PAGE_BYTES = 4096


def round_up(nbytes: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``nbytes``.

    >>> round_up(4097, 4096)
    8192
    """
    return -(-nbytes // multiple) * multiple


@final
@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor's place inside a chunk: byte offset, shape and dtype."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return self.numel * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor as a view of a flat uint8 buffer that holds the chunk."""
        flat = buffer[self.offset : self.offset + self.nbytes]
        return flat.view(self.dtype).view(self.shape)


@final
@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """The slots of one chunk and its padded size in bytes."""

    name: str
    slots: tuple[Slot, ...]
    nbytes: int

    @classmethod
    def pack(cls, name: str, tensors: Iterable[tuple[str, torch.Size, torch.dtype]]) -> ChunkLayout:
        """Place tensors one after the other, each aligned, the whole padded to a page.

        >>> layout = ChunkLayout.pack("m", [("w", torch.Size([3]), torch.float32),
        ...                                 ("b", torch.Size([2]), torch.bfloat16)])
        >>> [(s.name, s.offset) for s in layout.slots], layout.nbytes
        ([('w', 0), ('b', 64)], 4096)
        """
        slots: list[Slot] = []
        end = 0
        for tensor_name, shape, dtype in tensors:
            offset = round_up(end, SLOT_ALIGNMENT_BYTES)
            slot = Slot(tensor_name, shape, dtype, offset)
            slots.append(slot)
            end = offset + slot.nbytes
        return cls(name, tuple(slots), max(round_up(end, PAGE_BYTES), PAGE_BYTES))

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Every slot as a view of ``buffer`` (flat uint8, at least ``nbytes`` long)."""
        return {slot.name: slot.view(buffer) for slot in self.slots}

    def restricted_to(self, names: frozenset[str]) -> ChunkLayout:
        """A packed layout of only these slots (the gradient of a partly frozen chunk)."""
        return ChunkLayout.pack(
            self.name, [(s.name, s.shape, s.dtype) for s in self.slots if s.name in names]
        )

    @property
    def numel(self) -> int:
        """Elements of all slots."""
        return sum(slot.numel for slot in self.slots)


@final
@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes that moves unchanged from one layout to another."""

    source: int
    target: int
    nbytes: int


def segments_between(
    source_offsets: Iterable[tuple[str, int]], target: ChunkLayout
) -> tuple[Segment, ...]:
    """The fewest copies that bring slots from ``source_offsets`` to their place in ``target``.

    Runs that are contiguous in both are joined; padding between slots is carried along when
    both sides have the same gap.
    """
    offsets = dict(source_offsets)
    pairs = sorted((slot.offset, offsets[slot.name], slot.nbytes) for slot in target.slots)
    joined: list[Segment] = []
    for target_offset, source_offset, nbytes in pairs:
        if joined:
            last = joined[-1]
            gap = target_offset - (last.target + last.nbytes)
            if source_offset - (last.source + last.nbytes) == gap and 0 <= gap < PAGE_BYTES:
                joined[-1] = Segment(last.source, last.target, last.nbytes + gap + nbytes)
                continue
        joined.append(Segment(source_offset, target_offset, nbytes))
    return tuple(joined)


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """A range of one slot's elements, and where its states lie inside a tile."""

    slot: Slot
    start: int
    stop: int
    states: tuple[tuple[str, torch.Size, torch.dtype, int], ...]

    def state_views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The states of the piece as views of the tile's flat uint8 buffer."""
        return {
            name: Slot(name, shape, dtype, offset).view(buffer)
            for name, shape, dtype, offset in self.states
        }

    def part(self, whole: Tensor, rule: UpdateRule) -> Tensor:
        """What ``rule`` gets of a tensor of the slot's shape: its range, flat, or all of it."""
        return whole.view(-1)[self.start : self.stop] if rule.elementwise else whole


@final
@dataclass(frozen=True, slots=True)
class Tile:
    """The unit in which optimizer states move: the states of a few pieces, back to back."""

    region: str
    pieces: tuple[Piece, ...]
    nbytes: int


def state_pieces(
    slot: Slot, rule: UpdateRule, tile_bytes: int
) -> Iterator[tuple[int, int, dict[str, TensorSpec]]]:
    """Cut one parameter into ranges whose states fit ``tile_bytes`` (elementwise rules only)."""
    whole = dict(rule.state_spec(tuple(slot.shape), slot.dtype))
    total = sum(spec.nbytes for spec in whole.values())
    if not rule.elementwise or total <= tile_bytes or slot.numel <= rule.granule:
        shape = (slot.numel,) if rule.elementwise else tuple(slot.shape)
        yield 0, slot.numel, dict(rule.state_spec(shape, slot.dtype))
        return
    per_element = total / slot.numel
    count = max(int(tile_bytes / per_element) // rule.granule, 1) * rule.granule
    for start in range(0, slot.numel, count):
        stop = min(start + count, slot.numel)
        yield start, stop, dict(rule.state_spec((stop - start,), slot.dtype))


def plan_tiles(
    layout: ChunkLayout, rules: Mapping[str, UpdateRule], *, tile_bytes: int
) -> tuple[Tile, ...]:
    """Lay the optimizer states of a chunk out as tiles of at most about ``tile_bytes``.

    Small parameters share a tile; a large one is cut where its rule allows.  The layout is a
    function of shapes, rules and ``tile_bytes`` alone, so a resumed run finds its states.
    """
    tiles: list[Tile] = []
    pieces: list[Piece] = []
    end = 0

    def close() -> None:
        nonlocal pieces, end
        if pieces:
            region = f"states/{layout.name}/{len(tiles):04d}"
            tiles.append(Tile(region, tuple(pieces), round_up(end, PAGE_BYTES)))
        pieces, end = [], 0

    for slot in layout.slots:
        for start, stop, specs in state_pieces(slot, rules[slot.name], tile_bytes):
            need = sum(round_up(s.nbytes, SLOT_ALIGNMENT_BYTES) for s in specs.values())
            if pieces and end + need > tile_bytes:
                close()
            states = []
            for name, spec in specs.items():
                offset = round_up(end, SLOT_ALIGNMENT_BYTES)
                states.append((name, torch.Size(spec.shape), spec.dtype, offset))
                end = offset + spec.nbytes
            pieces.append(Piece(slot, start, stop, tuple(states)))
    close()
    return tuple(tiles)
