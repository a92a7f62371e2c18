"""What a run has done to one parameter since its stored bytes, to be done again to fresh ones.

A *position* is a number of steps: bytes at position p hold everything that steps before p did.
Bytes of a chunk fall behind when they are read again from disk; ``History.bring_up`` makes them
current, whole or in rows (of a table that is only gathered from).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import final

import torch
import xxhash
from torch import Tensor

from .dense import DenseTrace
from .directions import Trace
from .estimate import Member
from .factored import merge
from .perturb import StepUpdate


@final
class History:
    """Updates (dense) or merges of closed windows (low rank) of one parameter, by position.

    Memory: about 100 bytes a step, or the factors of each window.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._updates: list[StepUpdate] = []
        self._merges: list[tuple[int, Tensor, Tensor]] = []

    def add_updates(self, updates: Sequence[StepUpdate], *, after: int) -> None:
        """Take dense updates, in order, but for those of steps before ``after``."""
        self._updates.extend(update for update in updates if update.step >= after)

    def add_merge(self, position: int, left: Tensor, right: Tensor) -> None:
        """Take the factors of the window that ended before step ``position``."""
        self._merges.append((position, left, right))

    def pending(self, position: int) -> bool:
        """Whether bytes at ``position`` are behind."""
        updates, merges = self._updates, self._merges
        return bool(updates and updates[-1].step >= position) or bool(
            merges and merges[-1][0] > position
        )

    def bring_up(self, weight: Tensor, position: int, rows: Tensor | None = None) -> None:
        """Make ``weight``, whose bytes are at ``position``, current, in place.

        ``rows``: the ascending numbers (int64 [n]) of the rows that ``weight`` [n, d] holds; None:
        it is the whole parameter.
        """
        updates = [update for update in self._updates if update.step >= position]
        if updates:
            assert isinstance(self._trace, DenseTrace)
            for part, start in row_runs(weight, rows):
                self._trace.apply_range(part, updates, start=start)
        for ends, left, right in self._merges:
            if ends > position:
                merge(weight, left if rows is None else left[rows], right)

    def forget(self, position: int) -> None:
        """Drop what stored bytes at ``position`` hold already."""
        self._updates = [update for update in self._updates if update.step >= position]
        self._merges = [entry for entry in self._merges if entry[0] > position]


def row_runs(weight: Tensor, rows: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """Contiguous parts of ``weight``, and the number of their first element in the parameter.

    >>> rows = torch.tensor([1, 2, 7])
    >>> [(part.shape[0], start) for part, start in row_runs(torch.zeros(3, 2), rows)]
    [(2, 2), (1, 14)]
    """
    if rows is None:
        yield weight, 0
        return
    width = weight.shape[1]
    breaks = (rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(rows)] if len(rows) else [0]
    for low, high in itertools.pairwise(edges):
        yield weight[low:high], int(rows[low]) * width


def perturb_rows(
    trace: DenseTrace, table: Tensor, rows: Tensor, member: Member, *, seed: int, eps: float
) -> Tensor:
    """A member's copy of the rows ``table`` [n, d] of a parameter, numbered by ``rows``."""
    out = torch.empty_like(table)
    parts = zip(row_runs(out, rows), row_runs(table, rows), strict=True)
    for (target, start), (source, _) in parts:
        trace.perturb(target, source, member, seed=seed, eps=eps, start=start)
    return out


@final
class UpdateDigest:
    """A checksum over the updates of a run, in order: what ties a store to its log."""

    def __init__(self) -> None:
        self._value = 0

    def add(self, update: StepUpdate) -> None:
        """Take the next update."""
        body = struct.pack("<QQd", update.step, update.seed, update.lr)
        body += struct.pack(f"<{len(update.grads)}f", *update.grads)
        self._value = xxhash.xxh3_64_intdigest(body, seed=self._value)

    @property
    def text(self) -> str:
        """The checksum of everything so far: 16 hex digits."""
        return f"{self._value:016x}"
