"""Copies between host and device, each way on a lane of its own.

This is the ONLY file that names CUDA streams and events; on the CPU the same two lanes are
threads that copy between two pieces of RAM.  Guarantees:

* copies of one lane run in the order in which they were queued;
* an upload starts only after the transfer that fills its source (a disk read, an update) has
  ended, and after the computation that last read its target has (its ``Mark``);
* ``order_after`` makes computation that is issued from now on see the transfer's bytes.

Assumes that slabs and slots outlive the transfers that touch them: the engine gives memory back
only when a transfer is ``done``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .chunk import Segment
from .errors import LaneError
from .timeline import LaneName, Timeline
from .transfer import Transfer


@final
class Mark:
    """A point in the computation's order; memory read before it may be overwritten after it."""

    __slots__ = ("event",)

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self.event = event


@final
class CopyTransfer(Transfer):
    """One copy between host and device: issued, then finished."""

    def __init__(self, label: str, nbytes: int) -> None:
        self.label = label
        self.nbytes = nbytes
        # What computation must wait for on the device; None on the CPU, where issued = finished.
        self.issued: Future[torch.cuda.Event | None] = Future()
        self.finished: Future[None] = Future()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait until the bytes have arrived; raise ``LaneError`` with the cause otherwise."""
        error = self.finished.exception(timeout=timeout_seconds)
        if error is not None:
            raise LaneError(f"{self.label} ({self.nbytes:,} bytes) failed: {error}") from error

    def done(self) -> bool:
        """Whether the bytes have arrived (or never will)."""
        return self.finished.done()


class DeviceLanes(ABC):
    """The two copy lanes of one device, and the order between copies and computation."""

    def __init__(self, device: torch.device, timeline: Timeline) -> None:
        self.device = device
        self._timeline = timeline
        self._threads = {
            lane: ThreadPoolExecutor(1, thread_name_prefix=f"headrace-{lane.value}")
            for lane in (LaneName.H2D, LaneName.D2H)
        }

    def upload(
        self,
        label: str,
        source: Tensor,
        target: Tensor,
        segments: Sequence[Segment],
        *,
        after: Transfer | None = None,
        free: Mark | None = None,
    ) -> CopyTransfer:
        """Queue a host-to-device copy of ``segments`` (flat uint8 tensors on both sides)."""
        return self._queue(LaneName.H2D, label, source, target, segments, after, free)

    def download(
        self,
        label: str,
        source: Tensor,
        target: Tensor,
        nbytes: int,
        *,
        after: Mark | None = None,
    ) -> CopyTransfer:
        """Queue a device-to-host copy of the first ``nbytes``, behind the computation's mark."""
        return self._queue(
            LaneName.D2H, label, source, target, (Segment(0, 0, nbytes),), None, after
        )

    def _queue(
        self,
        lane: LaneName,
        label: str,
        source: Tensor,
        target: Tensor,
        segments: Sequence[Segment],
        after: Transfer | None,
        mark: Mark | None,
    ) -> CopyTransfer:
        transfer = CopyTransfer(label, sum(s.nbytes for s in segments))

        def run() -> None:
            try:
                if after is not None:
                    after.wait()
                start = time.perf_counter()
                self._copy(lane, source, target, segments, mark, transfer.issued.set_result)
                self._timeline.record(lane, label, start, time.perf_counter(), transfer.nbytes)
            except BaseException as error:  # noqa: BLE001 - carried to whoever waits
                if not transfer.issued.done():
                    transfer.issued.set_exception(error)
                transfer.finished.set_exception(error)
            else:
                transfer.finished.set_result(None)

        self._threads[lane].submit(run)
        return transfer

    @abstractmethod
    def _copy(
        self,
        lane: LaneName,
        source: Tensor,
        target: Tensor,
        segments: Sequence[Segment],
        mark: Mark | None,
        issued: Callable[[Any], None],
    ) -> None:
        """Copy, call ``issued`` once computation can be ordered behind it, return at the end."""

    @abstractmethod
    def order_after(self, transfer: CopyTransfer) -> None:
        """Make computation issued from now on see the bytes of ``transfer``."""

    @abstractmethod
    def mark(self) -> Mark:
        """The present point in the computation's order."""

    def close(self) -> None:
        """Run what is queued, then end the threads."""
        for thread in self._threads.values():
            thread.shutdown(wait=True)


