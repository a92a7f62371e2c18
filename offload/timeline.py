"""What each lane did and when: spans, busy seconds, bytes, stalls.  No torch.

Every lane reports each piece of work as one ``Span`` in seconds of ``time.perf_counter``.  The
recorder is thread-safe and bounded: it keeps the spans of the latest steps and running totals
of everything.  ``busy_seconds`` of a lane is the *union* of its spans, so that two threads of
one lane working at once are not counted twice.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import final


class LaneName(Enum):
    """The ordered queues on which work runs."""

    DISK_READ = "disk_read"
    DISK_WRITE = "disk_write"
    H2D = "h2d"
    D2H = "d2h"
    COMPUTE = "compute"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on a lane; times in seconds, ``nbytes`` moved (0 for compute)."""

    lane: LaneName
    label: str
    start: float
    end: float
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """Busy seconds (union of spans), bytes and count of one lane over a window."""

    lane: LaneName
    busy_seconds: float
    nbytes: int
    count: int


def union_seconds(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals.

    >>> union_seconds([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    4.0
    """
    total, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reach:
            total += end - max(start, reach)
            reach = end
    return total


@final
class Timeline:
    """Records spans of all lanes; keeps the latest ``max_spans`` and totals of all."""

    def __init__(self, *, max_spans: int = 200_000) -> None:
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._total_bytes = dict.fromkeys(LaneName, 0)
        self._stall_seconds: dict[str, float] = {}

    def record(self, lane: LaneName, label: str, start: float, end: float, nbytes: int = 0) -> None:
        """Add one finished piece of work."""
        with self._lock:
            self._spans.append(Span(lane, label, start, end, nbytes))
            self._total_bytes[lane] += nbytes

    @contextmanager
    def span(self, lane: LaneName, label: str, nbytes: int = 0) -> Iterator[None]:
        """Record the body of a ``with`` block as one span."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.record(lane, label, start, time.perf_counter(), nbytes)

    def record_stall(self, reason: str, seconds: float) -> None:
        """Add seconds during which the computation waited for ``reason``."""
        with self._lock:
            self._stall_seconds[reason] = self._stall_seconds.get(reason, 0.0) + seconds

    def total_bytes(self, lane: LaneName) -> int:
        """Bytes moved by a lane since the start."""
        with self._lock:
            return self._total_bytes[lane]

    def stalls(self) -> dict[str, float]:
        """Seconds the computation waited, by reason."""
        with self._lock:
            return dict(self._stall_seconds)

    def spans(self, since: float = float("-inf"), until: float = float("inf")) -> list[Span]:
        """Spans that overlap the window, clipped to it."""
        with self._lock:
            kept = list(self._spans)
        return [
            Span(s.lane, s.label, max(s.start, since), min(s.end, until), s.nbytes)
            for s in kept
            if s.end > since and s.start < until
        ]

    def statistics(
        self, since: float = float("-inf"), until: float = float("inf")
    ) -> dict[LaneName, LaneStatistics]:
        """Busy seconds, bytes and counts per lane over a window."""
        by_lane: dict[LaneName, list[Span]] = {lane: [] for lane in LaneName}
        for span in self.spans(since, until):
            by_lane[span.lane].append(span)
        return {
            lane: LaneStatistics(
                lane=lane,
                busy_seconds=union_seconds([(s.start, s.end) for s in spans]),
                nbytes=sum(s.nbytes for s in spans),
                count=len(spans),
            )
            for lane, spans in by_lane.items()
        }
