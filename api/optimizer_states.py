"""The optimizer states of streamed parameters, beside the weights of a Trainer's checkpoint.

An optimizer's ``state_dict`` is meant for one file in memory; these states are larger than that.
So the dict only refers to them.  If the model has just been saved into a folder named
``checkpoint-N``, as the Trainer does right before it saves the optimizer, they are written there
and the dict names the folder; otherwise the dict stands for this very moment of this process.

One safetensors file, ``headrace_optimizer.safetensors``, holds every state region of the store
as bytes, in the store's own layout; it is written and read one tile (16 MiB) at a time.  Its
metadata says which checkpoint it belongs to, so that a file of another step is refused.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from headrace.offload.errors import HeadraceError, SourceError
from headrace.offload.runtime import Runtime
from headrace.offload.safetensors_header import TensorEntry, read_header
from headrace.offload.update import Updates
from headrace.quant.shards import file_layout
from headrace.quant.spec import TensorSpec

STATES_NAME = "headrace_optimizer.safetensors"
_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")  # how transformers names them


@final
class SavedStates:
    """What ``optimizer.state_dict()`` says of the states of streamed parameters."""

    def __init__(self, runtime: Runtime, *, rank_count: int = 1) -> None:
        self._runtime = runtime
        self._rank_count = rank_count
        self._process = uuid.uuid4().hex
        self._loads = 0
        self._folder: tuple[Path, str] | None = None  # where the model was saved, and when
        self._written: tuple[Path, str] | None = None

    def _moment(self) -> str:
        updates = self._runtime.updates
        steps = 0 if updates is None else updates.steps + updates.skipped_steps
        return f"{self._process}:{steps}:{self._loads}"

    def model_was_saved(self, folder: Path) -> None:
        """Learn that the weights of this moment are in ``folder``."""
        self._folder = None
        if _CHECKPOINT_NAME.fullmatch(folder.name):
            self._folder = (folder.absolute(), self._moment())

    def state_dict(self) -> dict[str, Any]:
        """Counters, and where the states are; writes them beside a checkpoint just saved."""
        updates = self._runtime.updates
        if updates is None:
            return {"slot_steps": {}}
        moment, folder = self._moment(), None
        saved = self._folder is not None and self._folder[1] == moment
        if self._folder is not None and saved and self._rank_count > 1:
            # The Trainer asks the first rank alone, which has a part of the states.
            warnings.warn(
                f"{self._folder[0]} holds the weights and not the optimizer states, which are "
                f"divided among {self._rank_count} ranks. They are in the store at every step: go "
                f"on with headrace.resume, or call headrace.export_states in every rank.",
                stacklevel=2,
            )
        elif self._folder is not None and saved and self._folder[0].is_dir():
            folder = self._folder[0]
            if self._written != self._folder:
                write_states(updates, folder, moment)
                self._written = self._folder
        return {
            "slot_steps": dict(updates.slot_steps),
            "steps": updates.steps,
            "skipped_steps": updates.skipped_steps,
            "moment": moment,
            "folder": None if folder is None else str(folder),
            # A project that is moved as a whole, and run from its new place, finds it by this.
            "folder_from_here": None if folder is None else os.path.relpath(folder),
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Bring the states back; False if they are there already."""
        updates = self._runtime.updates
        if updates is None or state["moment"] == self._moment():
            return False
        if state["folder"] is None and self._rank_count > 1:
            raise HeadraceError(
                f"this checkpoint has no optimizer states: they are divided among "
                f"{self._rank_count} ranks, and in the store at every step. Go on with "
                f"headrace.resume(store), and without resume_from_checkpoint."
            )
        if state["folder"] is None:
            raise HeadraceError(
                "this optimizer state dict only says when it was made: the states of streamed "
                "parameters were in the store and have changed since. Save the model into a "
                "folder named checkpoint-N before optimizer.state_dict(), as the Trainer does; "
                "after headrace.resume(store) the states are there without loading."
            )
        read_states(updates, _folder_of(state), state["moment"])
        self._loads += 1
        updates.resume_at(
            steps=state["steps"],
            skipped_steps=state["skipped_steps"],
            slot_steps=state["slot_steps"],
        )
        return True


def _folder_of(state: dict[str, Any]) -> Path:
    """Where the states of a checkpoint are: where they were written, or moved with the project."""
    written = Path(state["folder"])
    for folder in (written, Path(state.get("folder_from_here", written)).absolute()):
        if (folder / STATES_NAME).is_file():
            return folder
    raise HeadraceError(
        f"the optimizer states of this checkpoint were written to {written / STATES_NAME}, which "
        f"is not there. Put the checkpoint back in that place, run from a folder that it has the "
        f"same path from as before ({state.get('folder_from_here', written)}), or resume the run "
        f"from its store with headrace.resume."
    )


def write_states(updates: Updates, folder: Path, identity: str) -> None:
    """Write every state that exists; the file appears whole or not at all."""
    updates.flush()
    states = updates.states
    tiles = [tile for _, tile in states.tiles() if states.exists(tile)]
    specs = {tile.region: TensorSpec((tile.nbytes,), torch.uint8) for tile in tiles}
    header, _, _ = file_layout(specs, {"headrace": identity})
    unfinished = folder / f".{STATES_NAME}.partial"
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for tile in tiles:
                file.write(states.read(tile))
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(folder / STATES_NAME)
    finally:
        unfinished.unlink(missing_ok=True)


def read_states(updates: Updates, folder: Path, identity: str) -> None:
    """Replace every state by what ``write_states`` wrote; what was not written starts anew."""
    path = folder / STATES_NAME
    header = read_header(path)
    if header.metadata.get("headrace") != identity:
        raise SourceError(
            f"{path}: it holds the optimizer states of another checkpoint than the optimizer.pt "
            f"beside it. Take both from one checkpoint."
        )
    updates.flush()
    states = updates.states
    tiles = states.tiles()
    sizes = {tile.region: tile.nbytes for _, tile in tiles}
    wrong = [name for name, entry in header.entries.items() if sizes.get(name) != entry.nbytes]
    if wrong:
        raise SourceError(
            f"{path}: {len(wrong)} state regions are not those of this run, the first "
            f"{wrong[0]!r}. Use the recipe and the trainable parameters of the run that wrote it."
        )
    with path.open("rb") as file:
        for chunk, tile in tiles:
            entry = header.entries.get(tile.region)
            if entry is not None:
                states.replace(tile, partial(_read_into, file, entry))
            elif states.exists(tile):
                updates.begin_anew(chunk, tile)


def _read_into(file: BufferedReader, entry: TensorEntry, buffer: Tensor) -> None:
    file.seek(entry.offset)
    if file.readinto(buffer.numpy().data) != entry.nbytes:
        raise SourceError(f"{entry.path}: it ends inside {entry.name!r}; take another checkpoint")
