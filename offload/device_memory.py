"""Device slots: flat buffers on the device, lent from the device budget and reused.

On ``"cpu"`` a slot is a slab of RAM under the device budget; on CUDA it is one allocation of
torch's caching allocator of exactly the asked size.  Idle slots stay on the ledger until their
room is needed for another size, as host slabs do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from .budget import Budget, Loan
from .chunk import PAGE_BYTES, round_up
from .errors import BudgetError
from .pool import Slab, SlabPool


def slab_tensor(slab: Slab) -> Tensor:
    """The slab's bytes as a flat uint8 tensor; it must be dropped before the slab is unmapped."""
    return torch.frombuffer(slab.view, dtype=torch.uint8)


@final
class DeviceSlot:
    """A flat uint8 buffer on the device."""

    __slots__ = ("buffer", "loan", "nbytes", "slab")

    def __init__(self, buffer: Tensor, nbytes: int, loan: Loan | None, slab: Slab | None) -> None:
        self.buffer = buffer
        self.nbytes = nbytes
        self.loan = loan
        self.slab = slab


class DevicePool(ABC):
    """Lends device slots within a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    @abstractmethod
    def try_acquire(self, borrower: str, nbytes: int) -> DeviceSlot | None:
        """A slot of at least ``nbytes``, or None if the budget has no room."""

    @abstractmethod
    def release(self, slot: DeviceSlot) -> None:
        """Give a slot back for reuse; nothing on the device may still be using it."""

    @abstractmethod
    def trim(self) -> None:
        """Free idle slots: their bytes leave the ledger."""

    @abstractmethod
    def close(self) -> None:
        """Free everything."""

    def acquire(self, borrower: str, nbytes: int) -> DeviceSlot:
        """A slot of at least ``nbytes``, or a ``BudgetError`` that says what would work."""
        slot = self.try_acquire(borrower, nbytes)
        if slot is None:
            self.budget.borrow(borrower, nbytes).repay()  # raises with the ledger's figures
            raise BudgetError(f"{borrower!r} needs {nbytes:,} bytes on DEVICE in one piece")
        return slot


@final
class RamPool(DevicePool):
    """Slots of the device ``"cpu"``."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self._slabs = SlabPool(budget)

    def try_acquire(self, borrower: str, nbytes: int) -> DeviceSlot | None:
        """A slab of RAM under the device budget."""
        slab = self._slabs.try_acquire(borrower, nbytes)
        if slab is None:
            return None
        return DeviceSlot(slab_tensor(slab), nbytes, None, slab)

    def release(self, slot: DeviceSlot) -> None:
        """Give the slab back."""
        assert slot.slab is not None
        slab, slot.slab = slot.slab, None
        slot.buffer = torch.empty(0, dtype=torch.uint8)
        self._slabs.release(slab)

    def trim(self) -> None:
        """Unmap idle slabs."""
        self._slabs.trim()

    def close(self) -> None:
        """Unmap every slab."""
        self._slabs.close()


@final
class CudaPool(DevicePool):
    """Slots on a CUDA device."""

    def __init__(self, budget: Budget, device: torch.device) -> None:
        super().__init__(budget)
        self._device = device
        self._idle: list[DeviceSlot] = []

    def try_acquire(self, borrower: str, nbytes: int) -> DeviceSlot | None:
        """An idle slot of the same size, or a new allocation while the budget has room."""
        size = round_up(nbytes, PAGE_BYTES)
        for i, slot in enumerate(self._idle):
            if slot.nbytes == size:
                return self._idle.pop(i)
        loan = self.budget.try_borrow(borrower, size)
        while loan is None and self._idle:
            largest = max(self._idle, key=lambda s: s.nbytes)
            self._idle.remove(largest)
            self._free(largest)
            loan = self.budget.try_borrow(borrower, size)
        if loan is None:
            return None
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return DeviceSlot(buffer, size, loan, None)

    def _free(self, slot: DeviceSlot) -> None:
        slot.buffer = torch.empty(0, dtype=torch.uint8)
        assert slot.loan is not None
        slot.loan.repay()

    def release(self, slot: DeviceSlot) -> None:
        """Keep the allocation for the next request of its size."""
        self._idle.append(slot)

    def trim(self) -> None:
        """Free every idle slot."""
        while self._idle:
            self._free(self._idle.pop())

    def close(self) -> None:
        """Free every idle slot; those lent out are their borrowers'."""
        self.trim()


def open_device_pool(budget: Budget, device: torch.device) -> DevicePool:
    """The pool of ``device``."""
    return RamPool(budget) if device.type == "cpu" else CudaPool(budget, device)
