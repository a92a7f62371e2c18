"""``export_states`` and ``import_states``: optimizer states as a plain folder, by parameter.

The folder holds one safetensors file per chunk, whose tensors are named ``PARAMETER/STATE``, and
``states.json`` with the step counters and param groups.  It knows parameters and states and
nothing of tiles, tiers, budgets or ranks, so a run may go on from it in any other placement or
number of ranks, and other programs can read it.  A state with as many elements as its parameter
has the parameter's shape; encoded states are the codec's codes and scales, flat.

States are written and read one tile (16 MiB) at a time.  The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headrace.offload.chunk import Piece, Slot, Tile
from headrace.offload.errors import SourceError
from headrace.offload.protocols import UpdateRule
from headrace.offload.safetensors_header import TensorEntry, read_header
from headrace.offload.strict_json import parse_json
from headrace.quant.shards import DTYPES, file_layout, tensor_bytes, write_at
from headrace.quant.spec import TensorSpec

from .errors import InputError
from .pretrained import begin_reading
from .run_state import hyper_parameters, resident_states, restore_resident_states
from .saving import check_new_folder, flush
from .streamed import runtime_of, streamed_model_of
from .training import Training

NAME: Final = "states.json"
RESIDENT_NAME: Final = "resident.safetensors"
VERSION: Final = 1
#: What follows from the weights: made anew where a folder lacks it.
_FROM_WEIGHTS: Final = frozenset({"master", "remainder"})
_WORDS: Final = {dtype: word for word, dtype in DTYPES.items()}


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """Where one state of one parameter lies in a folder."""

    path: Path
    dtype: torch.dtype
    offset: int  # bytes from the start of the file


def _range(rule: UpdateRule, piece: Piece, state: str, dtype: torch.dtype) -> tuple[int, int]:
    """The piece's part of a parameter's flat state, in elements."""
    if not rule.elementwise:
        return 0, prod(rule.state_spec(tuple(piece.slot.shape), dtype)[state].shape)
    before = prod(rule.state_spec((piece.start,), dtype)[state].shape) if piece.start else 0
    until = prod(rule.state_spec((piece.stop,), dtype)[state].shape)
    return before, until


def _whole(rule: UpdateRule, slot: Slot) -> dict[str, TensorSpec]:
    """Shape and dtype of every state of a whole parameter, as the folder has them."""
    shape = (slot.numel,) if rule.elementwise else tuple(slot.shape)
    states = {}
    for name, spec in rule.state_spec(shape, slot.dtype).items():
        like_weight = prod(spec.shape) == slot.numel
        shape_there = tuple(slot.shape) if like_weight else tuple(spec.shape)
        states[name] = TensorSpec(shape_there, spec.dtype)
    return states


def export_states(model: nn.Module, folder: str | Path) -> None:
    """Write the optimizer states of a streamed run to a new folder, one tile at a time.

    ``model`` has its optimizer.  Weights are ``headrace.export``'s business.  Every rank of a run
    calls this; together they write one folder.  Raises ``InputError`` where there is no optimizer
    or the folder holds something.

    >>> import headrace
    >>> from headrace.optim import adamw
    >>> from pathlib import Path
    >>> model = headrace.load("model-folder", train="all", store="run", device="cpu")
    >>> optimizer = adamw(model, lr=1e-3)
    >>> headrace.export_states(model, "run-states")
    >>> model.close()
    >>> files = sorted(Path("run-states").glob("chunk-*"))
    >>> sorted(load_file(files[0]))  # of the first chunk, the embedding
    ['model.embed_tokens.weight/exp_avg', 'model.embed_tokens.weight/exp_avg_sq']
    """
    training = _training_of(model)
    # All ranks update together, so none may wait for another that is still about it.
    runtime_of(model).flush()
    target = Path(folder).absolute()
    first = training.ranks is None or training.ranks.rank == 0
    if first:
        check_new_folder(target)
    partial = target.parent / f".{target.name}.partial"
    try:
        if first:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        places: dict[str, _Place] = {}
        for number, (chunk, slots) in enumerate(training.trained_slots().items()):
            path = partial / f"chunk-{number:05d}.safetensors"
            rules = {slot: training.rule_of(slot.name) for slot in slots}
            places.update(_places(path, rules))
            if first:
                _make_file(path, rules, chunk)
        _meet(training)
        if training.updates is not None:
            begin_reading(runtime_of(model))
            for chunk, tile in training.updates.states.tiles():
                if not training.updates.states.exists(tile):
                    training.updates.begin_anew(chunk, tile)
                _write_tile(training, tile, places)
        _meet(training)
        if first:
            _write_small(training, partial)
            for path in (*partial.iterdir(), partial):
                flush(path)
            os.rename(partial, target)
            flush(target.parent)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    _meet(training)


def import_states(model: nn.Module, folder: str | Path) -> None:
    """Replace the optimizer states and step counters of a run by those of an exported folder.

    ``model`` has its optimizer (the recipe of the run that wrote the folder) and holds the
    weights that belong to the states.  A master that the folder lacks is made from the weights.
    Budgets, tiles and the number of ranks may differ.  Raises ``SourceError`` naming the file and
    tensor that is missing, damaged or of another shape, before anything is changed.

    >>> import headrace
    >>> from headrace.optim import adamw
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> first = headrace.load("model-folder", train="all", store="first", device="cpu")
    >>> optimizer = adamw(first, lr=1e-3)
    >>> first(input_ids=tokens, labels=tokens).loss.backward()
    >>> optimizer.step()
    >>> headrace.export(first, "weights")
    >>> headrace.export_states(first, "states")
    >>> first.close()
    >>> model = headrace.load(
    ...     "weights", train="all", store="second", device="cpu", host_budget="64MB"
    ... )
    >>> optimizer = adamw(model, lr=1e-3)
    >>> headrace.import_states(model, "states")
    >>> headrace.statistics(model).steps
    1
    >>> model.close()
    """
    training = _training_of(model)
    source = Path(folder)
    counters = _read_counters(source / NAME)
    found: dict[str, TensorEntry] = {}
    for path in sorted(source.glob("chunk-*.safetensors")):
        found.update(read_header(path).entries)
    _check(training, source, found)
    updates = training.updates
    if updates is not None:
        begin_reading(runtime_of(model))
        for chunk, tile in updates.states.tiles():
            updates.begin_anew(chunk, tile)
            made = bytearray(updates.states.read(tile))
            buffer = torch.frombuffer(made, dtype=torch.uint8)
            for piece in tile.pieces:
                _read_piece(training.rule_of(piece.slot.name), piece, buffer, found)
            updates.states.replace(tile, partial(_fill, buffer))
        updates.resume_at(
            steps=counters["steps"],
            skipped_steps=counters["skipped_steps"],
            slot_steps=counters["slot_steps"],
        )
    resident = source / RESIDENT_NAME
    if resident.exists():
        restore_resident_states(
            training.optimizer, training.resident(), load_file(resident), str(resident)
        )


def _fill(made: Tensor, target: Tensor) -> None:
    target.copy_(made)


def _training_of(model: nn.Module) -> Training:
    training = streamed_model_of(model)._training_side
    if not training.is_bound:
        raise InputError(
            "the model has no optimizer yet, so there are no states; make it first, for example "
            "optimizer = headrace.optim.adamw(model, lr=1e-5)"
        )
    return training


def _meet(training: Training) -> None:
    if training.ranks is not None:
        training.ranks.wait_for_all()


def _make_file(path: Path, rules: Mapping[Slot, UpdateRule], chunk: str) -> None:
    """A chunk's file with its header and all its length, and nothing in it yet."""
    header, _, nbytes = file_layout(_specs(rules), {"format": "pt"})
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise InputError(
                f"{path}: {nbytes:,} bytes for the states of {chunk!r} cannot be reserved "
                f"({error.strerror}); free space on that disk or give a folder on another one"
            ) from error
        file.write(header)


