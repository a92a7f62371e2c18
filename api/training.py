"""Full fine-tuning of a streamed model: the store, the states and the barrier of a step.

``Training`` is what an optimizer meets (``headrace.optim.StreamedUpdates``): binding it lays the
store out for its rules, streams the initial weights in, and opens gradients and updates;
``finish_step`` ends each step and commits it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from headrace.offload.chunk import PAGE_BYTES, ChunkLayout, Slot, Tile, plan_tiles
from headrace.offload.errors import BudgetError, HeadraceError
from headrace.offload.extents import Region
from headrace.offload.gradient import Gradients, HostGradient
from headrace.offload.handle import GradientHandle
from headrace.offload.io import DiskLanes
from headrace.offload.members import committed_steps
from headrace.offload.pool import Slab
from headrace.offload.protocols import UpdateRule
from headrace.offload.ranks import Ranks, SharedStates
from headrace.offload.runtime import Runtime
from headrace.offload.scratch import Scratch
from headrace.offload.store import Store
from headrace.offload.transfer import Transfer
from headrace.offload.update import RING_SLABS, StateTiles, Updates
from headrace.offload.write_back import import_chunk, rebase

from .optimizer_states import SavedStates
from .run_state import (
    capture_generators,
    capture_resident,
    hyper_parameters,
    restore_generators,
    restore_resident,
)

if TYPE_CHECKING:
    from headrace.optim.torch_api import RuleOptimizer

TILE_BYTES = 16 << 20
WEIGHT_SLABS = 3  # one updates, one uploads, one is read


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How the mutable side of a run is kept."""

    paths: Sequence[Path] | Mapping[Path, float]
    update: str
    durability: str
    snapshot_every: int
    fingerprint: Mapping[str, Any]
    meta: Mapping[str, Any]
    resume: bool = False


