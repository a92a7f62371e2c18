"""Parks the inputs of chunks between forward and backward: on the device, in host memory, on disk.

``park`` takes a tensor after the forward visit that read it; ``fetch`` gives it back, with the
same bits, for the backward visit.  Parked tensors come back last-in first-out, so fetching one
already starts the one before it.  A parked tensor whose graph is dropped without a backward pass
returns its memory at the next call.

Guarantees: what is parked on the device and in host memory is on the ledgers, and leaves the
weights the room they need to move.
"""

from __future__ import annotations

import weakref
from collections import deque
from enum import Enum
from typing import final

import torch
from torch import Tensor

from .budget import Loan
from .chunk import PAGE_BYTES, Segment, round_up
from .device_memory import slab_tensor
from .engine import PREFETCH_VISITS, Engine
from .errors import BudgetError, HeadraceError
from .io import DirectFile
from .lanes import CopyTransfer
from .pool import Slab
from .scratch import Scratch
from .transfer import Transfer
from .workspace import Workspace


class ParkPlace(Enum):
    """Where chunk inputs are parked; ``AUTO`` takes the fastest tier that has room."""

    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@final
class Parked:
    """A tensor that waits for its backward visit."""

    def __init__(self, parking: Parking, like: Tensor) -> None:
        self._parking = parking
        self.shape, self.dtype = like.shape, like.dtype
        self.nbytes = like.numel() * like.element_size()
        self.tensor: Tensor | None = None
        self.loan: Loan | None = None
        self.slab: Slab | None = None
        self.extent: DirectFile | None = None
        self.arrival: Transfer | None = None  # what fills the slab (or empties it to disk)
        self.upload: CopyTransfer | None = None

    def fetch(self) -> Tensor:
        """The tensor, on the device again; call once."""
        return self._parking.fetch(self)

    def abandon(self) -> None:
        """Hand the memory to the driving thread, which releases it."""
        if self.loan is not None or self.slab is not None or self.extent is not None:
            self._parking.orphans.append((self.loan, self.slab, self.extent, self.nbytes))
        self.loan = self.slab = self.extent = self.tensor = self.upload = None

    def __del__(self) -> None:
        self.abandon()  # the graph was dropped


