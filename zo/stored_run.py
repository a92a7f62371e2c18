"""A streamed run's written weights: which bytes of the store hold how many steps.

Every chunk of the store has a *position*, the number of steps that its bytes hold; a commit names
bytes and positions together, so it need not wait for chunks to be in step.  Recovery is the last
commit plus the log: the records after a chunk's position are applied to it at its next visit.  A
checksum over the updates ties the store to its log.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, final

from ..offload.engine import Chunk
from ..offload.errors import StoreError
from ..offload.extents import Region
from ..offload.io import DiskLanes
from ..offload.record import COMMIT_NAME
from ..offload.runtime import Runtime
from ..offload.store import Store
from ..offload.write_back import WriteBack, import_chunk, rebase
from .history import UpdateDigest
from .perturb import StepUpdate

StorePaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@final
class StoredRun:
    """The store of one run, made from the base or continued; closes its files."""

    def __init__(
        self, write_back: WriteBack, resources: ExitStack, *, base: str, user: Mapping[str, Any]
    ) -> None:
        self._write_back = write_back
        self._resources = resources
        self._written: dict[str, int] = dict(user["written"])
        self._opened = (int(user["steps"]), str(user["digest"]))
        self._digest = UpdateDigest()
        self._checked = False
        self._base = base

    @classmethod
    def open(
        cls,
        runtime: Runtime,
        chunks: Sequence[str],
        paths: StorePaths,
        *,
        identity: Mapping[str, str],
        base: Callable[[], str],
    ) -> Self:
        """Continue the store at ``paths``, or make it there with the base's bytes.

        ``identity`` says what it belongs to; ``base()`` gives the fingerprint of the base.  Disk:
        two generations of every chunk.
        """
        single = isinstance(paths, (str, os.PathLike))
        folders = [Path(paths)] if single else [Path(path) for path in paths]  # type: ignore[arg-type,union-attr]
        engine = runtime.engine
        originals = {name: engine.chunks[name].backing for name in chunks}
        with ExitStack() as resources:
            lanes = resources.enter_context(DiskLanes(timeline=runtime.timeline))
            if any((folder / COMMIT_NAME).exists() for folder in folders):
                store = Store.open(folders, lanes=lanes, expect_fingerprint=identity)
                write_back = WriteBack(engine, store, originals)
                resources.callback(write_back.close)
                for name in chunks:
                    rebase(engine, engine.chunks[name], store)
            else:
                regions = [Region(f"weights/{n}", engine.chunks[n].layout.nbytes) for n in chunks]
                store = Store.create(
                    folders,
                    regions,
                    durability="step",
                    fingerprint=identity,
                    meta={"base": base()},
                    lanes=lanes,
                )
                write_back = WriteBack(engine, store, originals)
                resources.callback(write_back.close)
                for name in chunks:
                    import_chunk(engine, engine.chunks[name], store)
                zeros = dict.fromkeys(chunks, 0)
                store.commit({"steps": 0, "digest": UpdateDigest().text, "written": zeros})
            user, meta = store.last_user, store.meta
            assert isinstance(user, dict) and isinstance(meta, dict)
            return cls(write_back, resources.pop_all(), base=str(meta["base"]), user=user)

    @property
    def base(self) -> str:
        """Fingerprint of the weights that the run began with."""
        return self._base

    @property
    def opened_at(self) -> int:
        """Steps that the store knew of when it was opened."""
        return self._opened[0]

    def position(self, chunk: str) -> int:
        """Steps that the chunk's stored bytes hold."""
        return self._written[chunk]

    def note(self, updates: Sequence[StepUpdate]) -> None:
        """Take the updates of any one parameter, in order, from the run's first step on."""
        for update in updates:
            if not self._checked and update.step >= self._opened[0]:
                self._check()
            self._digest.add(update)

    def _check(self) -> None:
        self._checked = True
        if self._digest.text != self._opened[1]:
            raise StoreError(
                f"the store holds {self._opened[0]} steps of another log than the one given; give "
                "the log that this store was trained with, or a new folder"
            )

    def settled(self, chunk: Chunk) -> None:
        """Wait until the chunk's device bytes may be changed."""
        self._write_back.wait_for(chunk)

    @contextmanager
    def saving(self, chunk: Chunk, position: int, *, on_host: bool = False) -> Iterator[None]:
        """Inside a visit: the body brings the chunk to ``position``; its bytes are then saved."""
        change = self._write_back.changing_host if on_host else self._write_back.changing
        with change(chunk):
            yield
        self._written[chunk.name] = position

    def settle(self, steps: int) -> None:
        """End a step: commit what was saved, if anything was."""
        if not self._checked:
            if steps < self._opened[0]:
                raise StoreError(
                    f"the log ends at step {steps}, the store holds {self._opened[0]} steps: the "
                    "log is cut short, or belongs to another run"
                )
            self._check()
        if self._write_back.changed:
            written = dict(self._written)
            self._write_back.commit(
                {"steps": steps, "digest": self._digest.text, "written": written}
            )

    def close(self) -> None:
        """Wait for writes and the last commit, and let go of the model's chunks."""
        self._resources.close()
