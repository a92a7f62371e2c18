"""Byte ledgers, one per tier, with named borrowers.  No torch.

A ``Budget`` guarantees that the sum of its outstanding loans never exceeds its limit, and
remembers the highest sum it ever had.  Memory is allocated *after* a loan is granted and freed
*before* it is repaid, so the ledger never understates real memory.  Thread-safe.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import final

from .errors import BudgetError


class Tier(Enum):
    """A place in the memory hierarchy: the GPU's memory, host RAM, or the disk."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class BudgetStatistics:
    """A snapshot of one budget, in bytes."""

    tier: Tier
    limit_bytes: int
    in_use_bytes: int
    peak_bytes: int
    by_borrower: dict[str, int]


@final
class Loan:
    """Bytes held by one borrower until ``repay``; repaying twice is refused."""

    __slots__ = ("_budget", "borrower", "nbytes")

    def __init__(self, budget: Budget, borrower: str, nbytes: int) -> None:
        self._budget: Budget | None = budget
        self.borrower = borrower
        self.nbytes = nbytes

    def repay(self) -> None:
        """Give the bytes back to the budget they came from."""
        if self._budget is None:
            raise ValueError(f"the loan of {self.nbytes:,} bytes to {self.borrower!r} was repaid")
        budget, self._budget = self._budget, None
        budget._take_back(self)

    def __repr__(self) -> str:
        state = "open" if self._budget is not None else "repaid"
        return f"Loan({self.borrower!r}, {self.nbytes:,} bytes, {state})"


@final
class Budget:
    """The bytes that may be used on one tier.

    >>> budget = Budget(Tier.HOST, limit_bytes=100)
    >>> loan = budget.borrow("layers.0", 60)
    >>> budget.free_bytes
    40
    >>> budget.try_borrow("layers.1", 60) is None
    True
    >>> loan.repay()
    >>> budget.statistics().peak_bytes
    60
    """

    def __init__(self, tier: Tier, *, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise BudgetError(f"the {tier.value} budget is {limit_bytes:,} bytes; give 0 or more")
        self.tier = tier
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._in_use_bytes = 0
        self._peak_bytes = 0
        self._by_borrower: Counter[str] = Counter()

    @property
    def free_bytes(self) -> int:
        """Bytes that no borrower holds."""
        return self.limit_bytes - self._in_use_bytes

    def try_borrow(self, borrower: str, nbytes: int) -> Loan | None:
        """Lend ``nbytes`` to ``borrower``, or return None if they are not free."""
        if nbytes < 0:
            raise ValueError(f"{borrower!r} asked for {nbytes} bytes; give 0 or more")
        with self._lock:
            if self._in_use_bytes + nbytes > self.limit_bytes:
                return None
            self._in_use_bytes += nbytes
            self._peak_bytes = max(self._peak_bytes, self._in_use_bytes)
            self._by_borrower[borrower] += nbytes
        return Loan(self, borrower, nbytes)

    def borrow(self, borrower: str, nbytes: int) -> Loan:
        """Lend ``nbytes`` to ``borrower``, or raise a ``BudgetError`` that says what would work."""
        loan = self.try_borrow(borrower, nbytes)
        if loan is not None:
            return loan
        held = sorted(self.statistics().by_borrower.items(), key=lambda kv: -kv[1])[:4]
        holders = ", ".join(f"{name!r} {size:,}" for name, size in held) or "nobody"
        least = self._in_use_bytes + nbytes
        raise BudgetError(
            f"{borrower!r} needs {nbytes:,} bytes on {self.tier.name}, but {self.free_bytes:,} of "
            f"the {self.limit_bytes:,}-byte budget are free (held by {holders}). "
            f"Raise {self.tier.value}_budget to at least {least:,} bytes."
        )

    def _take_back(self, loan: Loan) -> None:
        with self._lock:
            self._in_use_bytes -= loan.nbytes
            self._by_borrower[loan.borrower] -= loan.nbytes
            if not self._by_borrower[loan.borrower]:
                del self._by_borrower[loan.borrower]

    def statistics(self) -> BudgetStatistics:
        """Return an immutable snapshot of use, peak and borrowers."""
        with self._lock:
            return BudgetStatistics(
                tier=self.tier,
                limit_bytes=self.limit_bytes,
                in_use_bytes=self._in_use_bytes,
                peak_bytes=self._peak_bytes,
                by_borrower=dict(self._by_borrower),
            )

    def __repr__(self) -> str:
        return f"Budget({self.tier.name}, {self._in_use_bytes:,} of {self.limit_bytes:,} bytes)"