@final
class Parking:
    """Parks tensors within the budgets of device and host."""

    def __init__(
        self,
        engine: Engine,
        scratch: Scratch | None,
        *,
        place: ParkPlace,
        device_reserve_bytes: int,
        host_reserve_bytes: int,
        workspace: Workspace,
    ) -> None:
        """The reserves are left to weights and gradients, and the workspace, whatever is parked."""
        self._workspace = workspace
        self._engine = engine
        self._scratch = scratch
        self._place = place
        self._device_room = engine.device.budget.limit_bytes - device_reserve_bytes
        self._host_room = engine.host_budget.limit_bytes - host_reserve_bytes
        self._device_bytes = 0
        self._host_bytes = 0
        # Weak: the autograd graph owns what is parked, and may be dropped without backward.
        self._stack: list[weakref.ref[Parked]] = []
        self.orphans: deque[tuple[Loan | None, Slab | None, DirectFile | None, int]] = deque()
        self.parked_bytes = dict.fromkeys(ParkPlace, 0)

    def leave_host(self, nbytes: int) -> None:
        """Leave this much more host memory to what was borrowed for good: states, gradients."""
        self._host_room -= nbytes

    def park(self, tensor: Tensor) -> Parked:
        """Take a tensor over; the caller drops it."""
        self._bury()
        parked = Parked(self, tensor)
        if self._place in (ParkPlace.AUTO, ParkPlace.DEVICE) and self._try_device(parked, tensor):
            self.parked_bytes[ParkPlace.DEVICE] += parked.nbytes
        elif self._place is ParkPlace.DEVICE:
            # The user asked for the device: say so when it is full, do not move elsewhere.
            parked.loan = self._engine.device.budget.borrow("parked activations", parked.nbytes)
            parked.tensor = tensor
            self._device_bytes += parked.nbytes
        elif self._place is not ParkPlace.DISK and self._try_host(parked, tensor):
            self.parked_bytes[ParkPlace.HOST] += parked.nbytes
        else:
            self._to_disk(parked, tensor)
            self.parked_bytes[ParkPlace.DISK] += parked.nbytes
        self._stack.append(weakref.ref(parked))
        return parked

    def _try_device(self, parked: Parked, tensor: Tensor) -> bool:
        room = self._device_room - self._workspace.needed_bytes
        if self._device_bytes + parked.nbytes > room:
            return False
        budget = self._engine.device.budget
        loan = budget.try_borrow("parked activations", parked.nbytes)
        while loan is None and self._engine.free_device(PREFETCH_VISITS):
            loan = budget.try_borrow("parked activations", parked.nbytes)
        if loan is None:
            return False
        parked.loan, parked.tensor = loan, tensor
        self._device_bytes += parked.nbytes
        return True

    def _try_host(self, parked: Parked, tensor: Tensor) -> bool:
        size = round_up(parked.nbytes, PAGE_BYTES)
        if self._host_bytes + size > self._host_room:
            return False
        slab = self._engine.try_host("parked activations", size, farther_than=PREFETCH_VISITS)
        if slab is None:
            return False
        parked.slab = slab
        self._host_bytes += size
        self._download(parked, tensor, slab)
        return True

    def _download(self, parked: Parked, tensor: Tensor, slab: Slab) -> CopyTransfer:
        source = tensor.detach().contiguous()
        transfer = self._engine.lanes.download(
            "park activations",
            source.view(-1).view(torch.uint8),
            slab_tensor(slab),
            parked.nbytes,
            after=self._engine.lanes.mark(),
        )
        parked.arrival = transfer
        held = [source]  # keeps the bytes alive until the copy has ended
        self._engine.track(transfer, held.clear)
        return transfer

    def _to_disk(self, parked: Parked, tensor: Tensor) -> None:
        if self._scratch is None:
            raise BudgetError(
                f"an activation of {parked.nbytes:,} bytes fits neither DEVICE "
                f"({self._engine.device.budget.free_bytes:,} bytes free) nor HOST "
                f"({self._engine.host_budget.free_bytes:,} free), and there is no folder to park "
                f"it on disk. Give store=, raise host_budget, or lower micro_batch."
            )
        size = round_up(parked.nbytes, PAGE_BYTES)
        slab = self._engine.acquire_host("parked activations", size)
        self._engine.wait_for(self._download(parked, tensor, slab), "park activations")
        parked.extent = self._scratch.take(size)
        write = self._scratch.write(parked.extent, slab.view[:size], label="park activations")
        parked.arrival = write
        self._engine.track(write, lambda: self._engine.host.release(slab))

    def _begin(self, parked: Parked) -> None:
        """Start to bring a parked tensor back."""
        if parked.tensor is not None:
            return
        engine = self._engine
        if parked.extent is not None and parked.slab is None:
            assert self._scratch is not None and parked.arrival is not None
            size = round_up(parked.nbytes, PAGE_BYTES)
            engine.wait_for(parked.arrival, "park activations")
            parked.slab = engine.acquire_host("parked activations", size)
            self._host_bytes += size
            parked.arrival = self._scratch.read(
                parked.extent, parked.slab.view[:size], label="fetch activations"
            )
        assert parked.slab is not None
        flat = torch.empty(parked.nbytes, dtype=torch.uint8, device=engine.lanes.device)
        parked.tensor = flat.view(parked.dtype).view(parked.shape)
        parked.upload = engine.lanes.upload(
            "fetch activations",
            slab_tensor(parked.slab),
            flat,
            (Segment(0, 0, parked.nbytes),),
            after=parked.arrival,
            free=engine.lanes.mark(),
        )

    def fetch(self, parked: Parked) -> Tensor:
        """Give a parked tensor back and start the one that was parked before it."""
        if parked.tensor is None and parked.slab is None and parked.extent is None:
            raise HeadraceError(
                "a chunk's input is needed again after it was given back: backward ran twice over "
                "one forward pass, or the model was closed in between. Run the forward pass again."
            )
        self._bury()
        self._begin(parked)
        while self._stack and self._stack.pop()() is not parked:
            pass  # graphs dropped without a backward pass
        tensor = parked.tensor
        assert tensor is not None
        if parked.upload is not None:
            self._engine.lanes.order_after(parked.upload)
            self._engine.wait_for(parked.upload, "fetch activations")
        parked.tensor = None
        self._give_back(parked.loan, parked.slab, parked.extent, parked.nbytes)
        parked.loan = parked.slab = parked.extent = None
        previous = self._stack[-1]() if self._stack else None
        if previous is not None:
            self._begin(previous)
        return tensor

    def _give_back(
        self, loan: Loan | None, slab: Slab | None, extent: DirectFile | None, nbytes: int
    ) -> None:
        if loan is not None:
            loan.repay()
            self._device_bytes -= nbytes
        if slab is not None:
            self._engine.host.release(slab)
            self._host_bytes -= round_up(nbytes, PAGE_BYTES)
        if extent is not None:
            assert self._scratch is not None
            self._scratch.give_back(extent, round_up(nbytes, PAGE_BYTES))

    def close(self) -> None:
        """Give back what is parked, and what dropped graphs left behind."""
        self._engine.drain()
        for reference in self._stack:
            parked = reference()
            if parked is not None:  # its graph is alive, but no backward pass can come
                parked.abandon()
        self._stack.clear()
        self._bury()

    def _bury(self) -> None:
        if self.orphans:
            self._engine.drain()  # a copy out of the memory may still be under way
        while self.orphans:
            self._give_back(*self.orphans.popleft())
