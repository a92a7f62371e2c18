"""``export_distributed`` and ``import_distributed``: to FSDP2 and back, by distributed checkpoint.

For people who outgrow one machine.  The folder is what ``torch.distributed.checkpoint`` reads:
``{"model": weights, "optim": {"state": ..., "param_groups": ...}}`` under the model's own
parameter names, as ``torch.distributed.checkpoint.state_dict`` makes them, so that any number of
ranks loads its own part.  An fp32 master, where the run keeps one, is the weight: FSDP2 keeps its
shards in fp32 and casts them for the computation.

Weights and states pass through a scratch folder beside the target, one chunk in memory at a time.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headrace.offload.errors import SourceError

from .errors import InputError
from .saving import check_new_folder
from .state_folder import NAME, VERSION, export_states, import_states
from .streamed import StreamedModel, streamed_model_of

_MOMENTS = ("exp_avg", "exp_avg_sq")


def export_distributed(model: nn.Module, folder: str | Path) -> None:
    """Write weights and AdamW states of a full fine-tuning run as a distributed checkpoint.

    ``model`` is trained by ``headrace.optim.adamw`` with fp32 states (masters ``"fp32"`` or
    ``"sr"``), in one process.  In the other program: wrap the model with ``fully_shard``, make
    ``torch.optim.AdamW``, ``dcp.load`` into what ``get_state_dict(model, optimizer)`` gives, and
    ``set_state_dict``.  Disk: a second copy of weights and states, for the time of the call.
    Raises ``InputError`` for states that torch's AdamW does not have.

    >>> import headrace
    >>> import torch.distributed.checkpoint as dcp
    >>> from headrace.optim import adamw
    >>> model = headrace.load("model-folder", train="all", store="run", device="cpu")
    >>> optimizer = adamw(model, lr=1e-3)
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> model(input_ids=tokens, labels=tokens).loss.backward()
    >>> optimizer.step()
    >>> headrace.export_distributed(model, "for-fsdp")
    >>> model.close()
    >>> metadata = dcp.FileSystemReader("for-fsdp").read_metadata().state_dict_metadata
    >>> metadata["optim.state.model.norm.weight.exp_avg"].size
    torch.Size([32])
    """
    import torch.distributed.checkpoint as dcp

    target = Path(folder).absolute()
    check_new_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    streamed = streamed_model_of(model)
    if streamed._training_side.ranks is not None:
        raise InputError(
            "this run has several ranks, each with a store of its own; export its weights and "
            "states (headrace.export, headrace.export_states), and hand over from one process"
        )
    with ExitStack() as opened:
        scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=target.parent)))
        export_states(model, scratch / "states")
        counters = json.loads((scratch / "states" / NAME).read_text())
        states = dict(_mapped(sorted((scratch / "states").glob("chunk-*")), opened))
        _check_adamw(states)
        for number, (_, tensors) in enumerate(streamed.chunk_tensors()):
            path = scratch / f"weights-{number:05d}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        weights = dict(_mapped(sorted(scratch.glob("weights-*")), opened))
        optim: dict[str, dict[str, Tensor]] = {}
        for name, step in counters["slot_steps"].items():
            optim[name] = {moment: states[f"{name}/{moment}"] for moment in _MOMENTS}
            optim[name]["step"] = torch.tensor(float(step))
            weights[name] = states.get(f"{name}/master", weights[name])
        for names in _shared_names(streamed):
            for name in names[1:]:
                weights[name] = weights[names[0]]
        groups = _groups(streamed, optim)
        state = {"model": weights, "optim": {"state": optim, "param_groups": groups}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, checkpoint_id=str(target), no_dist=True)


def import_distributed(model: nn.Module, folder: str | Path) -> None:
    """Take AdamW states and step counters over from a distributed checkpoint.

    ``model`` has its optimizer, ``headrace.optim.adamw`` with fp32 states, and was loaded from
    the weights that belong to them (saved by the other program as a Hugging Face folder).  An
    fp32 master is taken from the checkpoint's weights, if those are fp32.  Memory: one chunk's
    states.  Raises ``SourceError`` naming a state that is missing or of another shape.

    >>> import headrace
    >>> from headrace.optim import adamw
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> first = headrace.load("model-folder", train="all", store="first", device="cpu")
    >>> optimizer = adamw(first, lr=1e-3)
    >>> first(input_ids=tokens, labels=tokens).loss.backward()
    >>> optimizer.step()
    >>> headrace.export(first, "weights")
    >>> headrace.export_distributed(first, "states")  # or saved by an FSDP2 program
    >>> first.close()
    >>> model = headrace.load("weights", train="all", store="second", device="cpu")
    >>> optimizer = adamw(model, lr=1e-3)
    >>> headrace.import_distributed(model, "states")
    >>> headrace.statistics(model).steps
    1
    >>> model.close()
    """
    import torch.distributed.checkpoint as dcp

    source = Path(folder)
    if not (source / ".metadata").is_file():
        raise SourceError(f"{source}: it is no distributed checkpoint (.metadata is missing)")
    known = dcp.FileSystemReader(str(source)).read_metadata().state_dict_metadata
    training = streamed_model_of(model)._training_side
    with tempfile.TemporaryDirectory() as made:
        scratch, slot_steps = Path(made), {}
        for number, slots in enumerate(training.trained_slots().values()):
            wanted: dict[str, Tensor] = {}
            for slot in slots:
                for moment in _MOMENTS:
                    key = f"optim.state.{slot.name}.{moment}"
                    _check_tensor(source, key, known.get(key), slot.shape)
                    wanted[key] = torch.empty(slot.shape, dtype=torch.float32)
                wanted[f"optim.state.{slot.name}.step"] = torch.empty(())
                weight = known.get(f"model.{slot.name}")
                if "master" in training.rule_of(slot.name).state_spec((1,), slot.dtype):
                    _check_tensor(source, f"model.{slot.name}", weight, slot.shape)
                    wanted[f"model.{slot.name}"] = torch.empty(slot.shape, dtype=torch.float32)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(wanted, checkpoint_id=str(source), no_dist=True)
            tensors: dict[str, Tensor] = {}
            for slot in slots:
                step = int(wanted[f"optim.state.{slot.name}.step"])
                slot_steps[slot.name] = step
                for moment in _MOMENTS:
                    tensors[f"{slot.name}/{moment}"] = wanted[f"optim.state.{slot.name}.{moment}"]
                if f"model.{slot.name}" in wanted:
                    tensors[f"{slot.name}/master"] = wanted[f"model.{slot.name}"]
            save_file(tensors, scratch / f"chunk-{number:05d}.safetensors")
        counters = {
            "headrace": "states",
            "version": VERSION,
            "steps": max(slot_steps.values(), default=0),
            "skipped_steps": 0,
            "slot_steps": slot_steps,
        }
        (scratch / NAME).write_text(json.dumps(counters))
        import_states(model, scratch)


def _mapped(paths: Iterable[Path], opened: ExitStack) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some files, as a view of the file's pages."""
    for path in paths:
        file = opened.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():
            yield name, file.get_tensor(name)


