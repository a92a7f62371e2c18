"""The host update: gradients in, new weights and optimizer states out, tile by tile.

One thread (the update lane) takes chunks in order.  For each it streams the optimizer states
through a small ring of slabs (read, compute, write overlap), updates the weights in place in
their host slab, and writes them back.  The states of a large chunk are never in host memory at
once; those of chunks that fit the budget stay there and are read once.

Guarantees: a step is applied whole or not at all (bad gradients, found before or after some
chunks were updated, roll the store back); no update of step s+1 touches what the commit of step
s names; clipping multiplies gradients in their own dtype, as ``clip_grad_norm_`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from .chunk import Tile
from .device_memory import slab_tensor
from .engine import Chunk, Engine
from .errors import HeadraceError
from .gradient import Gradients, HostGradient
from .pool import Slab
from .protocols import UpdateRule
from .schedule import Phase
from .store import Store
from .timeline import LaneName
from .transfer import FutureTransfer, Transfer

RING_SLABS = 4


@dataclass(frozen=True, slots=True)
class SlotUpdate:
    """What one parameter's update needs besides tensors."""

    rule: UpdateRule
    hyper: Mapping[str, Any]
    step: int
    seed: int
    factor: Tensor | float | None  # multiplies the gradient, in its own dtype, before the update


class AcrossRanks(Protocol):
    """What updates need of the other processes of a run that shares its states."""

    def wait_for_all(self) -> None:
        """Return once every rank has come here; called by the driving thread."""
        ...

    def exchange(self, chunk: str, buffer: Tensor) -> None:
        """Fill in the weights that other ranks have updated; called by the update lane."""
        ...


@final
class StateTiles:
    """Moves the optimizer states of a chunk through host memory, one tile at a time.

    Lives on the update lane.  ``resident`` chunks keep a slab for every tile.
    """

    def __init__(
        self,
        store: Store,
        tiles: Mapping[str, tuple[Tile, ...]],
        ring: list[Slab],
        resident: Mapping[str, list[Slab]],
        *,
        write_through: bool,
    ) -> None:
        self._store = store
        self._tiles = tiles
        self._ring = ring
        self._resident = resident
        self._write_through = write_through
        self._loaded: set[str] = set()
        self._writes: dict[str, Transfer] = {}
        self._slab_writes: list[Transfer | None] = [None] * len(ring)

    def run(self, name: str, visit: Callable[[Tile, Tensor, bool], None]) -> None:
        """Call ``visit(tile, buffer, fresh)`` for each tile in order; writes go on afterwards."""
        tiles = self._tiles[name]
        resident = self._resident.get(name)
        depth = len(tiles) if resident is not None else len(self._ring) - 1
        reads: dict[int, tuple[Slab, Transfer | None]] = {}
        begun = 0

        def begin(i: int) -> None:
            tile = tiles[i]
            if resident is not None:
                slab = resident[i]
                needed = tile.region not in self._loaded
            else:
                slab = self._ring[i % len(self._ring)]
                earlier = self._slab_writes[i % len(self._ring)]
                if earlier is not None:
                    earlier.wait()
                needed = True
            earlier = self._writes.get(tile.region)
            if earlier is not None:
                earlier.wait()  # a read must not overtake the write of the same region
            read = None
            if needed and self._store.written(tile.region):
                read = self._store.read(tile.region, slab.view[: tile.nbytes])
            reads[i] = (slab, read)

        for i, tile in enumerate(tiles):
            for ahead in range(begun, min(i + depth, len(tiles))):
                begin(ahead)
                begun = ahead + 1
            slab, read = reads.pop(i)
            buffer = slab_tensor(slab)[: tile.nbytes]
            fresh = read is None and not (
                tile.region in self._loaded or self._store.written(tile.region)
            )
            if read is not None:
                read.wait()
            if fresh:
                buffer.zero_()
            visit(tile, buffer, fresh)
            del buffer
            if resident is not None:
                self._loaded.add(tile.region)
            if self._write_through or resident is None:
                write = self._store.write(tile.region, slab.view[: tile.nbytes])
                self._writes[tile.region] = write
                if resident is None:
                    self._slab_writes[i % len(self._ring)] = write

    def tiles(self) -> list[tuple[str, Tile]]:
        """Every tile with its chunk's name, in order."""
        return [(name, tile) for name, of_chunk in self._tiles.items() for tile in of_chunk]

    def exists(self, tile: Tile) -> bool:
        """Whether the states of a tile have been made: not before the first update."""
        return tile.region in self._loaded or self._store.written(tile.region)

    def read(self, tile: Tile) -> memoryview:
        """The bytes of a tile that exists, valid until the next call; no update may run."""
        slab = self._slab_of(tile)
        if tile.region not in self._loaded:
            self._store.read(tile.region, slab.view[: tile.nbytes]).wait()
        return slab.view[: tile.nbytes]

    def replace(self, tile: Tile, fill: Callable[[Tensor], None]) -> None:
        """Let ``fill`` write a tile's bytes anew (flat uint8); no update may run."""
        slab = self._slab_of(tile)
        buffer = slab_tensor(slab)[: tile.nbytes]
        fill(buffer)
        del buffer
        resident = slab is not self._ring[0]
        if resident:
            self._loaded.add(tile.region)
        if self._write_through or not resident:
            self._store.write(tile.region, slab.view[: tile.nbytes]).wait()

    def _slab_of(self, tile: Tile) -> Slab:
        self.settle()
        for name, slabs in self._resident.items():
            for slab, own in zip(slabs, self._tiles[name], strict=True):
                if own.region == tile.region:
                    return slab
        return self._ring[0]

    def settle(self) -> None:
        """Wait for every write begun so far."""
        for write in self._writes.values():
            write.wait()
        self._writes.clear()

    def forget(self) -> None:
        """Void resident states: the store's bytes were rolled back."""
        self.settle()
        self._loaded.clear()

    def close(self, release: Callable[[Slab], None]) -> None:
        """Give every slab back once its writes have ended."""
        self.settle()
        for slab in (*self._ring, *(s for slabs in self._resident.values() for s in slabs)):
            release(slab)
        self._ring.clear()
        self._resident = {}