@final
class CpuLanes(DeviceLanes):
    """Lanes of the device ``"cpu"``: copies between RAM and RAM, on threads."""

    def _copy(
        self,
        lane: LaneName,
        source: Tensor,
        target: Tensor,
        segments: Sequence[Segment],
        mark: Mark | None,
        issued: Callable[[Any], None],
    ) -> None:
        # numpy's copy is single-threaded and releases the GIL: torch's would start a second
        # OpenMP team that fights the computation for cores.
        from_bytes, to_bytes = source.numpy(), target.numpy()
        for s in segments:
            np.copyto(
                to_bytes[s.target : s.target + s.nbytes],
                from_bytes[s.source : s.source + s.nbytes],
            )
        issued(None)

    def order_after(self, transfer: CopyTransfer) -> None:
        """Wait for the bytes: on the CPU, computation runs as it is issued."""
        transfer.wait()

    def mark(self) -> Mark:
        """Nothing to wait for: what was issued has run."""
        return Mark()


@final
class CudaLanes(DeviceLanes):
    """Lanes of a CUDA device: one stream each way, ordered by events."""

    def __init__(self, device: torch.device, timeline: Timeline) -> None:
        super().__init__(device, timeline)
        self._streams = {lane: torch.cuda.Stream(device) for lane in self._threads}

    def _copy(
        self,
        lane: LaneName,
        source: Tensor,
        target: Tensor,
        segments: Sequence[Segment],
        mark: Mark | None,
        issued: Callable[[Any], None],
    ) -> None:
        stream = self._streams[lane]
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            if mark is not None and mark.event is not None:
                stream.wait_event(mark.event)
            for s in segments:
                target[s.target : s.target + s.nbytes].copy_(
                    source[s.source : s.source + s.nbytes], non_blocking=True
                )
            # Blocking: the lane's thread sleeps on it below instead of spinning on a core.
            event = torch.cuda.Event(blocking=True)
            event.record(stream)
        issued(event)
        # The lane's thread waits, so that `finished` means what it says; the wait releases the
        # GIL, and the next copy of this lane could not start earlier anyhow.
        event.synchronize()

    def order_after(self, transfer: CopyTransfer) -> None:
        """Make the current stream wait on the device; the calling thread only waits for issue."""
        try:
            event = transfer.issued.result()
        except Exception as error:
            raise LaneError(f"{transfer.label} failed: {error}") from error
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> Mark:
        """An event recorded on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return Mark(event)


def open_lanes(device: torch.device, timeline: Timeline) -> DeviceLanes:
    """The lanes of ``device``; only ``cpu`` and ``cuda`` have any."""
    if device.type == "cpu":
        return CpuLanes(device, timeline)
    if device.type == "cuda":
        return CudaLanes(device, timeline)
    raise ValueError(f"device {device} is not supported; use 'cuda' or 'cpu'")


def pin_host_memory(address: int, nbytes: int) -> None:
    """Page-lock host memory for CUDA, exactly ``nbytes`` of it."""
    error = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
    if int(error) != 0:
        raise LaneError(
            f"the CUDA driver refused to page-lock {nbytes:,} bytes of host memory (error "
            f"{int(error)}). Lower host_budget, or raise the limit on locked memory (ulimit -l)."
        )


def unpin_host_memory(address: int, nbytes: int) -> None:
    """Undo ``pin_host_memory``."""
    error = torch.cuda.cudart().cudaHostUnregister(address)
    if int(error) != 0:
        raise LaneError(f"the CUDA driver could not unlock {nbytes:,} bytes (error {int(error)})")
