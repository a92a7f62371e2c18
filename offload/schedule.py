"""The visits of a step in order, and what that order says about what to keep.  No torch.

A ``Visit`` is one use of a chunk: forward, backward, or the update of its weights.  A
``Schedule`` is one training step (or one forward pass) as a cycle of visits.  Because the order
is known, the best victim is Belady's: the chunk whose next visit is farthest away.

Four readers share a schedule: the engine runs it, the simulator times it, the plan prints it,
the timeline draws it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import final

from .budget import Tier


class Phase(Enum):
    """Why a chunk is visited."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Visit:
    """One use of a chunk; ``tier`` is where its bytes must be during it."""

    chunk: str
    phase: Phase
    tier: Tier = Tier.DEVICE


@final
class Schedule:
    """A cycle of visits.

    >>> s = Schedule.training(["a", "b", "c"])
    >>> [v.chunk for v in s.visits]
    ['a', 'b', 'c', 'c', 'b', 'a']
    >>> s.distance("a", 1), s.distance("c", 1)
    (4, 1)
    >>> s.victim(["a", "b", "c"], position=3)   # next: c, b, a, then a, b, c of the next step
    'a'
    """

    def __init__(self, visits: Iterable[Visit]) -> None:
        self.visits: tuple[Visit, ...] = tuple(visits)
        if not self.visits:
            raise ValueError("a schedule needs at least one visit")
        positions: dict[str, list[int]] = {}
        for position, visit in enumerate(self.visits):
            positions.setdefault(visit.chunk, []).append(position)
        self._positions = positions

    @classmethod
    def forward(cls, chunks: Sequence[str], *, host: Iterable[str] = ()) -> Schedule:
        """One forward pass over ``chunks``; those in ``host`` are only needed in host memory."""
        gathered = frozenset(host)
        return cls(
            Visit(c, Phase.FORWARD, Tier.HOST if c in gathered else Tier.DEVICE) for c in chunks
        )

    @classmethod
    def training(
        cls,
        chunks: Sequence[str],
        *,
        updated: Iterable[str] = (),
        update: str = "backward",
        host: Iterable[str] = (),
    ) -> Schedule:
        """One first-order step: forward 0..L-1, backward L-1..0.

        ``updated`` chunks are updated right after their last backward visit
        (``update="backward"``) or right before their first forward visit (``"forward"``).
        ``host`` chunks are gathered in host memory in forward and not needed in backward.
        """
        if update not in ("backward", "forward"):
            raise ValueError(f"update is {update!r}; give 'backward' or 'forward'")
        changing, gathered = frozenset(updated), frozenset(host)
        visits: list[Visit] = []
        for chunk in dict.fromkeys(chunks):
            if update == "forward" and chunk in changing:
                visits.append(Visit(chunk, Phase.UPDATE, Tier.HOST))
            tier = Tier.HOST if chunk in gathered else Tier.DEVICE
            visits.append(Visit(chunk, Phase.FORWARD, tier))
        for chunk in reversed(dict.fromkeys(chunks)):
            if chunk not in gathered:
                visits.append(Visit(chunk, Phase.BACKWARD))
            if update == "backward" and chunk in changing:
                visits.append(Visit(chunk, Phase.UPDATE, Tier.HOST))
        return cls(visits)

    def __len__(self) -> int:
        return len(self.visits)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._positions

    def distance(self, chunk: str, position: int, *, tier: Tier | None = None) -> int | None:
        """Visits from ``position`` until the next use of ``chunk`` (0 = the visit there).

        The schedule is a cycle: after the last visit comes the first of the next step.  With
        ``tier``, only visits that need the bytes there count.  None: never used.
        """
        positions = self._positions.get(chunk)
        if positions is None:
            return None
        position %= len(self.visits)
        start = bisect_left(positions, position)
        for p in positions[start:]:
            if tier is None or self.visits[p].tier is tier:
                return p - position
        for p in positions[:start]:
            if tier is None or self.visits[p].tier is tier:
                return p - position + len(self.visits)
        return None

    def upcoming(self, position: int, count: int | None = None) -> Iterator[tuple[int, Visit]]:
        """(distance, visit) pairs from ``position`` on, around the cycle once at most."""
        total = len(self.visits)
        for ahead in range(min(total, total if count is None else count)):
            yield ahead, self.visits[(position + ahead) % total]

    def victim(
        self,
        candidates: Iterable[str],
        *,
        position: int,
        farther_than: int = -1,
        tier: Tier | None = None,
    ) -> str | None:
        """The candidate whose next visit is farthest from ``position`` (Belady's choice).

        Only candidates whose next visit is more than ``farther_than`` visits away are taken;
        one that is never visited again is farthest of all.  None: no candidate qualifies.
        """
        best: tuple[float, str] | None = None
        for chunk in candidates:
            distance = self.distance(chunk, position, tier=tier)
            far = float("inf") if distance is None else float(distance)
            if far > farther_than and (best is None or far > best[0]):
                best = (far, chunk)
        return None if best is None else best[1]

    def misses(self, capacity_bytes: int, size_of: Callable[[str], int]) -> int:
        """Bytes fetched per steady-state cycle by Belady's policy with this much memory.

        Runs the cycle three times and counts the last; chunks larger than the capacity are
        fetched at every visit.
        """
        held: dict[str, int] = {}
        fetched = 0
        for lap in range(3):
            fetched = 0
            for position, visit in enumerate(self.visits):
                size = size_of(visit.chunk)
                if visit.chunk in held:
                    continue
                fetched += size
                while held and sum(held.values()) + size > capacity_bytes:
                    victim = self.victim(held, position=position + 1)
                    assert victim is not None
                    del held[victim]
                if size <= capacity_bytes:
                    held[visit.chunk] = size
            if not held and lap:
                break
        return fetched


@final
class Cursor:
    """Follows a schedule through the visits that really happen, and learns a new one.

    A visit that is not the expected one is looked up further on in the cycle (visits may be
    skipped); an unknown visit leaves the position where it is.  ``finish`` returns the schedule
    of what was seen if it differs from what was expected.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.position = 0
        self._seen: list[Visit] = []

    def advance(self, visit: Visit) -> None:
        """Note that ``visit`` begins now; ``position`` then names the visit after it."""
        self._seen.append(visit)
        for ahead, expected in self.schedule.upcoming(self.position):
            if expected == visit:
                self.position = (self.position + ahead + 1) % len(self.schedule)
                return

    def finish(self) -> Schedule:
        """End the lap: return the schedule to use for the next one."""
        seen, self._seen = tuple(self._seen), []
        self.position = 0
        if seen and seen != self.schedule.visits:
            return Schedule(seen)
        return self.schedule
