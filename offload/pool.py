"""Host memory for transfers: exact-size slabs that are mapped once and reused.  No torch.

Guarantees: every mapped byte is on the budget's ledger from before it is mapped until after it
is unmapped, idle slabs included, and a slab never makes more memory resident than the ledger
says.  A slab starts on a page boundary (on a 2 MiB boundary from 2 MiB up), its whole 2 MiB
pieces are advised to be huge pages (1.4-3x the disk bandwidth of 4 KiB pages, a fifth of the
CPU time), and all of it has been touched, so no transfer pays page faults.

Hazard: a tensor made by ``torch.frombuffer(slab.view)`` keeps the *view object* alive, nothing
else.  Drop every tensor and view before ``release``: a released slab is handed to the next
borrower.  Unmapping is refused (``SlabInUseError``) while any view of it is alive, so a
forgotten tensor is an error at ``close``, never a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from .budget import Budget, Loan
from .errors import BudgetError

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
# A reused slab may be this much larger than asked for; more would waste the budget.
_REUSE_NUMERATOR, _REUSE_DENOMINATOR = 5, 4
# Linux: a forked child finds zeroes instead of copy-on-write pages.  Without it every data
# loader worker would keep a second copy of each page that the parent overwrites after the fork.
_MADV_WIPEONFORK = 18

PinCallback = Callable[[int, int], None]


class SlabInUseError(RuntimeError):
    """A slab was to be unmapped while a view of it is alive: a bug of ours, never the user's."""


def round_up(nbytes: int, multiple: int = PAGE_BYTES) -> int:
    """Return the least multiple of ``multiple`` that is not below ``nbytes``.

    >>> round_up(1), round_up(4096), round_up(4097)
    (4096, 4096, 8192)
    """
    return -(-nbytes // multiple) * multiple


_VIEW_GRACE_SECONDS = 1.0


@final
class _Mapping:
    """One private anonymous mapping, aligned and touched."""

    def __init__(self, nbytes: int, loan: Loan, pin: PinCallback | None) -> None:
        self.nbytes = nbytes
        self.loan = loan
        slack = HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, nbytes + slack, flags=flags)
        probe = ctypes.c_char.from_buffer(self._map)
        base = ctypes.addressof(probe)
        del probe  # it holds an export of the mapping
        self.start = -base % HUGE_PAGE_BYTES if slack else 0
        self.address = base + self.start
        # Pages outside whole 2 MiB pieces must stay small: one huge page under the tail (or
        # under the slack) would make up to 2 MiB resident that no ledger knows of.
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        huge = nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if huge:
            self._map.madvise(mmap.MADV_HUGEPAGE, self.start, huge)
        self._map.madvise(_MADV_WIPEONFORK)
        ctypes.memset(self.address, 0, nbytes)  # the touch; releases the GIL
        if pin is not None:
            try:
                pin(self.address, nbytes)
            except BaseException:
                self._map.close()
                raise

    def view(self, nbytes: int) -> memoryview:
        return memoryview(self._map)[self.start : self.start + nbytes]

    def unmap(self, unpin: PinCallback | None) -> None:
        # Closing first would leave the device driver with a registered hole; but a mapping in
        # use must not be unpinned either.  resize() to the same size asks for exports only.
        # A lane's thread says that a copy has ended before it leaves the call that held the
        # views, so an export may outlive its transfer by a moment.
        deadline = time.monotonic() + _VIEW_GRACE_SECONDS
        while True:
            try:
                self._map.resize(len(self._map))
                break
            except BufferError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.0005)
                    continue
                raise SlabInUseError(
                    f"a slab of {self.nbytes:,} bytes at {self.address:#x} was to be unmapped, "
                    f"but a view of it (perhaps inside a tensor) is alive. Drop views before "
                    f"releasing it."
                ) from error
        if unpin is not None:
            unpin(self.address, self.nbytes)
        self._map.close()


