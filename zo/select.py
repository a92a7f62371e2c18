"""Which parameters of a model a run trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..quant.linear import EncodedModule
from .directions import Directions
from .factored import Factored


def select_parameters(
    model: nn.Module,
    directions: Directions,
    select: Callable[[str, nn.Parameter], bool] | None,
) -> dict[str, nn.Parameter]:
    """Trained parameters by name, in the model's order; a tied parameter appears once.

    Low-rank directions can train the matrices of linear layers and embeddings.  Without ``select``
    they train the linear layers, less an output head tied to the embedding and less anything
    under a module named "experts", whose inputs are not in batch order.
    """
    candidates = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(directions, Factored):
        usable = matrices_of(model, include_embeddings=select is not None)
        candidates = {
            name: p
            for name, p in candidates.items()
            if id(p) in usable and directions.accepts(tuple(p.shape))
        }
    if select is not None:
        candidates = {name: p for name, p in candidates.items() if select(name, p)}
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no parameter that {type(directions).__name__} can train: "
            "check requires_grad and `select`"
        )
    for name, parameter in candidates.items():
        if not parameter.is_floating_point():
            raise ValueError(f"{name} has dtype {parameter.dtype}; only floating point is trained")
    return candidates


def matrices_of(model: nn.Module, *, include_embeddings: bool = False) -> set[int]:
    """Identities of the weights that low-rank directions can reach."""
    linear: set[int] = set()
    embeddings: set[int] = set()
    routed: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, EncodedModule) and "weight" in module.encoded_slots:
            continue  # its weight is no parameter; ``quantised.encoded_matrices`` finds it
        if isinstance(module, (nn.Linear, Conv1D)):
            (routed if "experts" in path.split(".") else linear).add(id(module.weight))
        elif isinstance(module, nn.Embedding):
            embeddings.add(id(module.weight))
    if include_embeddings:
        return (linear | embeddings) - routed
    return linear - embeddings - routed