def _places(path: Path, rules: Mapping[Slot, UpdateRule]) -> dict[str, _Place]:
    """Where in a chunk's file each state lies; the same in every rank."""
    _, stored, _ = file_layout(_specs(rules), {"format": "pt"})
    return {key: _Place(path, at.spec.dtype, at.offset_bytes) for key, at in stored.items()}


def _specs(rules: Mapping[Slot, UpdateRule]) -> dict[str, TensorSpec]:
    return {
        f"{slot.name}/{state}": spec
        for slot, rule in rules.items()
        for state, spec in _whole(rule, slot).items()
    }


def _write_tile(training: Training, tile: Tile, places: Mapping[str, _Place]) -> None:
    assert training.updates is not None
    whole = torch.frombuffer(training.updates.states.read(tile), dtype=torch.uint8)
    for piece in tile.pieces:
        rule = training.rule_of(piece.slot.name)
        for state, values in piece.state_views(whole).items():
            place = places[f"{piece.slot.name}/{state}"]
            start, _ = _range(rule, piece, state, piece.slot.dtype)
            descriptor = os.open(place.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                at = place.offset + start * place.dtype.itemsize
                write_at(descriptor, tensor_bytes(values), at)
            finally:
                os.close(descriptor)


def _read_piece(
    rule: UpdateRule, piece: Piece, buffer: Tensor, found: Mapping[str, TensorEntry]
) -> None:
    for state, values in piece.state_views(buffer).items():
        entry = found.get(f"{piece.slot.name}/{state}")
        if entry is None or not values.numel():  # made from the weights
            continue
        start, _ = _range(rule, piece, state, piece.slot.dtype)
        target = values.view(-1).view(torch.uint8)
        with entry.path.open("rb") as file:
            file.seek(entry.offset + start * values.dtype.itemsize)
            if file.readinto(target.numpy().data) != target.numel():
                raise SourceError(f"{entry.path}: it ends inside {entry.name!r}")


def _check(training: Training, source: Path, found: Mapping[str, TensorEntry]) -> None:
    wanted: dict[str, TensorSpec] = {}
    for slots in training.trained_slots().values():
        wanted.update(_specs({slot: training.rule_of(slot.name) for slot in slots}))
    for key, spec in wanted.items():
        entry = found.get(key)
        if entry is None:
            if key.rpartition("/")[2] in _FROM_WEIGHTS:
                continue
            raise SourceError(
                f"{source}: it lacks the state {key!r}, which this optimizer needs. Use the "
                f"recipe and the trainable parameters of the run that wrote it."
            )
        if (entry.shape, entry.dtype) != (spec.shape, _WORDS[spec.dtype]):
            raise SourceError(
                f"{entry.path}: {key!r} is {entry.dtype} of shape {entry.shape}, this optimizer "
                f"needs {_WORDS[spec.dtype]} of {spec.shape}. Use the recipe of the run "
                f"that wrote it."
            )
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise SourceError(
            f"{source}: {len(unknown)} states are not this optimizer's, the first {unknown[0]!r}. "
            f"Use the recipe and the trainable parameters of the run that wrote it."
        )


def _write_small(training: Training, folder: Path) -> None:
    updates = training.updates
    body = {
        "headrace": "states",
        "version": VERSION,
        "steps": training.steps,
        "skipped_steps": training.optimizer.skipped_steps,
        "slot_steps": dict(updates.slot_steps) if updates is not None else {},
        "param_groups": hyper_parameters(training.optimizer),
    }
    (folder / NAME).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    states = resident_states(training.optimizer, training.resident())
    if states:
        save_file(states, folder / RESIDENT_NAME)


def _read_counters(path: Path) -> dict[str, Any]:
    try:
        body = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(
            f"{path}: it is missing; give a folder that headrace.export_states wrote"
        ) from error
    except ValueError as error:
        raise SourceError(f"{path}: it is damaged: {error}") from error
    numbers = ("steps", "skipped_steps")
    if (
        not isinstance(body, dict)
        or body.get("headrace") != "states"
        or body.get("version") != VERSION
        or any(type(body.get(name)) is not int for name in numbers)
        or not isinstance(body.get("slot_steps"), dict)
        or any(type(step) is not int for step in body["slot_steps"].values())
    ):
        raise SourceError(f"{path}: it is not a list of states of version {VERSION}")
    return body