@final
class Training:
    """The mutable side of one streamed model; closed until an optimizer is bound."""

    def __init__(
        self,
        runtime: Runtime,
        lanes: DiskLanes,
        scratch: Scratch | None,
        gathered: frozenset[str],
        options: TrainingOptions | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self._runtime = runtime
        self._lanes = lanes
        self._scratch = scratch
        self._gathered = gathered
        self._options = options
        self._optimizer: RuleOptimizer | None = None
        self._owned: set[int] = set()
        # Small mutable state of the run (RNG, adapters, ...), gathered at each commit.
        self.user_state: Callable[[], tuple[dict[str, Any], dict[str, bytes]]] = lambda: ({}, {})
        self.last_grad_norm: float | None = None
        # What ``user_state`` gave at the step that was resumed; None in a new run.
        self.resumed_user: dict[str, Any] | None = None
        self._resident_steps = 0
        self._rules: Mapping[str, UpdateRule] = {}
        self._layouts_bound: dict[str, ChunkLayout] = {}
        self.saved = SavedStates(runtime, rank_count=1 if ranks is None else ranks.count)

    # Binding

    def bind(self, optimizer: RuleOptimizer) -> None:
        """Take an optimizer; with streamed trainable parameters, open the store for its rules."""
        runtime = self._runtime
        trainable = {
            name: parameter
            for bound in runtime.bound.values()
            for name, parameter in bound.parameters.items()
            if parameter.requires_grad
        }
        self._owned = {id(p) for p in trainable.values()}
        if self._optimizer is not None and runtime.updates is not None:
            raise HeadraceError(
                "this model has an optimizer already, and the store is laid out for its states. "
                "Load the model again to use another one."
            )
        self._optimizer = optimizer
        if self.ranks is not None:
            self._join(self.ranks, list(self.resident().values()))
        if not trainable:
            if self._options is not None:
                self._open_adapters(optimizer)
            return
        if self._options is None:
            raise HeadraceError(
                f"{len(trainable)} streamed parameters require gradients, but the model was "
                f"loaded without a store. Load with train='all' and store='FOLDER'."
            )
        in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left_out = [n for n, p in trainable.items() if id(p) not in in_optimizer]
        if left_out:
            raise HeadraceError(
                f"{len(left_out)} streamed parameters require gradients but are not in the "
                f"optimizer ({left_out[0]!r}, ...). Freeze them (requires_grad_(False)) first."
            )
        self._open(optimizer, trainable)

    def _join(self, ranks: Ranks, resident: list[nn.Parameter]) -> None:
        """Keep parameters that are not streamed equal in all ranks, as DDP would."""
        ranks.take_over(resident)
        # Averages of what all ranks share stay as they are, so that a gradient may be averaged
        # after every backward pass of a step.
        self._runtime.after_backward = lambda: ranks.average_resident(resident)

    def _opened(self, options: TrainingOptions) -> Store:
        """The run's store at its last step; with several ranks, at the last that all have."""
        paths, step = list(options.paths), None
        if self.ranks is not None:
            step = self.ranks.least(committed_steps(paths)[0])
        return Store.open(
            paths,
            lanes=self._lanes,
            expect_fingerprint=options.fingerprint,
            keep_previous=self.ranks is not None,
            step=step,
        )

    def _open_adapters(self, optimizer: RuleOptimizer) -> None:
        """Frozen base: the store holds no regions, only adapters and states in its records."""
        options = self._options
        assert options is not None
        if options.resume:
            store = self._opened(options)
        else:
            store = Store.create(
                options.paths,
                [],
                durability=options.durability,  # type: ignore[arg-type]
                fingerprint=options.fingerprint,
                meta=options.meta,
                lanes=self._lanes,
                snapshot_every=options.snapshot_every,
                keep_previous=self.ranks is not None,
            )
        self._runtime.store = store
        self._runtime.closing.callback(self._close)
        if options.resume:
            self._restore(store)
        elif options.durability != "none":
            user, blobs = self._record()
            store.commit(user, blobs=blobs)

        def committed(*_: Any) -> None:
            self._resident_steps += 1
            if options.durability != "none":
                user, blobs = self._record()
                if self.ranks is not None:
                    self.ranks.wait_for_all()  # nobody's last commit may still be under way
                store.commit(user, blobs=blobs)

        optimizer.register_step_post_hook(committed)

    def resident(self) -> dict[str, nn.Parameter]:
        """The trainable parameters that are not streamed, by the optimizer's name."""
        assert self._optimizer is not None
        return {
            self._optimizer.param_name(p): p
            for group in self._optimizer.param_groups
            for p in group["params"]
            if id(p) not in self._owned
        }

    def _restore(self, store: Store) -> None:
        """Bring counters, generators and adapters back from the last committed step."""
        user, blobs = store.last_user, store.last_blobs
        assert isinstance(user, dict) and self._optimizer is not None
        counters = user["training"]
        updates = self._runtime.updates
        if updates is not None:
            updates.resume_at(
                steps=counters["steps"],
                skipped_steps=counters["skipped_steps"],
                slot_steps=counters["slot_steps"],
            )
        self._resident_steps = counters["steps"]
        self._optimizer.skipped_steps = counters["skipped_steps"]
        where = str(next(iter(self._options.paths))) if self._options is not None else "store"
        restore_resident(self._optimizer, self.resident(), blobs, where)
        restore_generators(user["generators"], blobs)
        self.resumed_user = user["user"]

    @property
    def is_bound(self) -> bool:
        """Whether there is an optimizer."""
        return self._optimizer is not None

    @property
    def optimizer(self) -> RuleOptimizer:
        """The optimizer; ``bind`` gave it."""
        assert self._optimizer is not None, "bind an optimizer first"
        return self._optimizer

    @property
    def updates(self) -> Updates | None:
        """The updates of streamed parameters, if any are trained."""
        return self._runtime.updates

    def trained_slots(self) -> dict[str, tuple[Slot, ...]]:
        """The streamed parameters that are trained, by chunk."""
        return {name: layout.slots for name, layout in self._layouts_bound.items()}

    def rule_of(self, name: str) -> UpdateRule:
        """The update rule of a streamed parameter."""
        return self._rules[name]

    @property
    def steps(self) -> int:
        """Steps taken since the run began, those before a resume included."""
        updates = self._runtime.updates
        return self._resident_steps if updates is None else updates.steps

    def _layouts(self) -> dict[str, ChunkLayout]:
        layouts: dict[str, ChunkLayout] = {}
        for name, chunk in self._runtime.engine.chunks.items():
            parameters = self._runtime.bound[name].parameters
            names = frozenset(n for n, p in parameters.items() if p.requires_grad)
            if names:
                layouts[name] = chunk.layout.restricted_to(names)
        return layouts

    def _open(self, optimizer: RuleOptimizer, trainable: dict[str, nn.Parameter]) -> None:
        runtime, options, engine = self._runtime, self._options, self._runtime.engine
        assert options is not None
        layouts = self._layouts()
        rules = {name: optimizer.rule_for(p) for name, p in trainable.items()}
        tiles: dict[str, tuple[Tile, ...]] = {
            n: plan_tiles(layout, rules, tile_bytes=TILE_BYTES) for n, layout in layouts.items()
        }
        self._rules, self._layouts_bound = rules, layouts
        on_device = frozenset(layouts) - self._gathered
        shared = None
        if self.ranks is not None:
            tiles = {
                name: plan_tiles(layout, rules, tile_bytes=_even_tile(tiles[name], self.ranks))
                for name, layout in layouts.items()
            }
            whole = {n: engine.chunks[n].layout for n in layouts}
            shared = SharedStates(self.ranks, tiles, whole)
            tiles = shared.tiles
        self._check_room(layouts, tiles, on_device)  # before anything is made
        store = self._open_store(layouts, tiles)
        runtime.store = store
        hold_all, ring, resident = self._place(layouts, tiles)
        states = StateTiles(
            store, tiles, ring, resident, write_through=options.durability != "none"
        )

        def slot_update(name: str) -> tuple[UpdateRule, Mapping[str, Any], int]:
            parameter = trainable[name]
            return rules[name], optimizer.hyper_for(parameter), optimizer.noise_seed(parameter)

        updates = Updates(
            engine,
            store,
            states,
            mode=options.update,
            slot_update=slot_update,
            across_ranks=shared,
        )
        updates.gradients = Gradients(
            engine,
            layouts,
            on_device=on_device,
            hold_all=hold_all,
            scratch=None if updates.early or hold_all else self._scratch,
            complete=updates.add,
            across_ranks=None if self.ranks is None else self.ranks.average,
        )
        updates.arrived = self._arrived
        updates.gradients.dropped = self._dropped
        runtime.gradients, runtime.updates = updates.gradients, updates
        runtime.training_schedule(list(engine.chunks), frozenset(layouts), options.update)
        runtime.closing.callback(self._close)
        if options.resume:
            self._restore(store)

    def _open_store(
        self, layouts: dict[str, ChunkLayout], tiles: dict[str, tuple[Tile, ...]]
    ) -> Store:
        options, runtime = self._options, self._runtime
        assert options is not None
        chunks = runtime.engine.chunks
        if options.resume:
            store = self._opened(options)
            for name in layouts:
                rebase(runtime.engine, chunks[name], store)
            return store
        regions = [Region(f"weights/{n}", chunks[n].layout.nbytes) for n in layouts]
        regions += [Region(t.region, t.nbytes) for of_chunk in tiles.values() for t in of_chunk]
        store = Store.create(
            options.paths,
            regions,
            durability=options.durability,  # type: ignore[arg-type]
            fingerprint=options.fingerprint,
            meta=options.meta,
            lanes=self._lanes,
            snapshot_every=options.snapshot_every,
            keep_previous=self.ranks is not None,
        )
        for name in layouts:
            import_chunk(runtime.engine, chunks[name], store)
        if options.durability != "none":
            user, blobs = self._record()
            store.commit(user, blobs=blobs)
        return store

    def _check_room(
        self,
        layouts: dict[str, ChunkLayout],
        tiles: dict[str, tuple[Tile, ...]],
        on_device: frozenset[str],
    ) -> None:
        """Refuse budgets that cannot hold one chunk beside its gradients and states."""
        runtime = self._runtime
        chunks = runtime.engine.chunks
        largest_tile = _largest(tiles)
        chunk_bytes, name = max((c.backing.host_nbytes, n) for n, c in chunks.items())
        gradients = Gradients.host_bytes(layouts, hold_all=False)
        importing = chunk_bytes + max(c.layout.nbytes for c in chunks.values())
        least = max(2 * largest_tile + chunk_bytes + gradients, importing)
        limit = runtime.host_budget.limit_bytes
        if least > limit:
            raise BudgetError(
                f"full fine-tuning needs at least {least:,} bytes on HOST (chunk {name!r} of "
                f"{chunk_bytes:,}, gradients {gradients:,}, two state tiles of "
                f"{largest_tile:,}), but the budget is {limit:,}. Raise host_budget "
                f"to at least {least:,} bytes."
            )
        chunk_bytes, name = max((c.layout.nbytes, n) for n, c in chunks.items() if not c.gathered)
        gradients = Gradients.device_bytes(layouts, on_device)
        least, limit = chunk_bytes + gradients, runtime.device_budget.limit_bytes
        if least > limit:
            raise BudgetError(
                f"full fine-tuning needs at least {least:,} bytes on DEVICE (chunk {name!r} of "
                f"{chunk_bytes:,}, gradients {gradients:,}), before the computation's own "
                f"working memory, but the budget is {limit:,}. Raise "
                f"device_budget to at least {least:,} bytes."
            )

    def _place(
        self,
        layouts: dict[str, ChunkLayout],
        tiles: dict[str, tuple[Tile, ...]],
    ) -> tuple[bool, list[Slab], dict[str, list[Slab]]]:
        """Divide the host budget: what moves, then gradients, then weights, then states."""
        runtime, options = self._runtime, self._options
        assert options is not None
        engine = runtime.engine
        limit = runtime.host_budget.limit_bytes
        largest_tile = _largest(tiles)
        largest_chunk = max(c.backing.host_nbytes for c in engine.chunks.values())
        moving = RING_SLABS * largest_tile + WEIGHT_SLABS * largest_chunk
        ring_gradients = Gradients.host_bytes(layouts, hold_all=False)
        all_gradients = Gradients.host_bytes(layouts, hold_all=True)
        weights = sum(c.backing.host_nbytes for c in engine.chunks.values())
        waits = options.update == "forward" or options.durability != "step"
        hold_all = waits and moving + all_gradients <= limit
        left = limit - moving - (all_gradients if hold_all else ring_gradients) - weights
        ring_count = RING_SLABS if moving + ring_gradients <= limit else 2
        ring = [engine.acquire_host("state tiles", largest_tile) for _ in range(ring_count)]
        resident: dict[str, list[Slab]] = {}
        for name, of_chunk in tiles.items():
            size = sum(t.nbytes for t in of_chunk)
            if size <= left:
                resident[name] = [engine.acquire_host("states", t.nbytes) for t in of_chunk]
                left -= size
        lasting = ring_count * largest_tile + (all_gradients if hold_all else ring_gradients)
        states = sum(slab.nbytes for slabs in resident.values() for slab in slabs)
        runtime.parking.leave_host(lasting + states)
        return hold_all, ring, resident

    def _close(self) -> None:
        updates, store = self._runtime.updates, self._runtime.store
        if updates is not None:
            updates.flush()
            updates.close()
        if store is not None:
            store.close()

    # StreamedUpdates

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether the stream updates this parameter."""
        return id(parameter) in self._owned

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over everything the optimizer updates."""
        assert self._optimizer is not None, "bind an optimizer first"
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def _arrived(self, gradient: HostGradient) -> None:
        """Let the user's code see a complete gradient as ``.grad``."""
        updates = self._runtime.updates
        assert updates is not None
        for name, parameter in self._runtime.bound[gradient.name].parameters.items():
            if name in gradient.touched:
                parameter.grad = GradientHandle.make(
                    name, parameter, gradient.norms[name], may_scale=not updates.early
                )

    def _dropped(self, chunk: str) -> bool:
        """Whether zero_grad took back what ``_arrived`` gave."""
        parameters = self._runtime.bound[chunk].parameters.values()
        return all(p.grad is None for p in parameters if p.requires_grad)

    def _take_factors(self) -> dict[str, Tensor | float]:
        """The scalings that were asked of the gradients; afterwards ``.grad`` is None again."""
        factors: dict[str, Tensor | float] = {}
        for bound in self._runtime.bound.values():
            for name, parameter in bound.parameters.items():
                handle = parameter.grad
                if isinstance(handle, GradientHandle):
                    if handle.factor is not None:
                        factors[name] = handle.factor
                    parameter.grad = None
        return factors

    def finish_step(self) -> bool:
        """End the step of the streamed parameters and commit it; False if it was skipped."""
        runtime, optimizer = self._runtime, self._optimizer
        updates = runtime.updates
        assert optimizer is not None
        if updates is None:
            if optimizer.max_grad_norm is not None:
                self.last_grad_norm = optimizer.last_grad_norm = float(
                    self.clip_grad_norm_(optimizer.max_grad_norm)
                )
            runtime.end_step()
            return True
        assert updates.gradients is not None
        if not updates.early:
            for gradient in updates.gradients.complete():
                if self._dropped(gradient.name):
                    updates.gradients.drop(gradient.name)
        if optimizer.max_grad_norm is not None:
            if updates.early:
                raise HeadraceError(
                    f"max_grad_norm={optimizer.max_grad_norm} needs update='forward': with "
                    f"update='backward' chunks are updated before the global norm is known. Load "
                    f"with update='forward', or make the optimizer with max_grad_norm=None."
                )
            self.last_grad_norm = optimizer.last_grad_norm = float(
                self.clip_grad_norm_(optimizer.max_grad_norm)
            )
        others = optimizer.resident_gradients()
        done = updates.finish_step(
            self._take_factors(),
            self._commit_with(self._record()),
            others_finite=all(bool(g.isfinite().all()) for g in others),
        )
        runtime.end_step()
        return done

    def _record(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        optimizer, updates = self._optimizer, self._runtime.updates
        assert optimizer is not None
        user, blobs = self.user_state()
        counters = {
            "slot_steps": dict(updates.slot_steps) if updates is not None else {},
            "steps": self.steps,
            "skipped_steps": optimizer.skipped_steps,
        }
        numbers, generators = capture_generators()
        record = {
            "training": counters,
            "user": user,
            "generators": numbers,
            "param_groups": hyper_parameters(optimizer),
        }
        resident = capture_resident(optimizer, self.resident())
        return record, {**blobs, **generators, **resident}

    def _commit_with(
        self, before: tuple[dict[str, Any], dict[str, bytes]]
    ) -> Callable[[], Transfer] | None:
        store, updates = self._runtime.store, self._runtime.updates
        assert store is not None and updates is not None and self._options is not None
        if self._options.durability == "none":
            return None
        user, blobs = before

        def commit() -> Transfer:
            counters = user["training"]
            counters["slot_steps"] = dict(updates.slot_steps)
            counters["steps"], counters["skipped_steps"] = updates.steps, updates.skipped_steps
            return store.commit_async(user, blobs=blobs)

        return commit

    def state_dict(self) -> dict[str, Any]:
        """Step counters and where the states are; see ``optimizer_states.SavedStates``."""
        return self.saved.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring counters and states back, and commit them."""
        if self.saved.load_state_dict(state):
            self.commit_now()

    @property
    def trains_everything(self) -> bool:
        """Whether the model was loaded with train="all"."""
        return self._options is not None and self._options.meta.get("train") == "all"

    def commit_now(self) -> None:
        """Make what was loaded into the store survive a crash, outside of any step."""
        options, store = self._options, self._runtime.store
        if store is not None and options is not None and options.durability != "none":
            user, blobs = self._record()
            store.commit(user, blobs=blobs)


def _largest(tiles: Mapping[str, tuple[Tile, ...]]) -> int:
    """Bytes of the largest tile; a page where all of this rank's states are elsewhere."""
    return max((t.nbytes for of_chunk in tiles.values() for t in of_chunk), default=PAGE_BYTES)


def _even_tile(tiles: Sequence[Tile], ranks: Ranks) -> int:
    """Tiles so small that every rank can have its part of a chunk's states."""
    return min(TILE_BYTES, -(-sum(t.nbytes for t in tiles) // ranks.count))