@final
class Slab:
    """Page-aligned host memory on loan from a ``SlabPool``; ``nbytes`` is a multiple of 4096."""

    __slots__ = ("_mapping", "borrower", "nbytes")

    def __init__(self, borrower: str, nbytes: int, mapping: _Mapping) -> None:
        self.borrower = borrower
        self.nbytes = nbytes
        self._mapping: _Mapping | None = mapping

    def _held(self) -> _Mapping:
        if self._mapping is None:
            raise ValueError(f"the slab of {self.nbytes:,} bytes of {self.borrower!r} was released")
        return self._mapping

    @property
    def view(self) -> memoryview:
        """The slab's bytes, writable; drop it (and tensors made of it) before the release."""
        return self._held().view(self.nbytes)

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return self._held().address

    def __repr__(self) -> str:
        state = "held" if self._mapping is not None else "released"
        return f"Slab({self.borrower!r}, {self.nbytes:,} bytes, {state})"


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A snapshot of one pool: bytes held by borrowers, bytes idle, and how often each happened."""

    held_bytes: int
    idle_bytes: int
    peak_mapped_bytes: int
    mapped_count: int
    reused_count: int
    unmapped_count: int
    by_borrower: dict[str, int]


@final
class SlabPool:
    """Exact-size slabs under one budget, reused while they fit.

    ``pin(address, nbytes)`` runs after each mapping and ``unpin`` before each unmapping (with
    CUDA: cudaHostRegister and cudaHostUnregister).  Thread-safe.

    >>> from headrace.offload.budget import Budget, Tier
    >>> budget = Budget(Tier.HOST, limit_bytes=1 << 20)
    >>> pool = SlabPool(budget)
    >>> slab = pool.acquire("layers.0", 5000)
    >>> slab.nbytes, budget.free_bytes
    (8192, 1040384)
    >>> pool.release(slab)
    >>> pool.statistics().idle_bytes
    8192
    >>> pool.close()
    >>> budget.free_bytes == 1 << 20
    True
    """

    def __init__(
        self,
        budget: Budget,
        *,
        pin: PinCallback | None = None,
        unpin: PinCallback | None = None,
    ) -> None:
        self._budget = budget
        self._pin = pin
        self._unpin = unpin
        self._lock = threading.Lock()
        self._idle: list[_Mapping] = []
        self._held: Counter[str] = Counter()
        self._held_mappings: set[_Mapping] = set()
        self._closed = False
        self._mapped_bytes = self._peak_bytes = 0
        self._mapped_count = self._reused_count = self._unmapped_count = 0

    def try_acquire(self, borrower: str, nbytes: int) -> Slab | None:
        """Return a slab of at least ``nbytes`` bytes, or None when the budget has no room."""
        with self._lock:
            return self._acquire(borrower, nbytes)

    def acquire(self, borrower: str, nbytes: int) -> Slab:
        """Return a slab of at least ``nbytes`` bytes, or raise a ``BudgetError``."""
        with self._lock:
            slab = self._acquire(borrower, nbytes)
            if slab is not None:
                return slab
            # Every idle slab has been unmapped by now, so what stands in the way is in use.
            largest = ", ".join(f"{name!r} {size:,}" for name, size in self._held.most_common(4))
            free, limit = self._budget.free_bytes, self._budget.limit_bytes
            tier = self._budget.tier
        need = round_up(nbytes)
        raise BudgetError(
            f"{borrower!r} needs a slab of {need:,} bytes on {tier.name}, but {free:,} of the "
            f"{limit:,}-byte budget are free (slabs in use: {largest or 'none'}). "
            f"Raise {tier.value}_budget to at least {limit - free + need:,} bytes."
        )

    def _acquire(self, borrower: str, nbytes: int) -> Slab | None:
        if self._closed:
            raise ValueError(f"{borrower!r} asked a closed slab pool for {nbytes:,} bytes")
        if nbytes <= 0:
            raise ValueError(f"{borrower!r} asked for a slab of {nbytes} bytes; give 1 or more")
        need = round_up(nbytes)
        mapping = self._reusable(need)
        if mapping is not None:
            self._idle.remove(mapping)
            self._reused_count += 1
        else:
            loan = self._budget.try_borrow("slabs", need)
            while loan is None and self._idle:
                self._unmap(max(self._idle, key=lambda idle: idle.nbytes))
                loan = self._budget.try_borrow("slabs", need)
            if loan is None:
                return None
            try:
                mapping = _Mapping(need, loan, self._pin)
            except BaseException:
                loan.repay()
                raise
            self._mapped_count += 1
            self._mapped_bytes += need
            self._peak_bytes = max(self._peak_bytes, self._mapped_bytes)
        self._held[borrower] += mapping.nbytes
        self._held_mappings.add(mapping)
        return Slab(borrower, need, mapping)

    def _reusable(self, need: int) -> _Mapping | None:
        most = need * _REUSE_NUMERATOR // _REUSE_DENOMINATOR
        fitting = [idle for idle in self._idle if need <= idle.nbytes <= most]
        return min(fitting, key=lambda idle: idle.nbytes, default=None)

    def _unmap(self, mapping: _Mapping) -> None:
        mapping.unmap(self._unpin)
        self._idle.remove(mapping)
        self._mapped_bytes -= mapping.nbytes
        self._unmapped_count += 1
        mapping.loan.repay()

    def release(self, slab: Slab) -> None:
        """Take a slab back; its memory stays mapped, and on the ledger, for the next borrower."""
        with self._lock:
            mapping = slab._held()
            if mapping not in self._held_mappings:
                raise ValueError(f"{slab!r} belongs to another pool")
            slab._mapping = None
            self._held_mappings.remove(mapping)
            self._held[slab.borrower] -= mapping.nbytes
            if not self._held[slab.borrower]:
                del self._held[slab.borrower]
            self._idle.append(mapping)

    def trim(self) -> int:
        """Unmap every idle slab and return the bytes given back to the budget."""
        with self._lock:
            freed = sum(idle.nbytes for idle in self._idle)
            for idle in list(self._idle):
                self._unmap(idle)
            return freed

    def close(self) -> None:
        """Unmap every slab that can be; one still held or viewed is then an error.

        What such a slab holds is unmapped by Python once its last view dies.
        """
        with self._lock:
            self._closed = True
            in_use = []
            for idle in list(self._idle):
                try:
                    self._unmap(idle)
                except SlabInUseError as error:
                    in_use.append(str(error))
            in_use += [f"{name!r} holds {size:,} bytes" for name, size in self._held.items()]
        if in_use:
            raise SlabInUseError(f"the slab pool was closed too early: {'; '.join(in_use)}")

    def statistics(self) -> PoolStatistics:
        """Return an immutable snapshot."""
        with self._lock:
            return PoolStatistics(
                held_bytes=sum(self._held.values()),
                idle_bytes=sum(idle.nbytes for idle in self._idle),
                peak_mapped_bytes=self._peak_bytes,
                mapped_count=self._mapped_count,
                reused_count=self._reused_count,
                unmapped_count=self._unmapped_count,
                by_borrower=dict(self._held),
            )
