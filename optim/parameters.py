"""Which parameters an optimizer gets, what they are called, and what role they play."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from .spec import Shape

Role = Literal["matrix", "embedding", "other"]

#: What recipes accept: a module, parameters, (name, parameter) pairs, or param-group dicts.
ModelOrParams = nn.Module | Iterable[Any]


@final
@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """What a recipe may know about a parameter when it chooses its rule.

    ``role`` is ``"matrix"`` for the weight of a linear layer (or, without a model, any
    two-dimensional parameter), ``"embedding"`` for embedding tables and the output head, and
    ``"other"`` for norms, biases and the rest.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    role: Role


def parameter_groups(model_or_params: ModelOrParams) -> list[dict[str, Any]]:
    """Return param groups of ``(name, parameter)`` pairs or parameters, frozen ones left out."""
    if isinstance(model_or_params, Tensor):
        raise ValueError(
            "an optimizer takes a model or an iterable of parameters, got a single tensor; "
            "pass [tensor]"
        )
    if isinstance(model_or_params, nn.Module):
        named = [(n, p) for n, p in model_or_params.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(
                f"{type(model_or_params).__name__} has no parameter with requires_grad=True: "
                f"there is nothing to optimize"
            )
        return [{"params": named}]
    entries = list(model_or_params)
    if not entries:
        raise ValueError("the list of parameters is empty: there is nothing to optimize")
    if all(isinstance(entry, Mapping) for entry in entries):
        return [{**entry, "params": _listed(entry)} for entry in entries]
    return [{"params": entries}]


def _listed(group: Mapping[str, Any]) -> list[Any]:
    if "params" not in group:
        raise ValueError(f"a param group has no 'params' key; it has {sorted(group)}")
    params = group["params"]
    return [params] if isinstance(params, Tensor) else list(params)


def parameter_roles(model: nn.Module) -> dict[int, Role]:
    """Return id(parameter) -> role for every parameter of a model; tied tensors are embeddings."""
    roles: dict[int, Role] = {}
    for name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            head = isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in _HEAD_NAMES
            if isinstance(module, nn.Embedding) or head:
                roles[id(parameter)] = "embedding"
            elif id(parameter) not in roles:
                matrix = parameter.ndim >= 2 and own_name != "bias"
                roles[id(parameter)] = "matrix" if matrix else "other"
    return roles


#: Output projections that map to the vocabulary, as transformers' models call them.
_HEAD_NAMES = frozenset({"lm_head", "embed_out", "output_projection", "score", "classifier"})
