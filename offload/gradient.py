"""Gradients of streamed chunks: added up on the device, moved once, kept until the update.

All micro-batches of a visit add into ONE flat device buffer, which then crosses to host memory
in one transfer.  Device buffers are lent for good at the start (two: one fills while the other
crosses), and so are the host slabs that hold gradients until their update: one for each chunk
where gradients wait for the end of the step, a ring of two where they are used at once.

Where gradients wait for the end of the step and host memory cannot hold them all, they wait on
disk (``Scratch``): the ring then serves all, at 2 + 2 more bytes a bf16 parameter and step.

A chunk that is visited several times in one backward pass (tied embedding and head), or in
several backward passes of one step (gradient accumulation), adds up in host memory; it is
complete when every forward visit has had its backward visit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from .chunk import ChunkLayout
from .device_memory import DeviceSlot, slab_tensor
from .engine import Engine
from .io import DirectFile
from .pool import Slab
from .scratch import Scratch
from .transfer import Transfer


@final
class HostGradient:
    """The gradient of one chunk in host memory: which slots were touched, and their 2-norms."""

    def __init__(self, name: str, layout: ChunkLayout, slab: Slab) -> None:
        self.name = name
        self.layout = layout
        self.slab: Slab | None = slab
        self.buffer = slab_tensor(slab)
        self.touched: set[str] = set()
        # 0-dim tensors, computed where the gradient was complete; None: to be computed here.
        self.norms: dict[str, Tensor] = {}
        self.arrival: Transfer | None = None
        self.extent: DirectFile | None = None  # where the bytes wait on disk, if they do
        self.on_disk = False  # the extent, not a slab, holds the valid bytes

    def wait(self) -> None:
        """Wait until the bytes have arrived."""
        if self.arrival is not None:
            self.arrival.wait()

    def views(self) -> dict[str, Tensor]:
        """The touched gradients as tensors; call ``wait`` first."""
        return {s.name: s.view(self.buffer) for s in self.layout.slots if s.name in self.touched}

    def complete_norms(self) -> None:
        """Compute the norms that an addition in host memory has voided."""
        missing = [s for s in self.layout.slots if s.name in self.touched - self.norms.keys()]
        if missing:
            self.wait()
            norms = torch._foreach_norm([s.view(self.buffer) for s in missing])
            self.norms.update({s.name: n for s, n in zip(missing, norms, strict=True)})


@final
class DeviceGradient:
    """Lent to a backward visit: views of the flat buffer, and the names it has touched."""

    def __init__(self, views: dict[str, Tensor]) -> None:
        self.views = views
        self.touched: set[str] = set()


@final
class Gradients:
    """Collects the gradients of all trainable chunks of a model."""

    def __init__(
        self,
        engine: Engine,
        layouts: Mapping[str, ChunkLayout],
        *,
        on_device: frozenset[str],
        hold_all: bool,
        scratch: Scratch | None,
        complete: Callable[[HostGradient], None],
        across_ranks: Callable[[HostGradient], None] | None = None,
    ) -> None:
        """``on_device``: chunks whose gradient is made on the device (the rest: rows, on host).

        ``hold_all``: every chunk keeps a host slab of its own; else two slabs serve all.
        ``scratch``: where complete gradients wait on disk; None: they are used at once.
        ``across_ranks``: combines a gradient with those of other processes when it is complete.
        """
        self._across_ranks = across_ranks
        self._scratch = scratch
        self._engine = engine
        self.layouts = dict(layouts)
        self._complete = complete
        self._hold_all = hold_all
        self._outstanding: dict[str, int] = {}
        # Whether the user has dropped a complete gradient (zero_grad without a step).
        self.dropped: Callable[[str], bool] = lambda name: False
        self._partial: dict[str, HostGradient] = {}
        self._begun: set[str] = set()  # visited in this backward pass, with visits to come
        sizes = sorted((self.layouts[n].nbytes for n in on_device), reverse=True)
        self._idle_device: list[DeviceSlot] = [
            engine.acquire_device("gradients", nbytes) for nbytes in sizes[:2]
        ]
        self._own: dict[str, Slab] = {}
        self._ring: list[Slab] = []
        if hold_all:
            self._own = {
                n: engine.acquire_host("gradients", layout.nbytes)
                for n, layout in self.layouts.items()
            }
        else:
            largest = sorted((la.nbytes for la in self.layouts.values()), reverse=True)
            self._ring = [engine.acquire_host("gradients", nbytes) for nbytes in largest[:2]]

    @staticmethod
    def host_bytes(layouts: Mapping[str, ChunkLayout], *, hold_all: bool) -> int:
        """Host bytes that gradients take for good."""
        sizes = sorted((la.nbytes for la in layouts.values()), reverse=True)
        return sum(sizes) if hold_all else sum(sizes[:2])

    @staticmethod
    def device_bytes(layouts: Mapping[str, ChunkLayout], on_device: frozenset[str]) -> int:
        """Device bytes that gradients take for good."""
        return sum(sorted((layouts[n].nbytes for n in on_device), reverse=True)[:2])

    def expect(self, name: str) -> None:
        """Note a forward visit whose backward visit will come."""
        self._outstanding[name] = self._outstanding.get(name, 0) + 1

    def has_begun(self, name: str) -> bool:
        """Whether a gradient of the step under way is there already, to be added to."""
        return name in self._partial

    def _host_slab(self, name: str) -> Slab:
        if self._hold_all:
            return self._own[name]
        nbytes = self.layouts[name].nbytes
        while True:
            fitting = [s for s in self._ring if s.nbytes >= nbytes]
            if fitting:
                slab = min(fitting, key=lambda s: s.nbytes)
                self._ring.remove(slab)
                return slab
            # Every slab waits for an update in flight; those always end.
            self._engine.wait_for(self._engine.oldest_in_flight(), "gradient slab")

    def release(self, gradient: HostGradient) -> None:
        """Give the memory of an applied (or dropped) gradient back."""
        self._release_slab(gradient)
        if gradient.extent is not None:
            assert self._scratch is not None
            extent, gradient.extent = gradient.extent, None
            self._scratch.give_back(extent, gradient.layout.nbytes)

    def _release_slab(self, gradient: HostGradient) -> None:
        gradient.buffer = torch.empty(0, dtype=torch.uint8)
        slab, gradient.slab = gradient.slab, None
        if slab is not None and not self._hold_all:
            self._ring.append(slab)

    def _spill(self, gradient: HostGradient) -> None:
        """Send a complete gradient to disk and free its slab once it is there."""
        assert self._scratch is not None and gradient.slab is not None
        scratch, slab, nbytes = self._scratch, gradient.slab, gradient.layout.nbytes
        extent = gradient.extent = gradient.extent or scratch.take(nbytes)
        gradient.on_disk = True

        def begin() -> None:
            label = f"spill gradient of {gradient.name}"
            gradient.arrival = scratch.write(extent, slab.view[:nbytes], label=label)
            self._engine.track(gradient.arrival, lambda: self._release_slab(gradient))

        if gradient.arrival is None:
            begin()
        else:
            self._engine.track(gradient.arrival, begin)

    def restore(self, gradient: HostGradient, *, must: bool) -> bool:
        """Begin to bring a spilled gradient back to host memory; False: no slab is free now."""
        if not gradient.on_disk:
            return True
        while gradient.slab is not None:  # still on its way to the disk
            if not must:
                return False
            self._engine.wait_for(self._engine.oldest_in_flight(), "gradient spill")
        nbytes = gradient.layout.nbytes
        if not must and not any(s.nbytes >= nbytes for s in self._ring):
            return False
        assert self._scratch is not None and gradient.extent is not None
        gradient.slab = self._host_slab(gradient.name)
        gradient.on_disk = False
        gradient.buffer = slab_tensor(gradient.slab)
        gradient.arrival = self._scratch.read(
            gradient.extent,
            gradient.slab.view[:nbytes],
            label=f"restore gradient of {gradient.name}",
        )
        return True

    def _device_slot(self, nbytes: int) -> DeviceSlot:
        while True:
            fitting = [s for s in self._idle_device if s.nbytes >= nbytes]
            if fitting:
                slot = min(fitting, key=lambda s: s.nbytes)
                self._idle_device.remove(slot)
                return slot
            self._engine.wait_for(self._engine.oldest_in_flight(), "gradient buffer")

    @contextmanager
    def collect(self, name: str) -> Iterator[DeviceGradient]:
        """Lend zeroed device views for one backward visit; afterwards move them to the host."""
        layout = self.layouts[name]
        self._current(name)  # before the visit replaces .grad, by which a drop is seen
        self._begun.add(name)
        slot = self._device_slot(layout.nbytes)
        try:
            slot.buffer[: layout.nbytes].zero_()
            gradient = DeviceGradient(layout.views(slot.buffer))
            yield gradient
        except BaseException:
            self._idle_device.append(slot)
            raise
        self._move(name, layout, slot, gradient.touched)

    def _current(self, name: str) -> HostGradient | None:
        """The gradient to add to; one that the user dropped since is released."""
        partial = self._partial.get(name)
        if partial is None or name in self._begun or not self.dropped(name):
            return partial
        self._engine.drain()  # it may still be on its way
        self.release(self._partial.pop(name))
        return None

    def drop(self, name: str) -> None:
        """Release a complete gradient that will not be applied."""
        self._engine.drain()
        self.release(self._partial.pop(name))

    def _move(self, name: str, layout: ChunkLayout, slot: DeviceSlot, touched: set[str]) -> None:
        engine = self._engine
        partial = self._partial.get(name)
        if partial is not None:
            self.restore(partial, must=True)
        if not touched and self._across_ranks is None:
            self._idle_device.append(slot)
        elif partial is None:
            partial = self._partial[name] = HostGradient(name, layout, self._host_slab(name))
            partial.touched |= touched
            kept = [s for s in layout.slots if s.name in touched]
            if kept and self._across_ranks is None:
                norms = torch._foreach_norm([s.view(slot.buffer) for s in kept])
                partial.norms = {s.name: n for s, n in zip(kept, norms, strict=True)}
            partial.arrival = engine.lanes.download(
                f"d2h gradient of {name}",
                slot.buffer,
                partial.buffer,
                layout.nbytes,
                after=engine.lanes.mark(),
            )
            engine.track(partial.arrival, lambda: self._idle_device.append(slot))
        else:
            staging = engine.acquire_host("gradient staging", layout.nbytes)
            arrival = engine.lanes.download(
                f"d2h gradient of {name}",
                slot.buffer,
                slab_tensor(staging),
                layout.nbytes,
                after=engine.lanes.mark(),
            )
            partial.wait()
            engine.wait_for(arrival, f"gradient of {name}")
            self._idle_device.append(slot)
            buffer = slab_tensor(staging)
            for s in layout.slots:
                if s.name in touched:
                    s.view(partial.buffer).add_(s.view(buffer))
            del buffer
            engine.host.release(staging)
            partial.touched |= touched
            partial.norms = {n: v for n, v in partial.norms.items() if n not in touched}
        self._visited(name)

    @contextmanager
    def on_host(self, name: str) -> Iterator[dict[str, Tensor]]:
        """Lend the chunk's gradient in host memory for additions there (embedding rows)."""
        layout = self.layouts[name]
        partial = self._current(name)
        self._begun.add(name)
        if partial is None:
            partial = self._partial[name] = HostGradient(name, layout, self._host_slab(name))
            partial.buffer[: layout.nbytes].zero_()
        self.restore(partial, must=True)
        partial.wait()
        views = {s.name: s.view(partial.buffer) for s in layout.slots}
        yield views
        partial.touched |= views.keys()
        partial.norms = {}
        self._visited(name)

    def _visited(self, name: str) -> None:
        left = self._outstanding.get(name, 1) - 1
        self._outstanding[name] = left
        if left <= 0:
            self._outstanding.pop(name)
            self._begun.discard(name)
            partial = self._partial.get(name)
            if partial is not None:
                if self._across_ranks is not None:
                    self._across_ranks(partial)
                if self._scratch is not None:
                    partial.complete_norms()  # while the bytes are at hand
                    self._spill(partial)
                self._complete(partial)

    def complete(self) -> list[HostGradient]:
        """Gradients that wait for the end of the step, in the order in which they came."""
        return [g for n, g in self._partial.items() if n not in self._outstanding]

    def take(self, name: str) -> HostGradient:
        """Hand a complete gradient over; the next backward visit starts a new one."""
        return self._partial.pop(name)

    def abandon(self) -> None:
        """Drop everything collected: the step is skipped, or a backward pass failed."""
        self._engine.drain()
        for gradient in self._partial.values():
            self.release(gradient)
        self._partial.clear()
        self._outstanding.clear()
        self._begun.clear()

    def close(self) -> None:
        """Give every slab and device buffer back; nothing may be in flight."""
        for gradient in self._partial.values():
            self.release(gradient)
        self._partial.clear()
        for slab in (*self._own.values(), *self._ring):
            self._engine.host.release(slab)
        for slot in self._idle_device:
            self._engine.device.release(slot)
        self._own.clear()
        self._ring.clear()
        self._idle_device.clear()