@final
class Updates:
    """Applies complete gradients to the store, in backward order or during the next forward."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        states: StateTiles,
        *,
        mode: str,
        slot_update: Callable[[str], tuple[UpdateRule, Mapping[str, Any], int]],
        across_ranks: AcrossRanks | None = None,
    ) -> None:
        """``slot_update(name)`` gives (rule, hyper-parameters now, seed) of a parameter.

        ``across_ranks``: the processes that share the states of this run, if there are several.
        """
        self._across_ranks = across_ranks
        self._unshared_commit = False  # durable here, not known to be so in every rank
        self._engine = engine
        self._store = store
        self._states = states
        self.mode = mode
        self._slot_update = slot_update
        self.gradients: Gradients | None = None
        # Told of every complete gradient, before it may be applied.
        self.arrived: Callable[[HostGradient], None] = lambda gradient: None
        self.slot_steps: dict[str, int] = {}
        self.steps = 0
        self.skipped_steps = 0
        self._held: dict[str, HostGradient] = {}
        self._ready: dict[str, dict[str, SlotUpdate]] = {}
        self._norms: dict[str, Tensor] = {}
        self._applied: set[str] = set()  # chunks updated in this step already
        self._running = 0
        self._commit: Transfer | None = None
        self._commit_due: Callable[[], Transfer] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-update")
        self._steps_before: dict[str, int] = {}
        # Updating while backward runs is only safe where a bad step can be rolled back.
        self._early = mode == "backward" and store.can_roll_back()
        engine.start_update = self.start
        engine.has_update = lambda chunk: chunk.name in self._ready

    def resume_at(self, *, steps: int, skipped_steps: int, slot_steps: Mapping[str, int]) -> None:
        """Go on counting where a committed step stood."""
        self.steps, self.skipped_steps = steps, skipped_steps
        self.slot_steps = dict(slot_steps)
        self._steps_before = dict(slot_steps)

    # States as a whole

    @property
    def states(self) -> StateTiles:
        """Where the states are; only to be touched after ``flush``, when no update runs."""
        return self._states

    def begin_anew(self, chunk: str, tile: Tile) -> None:
        """Make the states of a tile what they are before the first update; no pass may run."""
        with self._engine.use_host(chunk, Phase.FORWARD) as weights:

            def fill(buffer: Tensor) -> None:
                buffer.zero_()
                for piece in tile.pieces:
                    rule = self._slot_update(piece.slot.name)[0]
                    weight = piece.part(weights[piece.slot.name], rule)
                    rule.init_states(weight, piece.state_views(buffer))

            self._states.replace(tile, fill)

    # Gradients arrive

    @property
    def early(self) -> bool:
        """Whether gradients are applied while backward still runs."""
        return self._early

    def add(self, gradient: HostGradient) -> None:
        """Take note of a gradient that is complete for this backward pass."""
        name = gradient.name
        if name in self._applied:
            raise HeadraceError(
                f"chunk {name!r} got a second gradient in one step, but update='backward' has "
                f"already applied the first. Put the whole batch through one forward pass "
                f"(micro_batch= splits it inside), or load with update='forward'."
            )
        gradient.complete_norms()
        self.arrived(gradient)
        if not self._early:
            return  # stays with Gradients: later backward passes of this step add to it
        self._finish_previous()
        finite = all(bool(torch.isfinite(n)) for n in gradient.norms.values())
        self._norms.update(gradient.norms)
        assert self.gradients is not None
        self._held[name] = self.gradients.take(name)
        self._applied.add(name)
        if finite and self._all_finite():
            self._ready[name] = self._snapshot(gradient, {})
            self.start(self._engine.chunks[name], True)
        else:
            # The step will be skipped: backward goes on, and needs the memory.
            gradient.wait()
            self.gradients.release(self._held.pop(name))

    def _all_finite(self) -> bool:
        return all(bool(torch.isfinite(n)) for n in self._norms.values())

    def _snapshot(
        self, gradient: HostGradient, factors: Mapping[str, Tensor | float]
    ) -> dict[str, SlotUpdate]:
        updates: dict[str, SlotUpdate] = {}
        for slot in gradient.layout.slots:
            if slot.name in gradient.touched:
                rule, hyper, seed = self._slot_update(slot.name)
                step = self.slot_steps.get(slot.name, 0) + 1
                self.slot_steps[slot.name] = step
                factor = factors.get(slot.name)
                updates[slot.name] = SlotUpdate(rule, dict(hyper), step, seed, factor)
        return updates

    # The end of a step

    def _collect_norms(self) -> None:
        assert self.gradients is not None
        for gradient in self.gradients.complete():
            gradient.complete_norms()
            self._norms.update(gradient.norms)

    def finish_step(
        self,
        factors: Mapping[str, Tensor | float],
        commit: Callable[[], Transfer] | None,
        *,
        others_finite: bool,
    ) -> bool:
        """End a step: apply what waits (now or during the next forward); False: it was skipped.

        ``factors`` multiply gradients (clipping), by parameter name.  ``commit`` is called once
        all updates of the step are in the store.  ``others_finite``: whether the gradients that
        are not streamed are finite; a step is skipped as a whole.
        """
        if factors and self._early:
            raise HeadraceError(
                "clipping by the global norm needs update='forward': with update='backward' "
                "chunks are updated before the norm is known. Load with update='forward', or "
                "set max_grad_norm=None (0 in TrainingArguments)."
            )
        if not self._early:
            self._start_all()  # what no forward pass visited since the last step
        self._finish_previous()
        self._collect_norms()
        assert self.gradients is not None
        if not (others_finite and self._all_finite()):
            self._skip()
            return False
        if not self._early:
            for gradient in self.gradients.complete():
                self._held[gradient.name] = self.gradients.take(gradient.name)
                self._ready[gradient.name] = self._snapshot(gradient, factors)
        self._end_of_step()
        self.steps += 1
        self._commit_due = commit
        self._maybe_commit()
        if self.mode == "backward" or self._across_ranks is not None:
            # Ranks exchange weights chunk by chunk, so all must update in the same order.
            self._start_all()
        return True

    def _start_all(self) -> None:
        for name in list(self._ready):
            self.start(self._engine.chunks[name], True)

    def _end_of_step(self) -> None:
        self._norms = {}
        self._applied.clear()
        self._steps_before = dict(self.slot_steps)

    def _skip(self) -> None:
        """Drop a step with inf or NaN gradients: nothing of it may remain."""
        assert self.gradients is not None
        self._engine.drain()
        for name in list(self._held):
            self.gradients.release(self._held.pop(name))
        self.gradients.abandon()
        if self._applied and self._early:
            self._states.settle()
            self._states.forget()
            rolled_back = set(self._store.roll_back())
            for chunk in self._engine.chunks.values():
                if f"weights/{chunk.name}" in rolled_back:
                    self._engine.forget(chunk)
            self.slot_steps = dict(self._steps_before)
        self._norms = {}
        self._applied.clear()
        self.skipped_steps += 1

    # Running updates

    def start(self, chunk: Chunk, must: bool) -> bool:
        """Queue the update of a chunk that has one ready; False: no room for its weights now."""
        if chunk.name not in self._ready:
            return True
        assert self.gradients is not None
        gradient = self._held[chunk.name]
        if not self.gradients.restore(gradient, must=must):
            return False
        if not self._engine.take_for_update(chunk, must=must):
            return False
        self._await_commit()
        if self._unshared_commit and self._across_ranks is not None:
            # The first write after a commit spoils the step before it, which a rank whose own
            # commit is still under way might have to go back to.
            self._across_ranks.wait_for_all()
            self._unshared_commit = False
        updates = self._ready.pop(chunk.name)
        future: Future[Transfer] = self._thread.submit(
            self._run, chunk, gradient, updates, chunk.filling
        )
        self._running += 1
        chunk.writing += 1
        label = f"update {chunk.name}"
        done = FutureTransfer(label, chunk.layout.nbytes, (future,))  # type: ignore[arg-type]

        def written() -> None:
            chunk.writing -= 1

        def complete() -> None:
            assert self.gradients is not None
            self.gradients.release(self._held.pop(chunk.name))
            self._running -= 1
            self._engine.track(future.result(), written)
            self._maybe_commit()

        self._engine.set_updating(chunk, done, complete)
        return True

    def _finish_previous(self) -> None:
        """Wait until every update of the previous step has run and its commit is under way.

        Otherwise an update of this step could slip into the record of the last one.
        """
        while self._commit_due is not None:
            self._engine.wait_for(self._engine.oldest_in_flight(), "previous update")

    def _await_commit(self) -> None:
        if self._commit is not None:
            self._engine.wait_for(self._commit, "commit")
            self._commit = None
            self._unshared_commit = True

    def _maybe_commit(self) -> None:
        if self._commit_due is not None and not self._running and not self._ready:
            due, self._commit_due = self._commit_due, None
            self._commit = due()

    def _run(
        self,
        chunk: Chunk,
        gradient: HostGradient,
        updates: Mapping[str, SlotUpdate],
        filling: Transfer | None,
    ) -> Transfer:
        """On the update lane: bring one chunk's weights and states one step further."""
        if filling is not None:
            filling.wait()
        gradient.wait()
        assert chunk.slab is not None
        weights = {s.name: s for s in chunk.backing.host_slots}
        buffer = slab_tensor(chunk.slab)
        gradients = gradient.views()
        timeline = self._engine.timeline

        def visit(tile: Tile, states: Tensor, fresh: bool) -> None:
            with timeline.span(LaneName.UPDATE, tile.region, tile.nbytes):
                for piece in tile.pieces:
                    name = piece.slot.name
                    rule = updates[name].rule if name in updates else self._slot_update(name)[0]
                    weight = piece.part(weights[name].view(buffer), rule)
                    views = piece.state_views(states)
                    if fresh:
                        rule.init_states(weight, views)
                    if name not in updates:
                        continue
                    grad = piece.part(gradients[name], rule)
                    u = updates[name]
                    if u.factor is not None:
                        grad.mul_(u.factor)
                    rule.update(
                        weight,
                        grad,
                        views,
                        step=u.step,
                        hyper=u.hyper,
                        seed=u.seed,
                        element_offset=piece.start,
                    )

        self._states.run(chunk.name, visit)
        if self._across_ranks is not None:
            self._across_ranks.exchange(chunk.name, buffer)
        return self._write_weights(chunk)

    def _write_weights(self, chunk: Chunk) -> Transfer:
        from .backing import StoreBacking

        assert chunk.slab is not None and isinstance(chunk.backing, StoreBacking)
        return chunk.backing.write(chunk.slab.view[: chunk.layout.nbytes])

    def flush(self) -> None:
        """Apply everything that waits and wait until the store has committed it."""
        self._start_all()
        while self._running:
            self._engine.wait_for(self._engine.oldest_in_flight(), "flush")
        self._engine.drain()
        self._states.settle()
        self._maybe_commit()
        self._await_commit()

    def close(self) -> None:
        """End the update lane after what is queued, and give its memory back."""
        self._thread.shutdown(wait=True)
        self._states.close(self._engine.host.release)
        if self.gradients is not None:
            self.gradients.close()