def _check_adamw(states: Mapping[str, Tensor]) -> None:
    for key, state in states.items():
        kind = key.rpartition("/")[2]
        if kind not in (*_MOMENTS, "master") or state.dtype is not torch.float32:
            raise InputError(
                f"the state {key!r} ({state.dtype}) is none of torch.optim.AdamW's fp32 moments. "
                f"Hand over a run of headrace.optim.adamw with fp32 states and master='fp32' or "
                f"'sr'; of another recipe, hand over the weights alone (headrace.export)."
            )


def _shared_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter, those of a tied one together."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _groups(model: StreamedModel, states: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The param groups as this version of ``torch.optim.AdamW`` would save them."""
    optimizer = model._training_side.optimizer
    groups = []
    for group in optimizer.param_groups:
        given = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        plain = torch.optim.AdamW([nn.Parameter(torch.empty(0))], **given).param_groups[0]
        names = [optimizer.param_name(parameter) for parameter in group["params"]]
        groups.append({**plain, "params": [name for name in names if name in states]})
    return groups


def _check_tensor(source: Path, key: str, found: Any, shape: torch.Size) -> None:
    size = getattr(found, "size", None)
    if size != shape:
        what = "is missing" if size is None else f"has shape {tuple(size)}"
        raise SourceError(
            f"{source}: {key!r} {what}; this optimizer needs shape {tuple(shape)}. Give the "
            f"checkpoint of the same model, trained by torch.optim.AdamW."
        )
