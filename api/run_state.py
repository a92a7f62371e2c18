"""The small mutable state of a run: generators, adapters and their optimizer states, as bytes.

What is large (weights and states of streamed parameters) is in the store's regions.  The rest
travels in the commit record's blobs, so that one atomic record holds the whole step.  Tensors go
as safetensors bytes, numbers as JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from headrace.offload.errors import StoreFormatError

if TYPE_CHECKING:
    from headrace.optim.torch_api import RuleOptimizer


def capture_generators() -> tuple[dict[str, Any], dict[str, bytes]]:
    """The states of torch's, numpy's and Python's global generators: (JSON, blobs)."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss_next = random.getstate()
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    numbers = {
        "numpy": [str(name), int(position), int(has_gauss), float(gauss)],
        "python": [version, gauss_next],
    }
    return numbers, {"generators": save_tensors(tensors)}


def restore_generators(numbers: Mapping[str, Any], blobs: Mapping[str, bytes]) -> None:
    """Put back what ``capture_generators`` took."""
    tensors = load_tensors(blobs["generators"])
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    name, position, has_gauss, gauss = numbers["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))
    version, gauss_next = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))


def capture_resident(
    optimizer: RuleOptimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, bytes]:
    """Resident trainable parameters (adapters) and their optimizer states."""
    if not parameters:
        return {}
    values = {n: p.detach().cpu().contiguous().clone() for n, p in parameters.items()}
    states = resident_states(optimizer, parameters)
    return {"parameters": save_tensors(values), "states": save_tensors(states)}


def resident_states(
    optimizer: RuleOptimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer states of resident parameters, copied, as ``PARAMETER/STATE``."""
    return {
        f"{name}/{key}": torch.as_tensor(value).cpu().contiguous().clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_resident(
    optimizer: RuleOptimizer,
    parameters: Mapping[str, nn.Parameter],
    blobs: Mapping[str, bytes],
    where: str,
) -> None:
    """Put adapters and their optimizer states back; other names or shapes are refused."""
    if not parameters and "parameters" not in blobs:
        return
    values = load_tensors(blobs.get("parameters", save_tensors({})))
    if values.keys() != parameters.keys():
        only = sorted(values.keys() ^ parameters.keys())
        raise StoreFormatError(
            f"{where}: it holds {len(values)} trainable tensors, the model has "
            f"{len(parameters)}; they differ in {only[:3]}. Build the model with the same "
            f"adapters as the run that is resumed."
        )
    for name, parameter in parameters.items():
        if values[name].shape != parameter.shape:
            raise StoreFormatError(
                f"{where}: {name!r} has shape {tuple(values[name].shape)} in the store and "
                f"{tuple(parameter.shape)} in the model. Use the adapter rank of the run."
            )
        parameter.data.copy_(values[name])
    restore_resident_states(optimizer, parameters, load_tensors(blobs["states"]), where)


def restore_resident_states(
    optimizer: RuleOptimizer,
    parameters: Mapping[str, nn.Parameter],
    states_by_key: Mapping[str, Tensor],
    where: str,
) -> None:
    """Put back what ``resident_states`` took."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in states_by_key.items():
        name, _, state = key.rpartition("/")
        by_parameter.setdefault(name, {})[state] = value
    for name, states in by_parameter.items():
        if name not in parameters:
            raise StoreFormatError(
                f"{where}: it has states of {name!r}, which this optimizer does not train. Build "
                f"the model with the same adapters as the run that wrote it."
            )
        parameter = parameters[name]
        optimizer.state[parameter] = {
            # step counters stay on the CPU, as torch keeps them
            k: v if k == "step" else v.to(parameter.device)
            for k, v in states.items()
        }


def hyper_parameters(optimizer: RuleOptimizer) -> list[dict[str, Any]]:
    """The numbers of every param group, as JSON."""
    groups = []
    for group in optimizer.param_groups:
        kept = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(json.loads(json.dumps(kept, default=str)))
    return groups
