"""``Ranks``: what the processes of one data-parallel run tell each other, through host memory.

Every rank streams the whole model over its own part of the batch.  Gradients of a chunk are
averaged when they are complete; each rank keeps and updates the optimizer states of its share
of the tiles (ZeRO, stage 1, arXiv 1910.02054) and sends the weights it has updated to the others.

Guarantees: after every step all ranks hold the same weights, bit for bit.  Assumes that all
ranks run the same calls in the same order; what differs between them is data alone.  The driving
thread and the update lane talk over process groups of their own, so that neither has to wait
for the other's turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from .chunk import SLOT_ALIGNMENT_BYTES, ChunkLayout, Slot, Tile
from .gradient import HostGradient


@dataclass(frozen=True, slots=True)
class Share:
    """A run of bytes of a chunk's weights, and the rank that updates them."""

    owner: int
    start: int
    stop: int


def divide_tiles(tiles: Mapping[str, Sequence[Tile]], count: int) -> dict[str, tuple[int, ...]]:
    """Give every tile an owner so that all ranks hold about the same bytes of states.

    A function of the tiles alone: every rank finds the same answer.
    """
    held = [0] * count
    owners: dict[str, tuple[int, ...]] = {}
    for name, of_chunk in tiles.items():
        chosen = []
        for tile in of_chunk:
            owner = min(range(count), key=lambda rank: (held[rank], rank))
            held[owner] += tile.nbytes
            chosen.append(owner)
        owners[name] = tuple(chosen)
    return owners


def shares_of(tiles: Sequence[Tile], owners: Sequence[int], layout: ChunkLayout) -> list[Share]:
    """The weights behind each tile as byte ranges of the chunk, neighbours of one owner joined."""
    slots = {slot.name: slot for slot in layout.slots}
    shares: list[Share] = []
    for tile, owner in zip(tiles, owners, strict=True):
        for piece in tile.pieces:
            slot = slots[piece.slot.name]
            start = slot.offset + piece.start * slot.dtype.itemsize
            stop = slot.offset + piece.stop * slot.dtype.itemsize
            if start == stop:
                continue
            last = shares[-1] if shares else None
            gap = start - last.stop if last is not None and last.owner == owner else -1
            # Across the padding between two slots: it is nobody's, and may be sent along.
            if last is not None and 0 <= gap < SLOT_ALIGNMENT_BYTES:
                shares[-1] = Share(owner, last.start, stop)
            else:
                shares.append(Share(owner, start, stop))
    return shares


@final
class Ranks:
    """The processes of a run, as one of them sees the others.

    Make it in every rank, after ``torch.distributed`` is initialised.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        # Host memory is where gradients are complete and weights are updated, so gloo.
        self._driving = dist.new_group(backend="gloo")
        self._updating = dist.new_group(backend="gloo")

    # The driving thread

    def average(self, gradient: HostGradient) -> None:
        """Make a complete gradient the mean over all ranks; untouched here counts as zero."""
        gradient.wait()
        slots = gradient.layout.slots
        touched = torch.tensor([s.name in gradient.touched for s in slots], dtype=torch.uint8)
        dist.all_reduce(touched, op=dist.ReduceOp.MAX, group=self._driving)
        gradient.touched = {s.name for s, t in zip(slots, touched.tolist(), strict=True) if t}
        for run in _runs_of_one_dtype([s for s in slots if s.name in gradient.touched]):
            values = _values(gradient.buffer, run)
            dist.all_reduce(values, group=self._driving)
            values.div_(self.count)
        gradient.norms = {}

    def average_resident(self, parameters: Sequence[Tensor]) -> None:
        """Make the ``.grad`` of small resident parameters the mean over all ranks."""
        missing = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(missing, op=dist.ReduceOp.MAX, group=self._driving)
        for parameter, wanted in zip(parameters, missing.tolist(), strict=True):
            if not wanted:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            values = parameter.grad.detach().cpu()
            dist.all_reduce(values, group=self._driving)
            parameter.grad.copy_(values.div_(self.count))

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the first one's values (of adapters, which each has initialised)."""
        for tensor in tensors:
            values = tensor.detach().cpu()
            dist.broadcast(values, group_src=0, group=self._driving)
            tensor.detach().copy_(values)

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        dist.barrier(group=self._driving)

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._driving)
        return int(tensor)

    # The update lane

    def spread(self, buffer: Tensor, shares: Iterable[Share]) -> None:
        """Send the shares of ``buffer`` (flat uint8) that are ours, and fill in the others'."""
        pending = [
            dist.broadcast(
                buffer[s.start : s.stop], group_src=s.owner, group=self._updating, async_op=True
            )
            for s in shares
        ]
        for work in pending:
            work.wait()


@final
class SharedStates:
    """The division of one model's optimizer states over the ranks, as ``Updates`` meets it."""

    def __init__(
        self,
        ranks: Ranks,
        tiles: Mapping[str, Sequence[Tile]],
        weights: Mapping[str, ChunkLayout],
    ) -> None:
        """``tiles``: of all ranks; ``weights``: how each chunk's bytes lie in host memory."""
        owners = divide_tiles(tiles, ranks.count)
        self._ranks = ranks
        self._shares = {n: shares_of(tiles[n], owners[n], weights[n]) for n in tiles}
        #: The tiles of this rank.
        self.tiles: dict[str, tuple[Tile, ...]] = {
            name: tuple(
                tile for tile, o in zip(of_chunk, owners[name], strict=True) if o == ranks.rank
            )
            for name, of_chunk in tiles.items()
        }

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        self._ranks.wait_for_all()

    def exchange(self, chunk: str, buffer: Tensor) -> None:
        """Fill in the weights that other ranks have updated."""
        self._ranks.spread(buffer, self._shares[chunk])


def _runs_of_one_dtype(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Neighbouring slots of one dtype, which one collective can carry (64-byte gaps included)."""
    runs: list[list[Slot]] = []
    for slot in slots:
        last = runs[-1][-1] if runs else None
        joined = (
            last is not None
            and last.dtype == slot.dtype
            and 0 <= slot.offset - (last.offset + last.nbytes) < SLOT_ALIGNMENT_BYTES
        )
        if joined:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return runs


def _values(buffer: Tensor, run: Sequence[Slot]) -> Tensor:
    first, last = run[0], run[-1]
    return buffer[first.offset : last.offset + last.nbytes].view(first.dtype)
