"""``WriteBack``: chunks that a forward visit changes go back to the store, one commit a step.

Zeroth-order steps change weights where they compute: at a chunk's visit, on the device.  The
changed bytes come down to the chunk's host slab and go on to the extent that no record names,
behind the computation; 2 bytes a parameter cross each lane for bf16 weights.

Guarantees: a commit names everything that was changed before it; until it is real, the record
before it is untouched; a chunk is neither given up nor changed again while its bytes are on their
way.  Memory: the chunk's own host slab, which it keeps until the write has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import final

import numpy as np

from .backing import Backing, StoreBacking
from .device_memory import slab_tensor
from .engine import Chunk, Engine
from .residency import Residency
from .store import JSON, Store
from .transfer import FutureTransfer, Transfer


def rebase(engine: Engine, chunk: Chunk, store: Store) -> None:
    """Let a chunk read from its region of the store, which holds its bytes already."""
    engine.drain()
    engine.forget(chunk)
    chunk.backing = StoreBacking(store, chunk.layout)


def import_chunk(engine: Engine, chunk: Chunk, store: Store) -> None:
    """Copy a chunk's weights into the store and rebase it; one chunk in host memory at a time."""
    engine.drain()
    engine.forget(chunk)
    held = [engine.acquire_host(f"import {chunk.name}", chunk.backing.host_nbytes)]
    try:
        source = target = held[0]
        nbytes = chunk.backing.host_nbytes
        chunk.backing.read(source.view[:nbytes], f"import {chunk.name}").wait()
        if chunk.backing.host_slots != chunk.layout.slots:
            target = engine.acquire_host(f"import {chunk.name}", chunk.layout.nbytes)
            held.append(target)
            from_bytes = np.frombuffer(source.view, np.uint8)
            to_bytes = np.frombuffer(target.view, np.uint8)
            to_bytes[: chunk.layout.nbytes] = 0  # padding is part of the checksum
            for s in chunk.backing.segments:
                to_bytes[s.target : s.target + s.nbytes] = from_bytes[
                    s.source : s.source + s.nbytes
                ]
            del from_bytes, to_bytes
        chunk.backing = StoreBacking(store, chunk.layout)
        chunk.backing.write(target.view[: chunk.layout.nbytes]).wait()
    finally:
        for slab in held:
            engine.host.release(slab)


@final
class WriteBack:
    """Keeps the chunks of a store up to date with what visits change."""

    def __init__(self, engine: Engine, store: Store, originals: Mapping[str, Backing]) -> None:
        """``originals``: what the chunks of the store read from before, to be restored at the end.

        The chunks have been rebased onto ``store``.
        """
        self._engine = engine
        self._store = store
        self._originals = dict(originals)
        self._open = 0  # changes whose write has not been given to the store
        self._changed = False
        # Submitting a write may wait for a commit, which the computation must not.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-write-back")

    @contextmanager
    def changing(self, chunk: Chunk) -> Iterator[None]:
        """Inside a device visit: the body changes the device bytes, which are then saved."""
        assert chunk.users and chunk.slot is not None, chunk
        self.wait_for(chunk)
        yield
        engine = self._engine
        nbytes = chunk.layout.nbytes
        if chunk.residency is Residency.DEVICE:
            chunk.slab = engine.acquire_host(chunk.name, nbytes)
            chunk.move(Residency.BOTH)
        assert chunk.slab is not None and chunk.slot is not None, chunk
        download = engine.lanes.download(
            f"d2h {chunk.name}",
            chunk.slot.buffer,
            slab_tensor(chunk.slab),
            nbytes,
            after=engine.lanes.mark(),
        )
        self._begin(chunk)
        chunk.filling = download
        chunk.users += 1  # neither copy may be given up before the bytes have arrived

        def arrived() -> None:
            chunk.filling = None
            chunk.users -= 1
            self._write(chunk)

        engine.track(download, arrived)

    @contextmanager
    def changing_host(self, chunk: Chunk) -> Iterator[None]:
        """Inside a host visit: the body changes the slab, which is then saved."""
        assert chunk.users and chunk.slab is not None, chunk
        self.wait_for(chunk)
        if chunk.residency is Residency.BOTH:
            self._engine.drop_device(chunk)
        yield
        self._begin(chunk)
        self._write(chunk)

    def wait_for(self, chunk: Chunk) -> None:
        """Wait until an earlier change of the chunk is on disk: its write still reads the slab."""
        while chunk.writing:
            self._engine.wait_for(self._engine.oldest_in_flight(), f"write {chunk.name}")

    def _begin(self, chunk: Chunk) -> None:
        chunk.writing += 1
        self._open += 1
        self._changed = True

    def _write(self, chunk: Chunk) -> None:
        backing, nbytes = chunk.backing, chunk.layout.nbytes
        assert isinstance(backing, StoreBacking) and chunk.slab is not None
        future: Future[Transfer] = self._thread.submit(backing.write, chunk.slab.view[:nbytes])

        def submitted() -> None:
            self._open -= 1
            self._engine.track(future.result(), written)

        def written() -> None:
            chunk.writing -= 1

        given = FutureTransfer(f"write {chunk.name}", nbytes, (future,))  # type: ignore[arg-type]
        self._engine.track(given, submitted)

    @property
    def changed(self) -> bool:
        """Whether anything was changed since the last commit."""
        return self._changed

    def commit(self, user: JSON) -> None:
        """Begin to make every change so far, and ``user``, survive a crash."""
        while self._open:
            self._engine.wait_for(self._engine.oldest_in_flight(), "write back")
        self._store.commit_async(user)
        self._changed = False

    def close(self) -> None:
        """Wait for writes and commit, drop what no commit names, and restore the backings."""
        engine = self._engine
        try:
            engine.drain()
            for name, backing in self._originals.items():
                engine.forget(engine.chunks[name])
                engine.chunks[name].backing = backing
        finally:
            self._thread.shutdown(wait=True)
            self._store.close()
