"""``Transfer``: one copy in flight between two tiers, with what ends it.  No torch.

``wait`` returns when the bytes have arrived and raises ``LaneError`` with the cause when they
have not.  A transfer ends exactly once; waiting again returns (or raises) the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import final

from .errors import LaneError, StuckLaneError


class Transfer(ABC):
    """One copy in flight."""

    label: str
    nbytes: int

    @abstractmethod
    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait until the copy has ended; raise ``LaneError`` if it failed."""

    @abstractmethod
    def done(self) -> bool:
        """Whether the copy has ended, well or badly; never waits."""


@final
class FutureTransfer(Transfer):
    """A transfer made of futures (one per request); it ends when the last of them ends."""

    def __init__(self, label: str, nbytes: int, futures: Sequence[Future[None]]) -> None:
        self.label = label
        self.nbytes = nbytes
        self._futures = tuple(futures)

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait for every request; the first failure is raised with its cause attached."""
        failure: BaseException | None = None
        for future in self._futures:
            try:
                error = future.exception(timeout=timeout_seconds)
            except TimeoutError:
                raise StuckLaneError(
                    f"{self.label} ({self.nbytes:,} bytes) did not end within "
                    f"{timeout_seconds:g} seconds. The disk or device under it hangs; "
                    f"look at the system log, or raise the time limit."
                ) from None
            failure = failure or error
        if failure is not None:
            raise LaneError(f"{self.label} ({self.nbytes:,} bytes) failed: {failure}") from failure

    def done(self) -> bool:
        """Whether every request has ended."""
        return all(future.done() for future in self._futures)


@final
class FinishedTransfer(Transfer):
    """A transfer with nothing left to move."""

    def __init__(self, label: str = "nothing", nbytes: int = 0) -> None:
        self.label = label
        self.nbytes = nbytes

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return at once."""

    def done(self) -> bool:
        """Always true."""
        return True
