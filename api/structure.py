"""Cuts a transformers model into chunks by what its modules are, not by what it is called.

Every parameter belongs to exactly one chunk: a decoder layer, the input embedding, the head
(one chunk with the embedding where they are tied), and each remaining module that owns
parameters by itself (a final norm, a position table, a projection).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import final

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from headrace.offload.errors import UnsupportedModelError


class Role(Enum):
    """What a chunk's module is to the model."""

    LAYER = "layer"
    EMBEDDING = "embedding"
    HEAD = "head"
    TIED = "tied embedding and head"
    POSITIONS = "position table"
    REST = "rest"


@final
@dataclass(frozen=True)
class ModuleChunk:
    """One chunk to be: its name, role, modules and parameters (full names, in model order)."""

    name: str
    role: Role
    modules: tuple[nn.Module, ...]
    parameters: dict[str, nn.Parameter]


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The outermost repeated blocks of the model, by name, in order."""
    split = set(getattr(model, "_no_split_modules", None) or ())
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        block = isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in split
        if name and block and not inside and any(True for _ in module.parameters()):
            found[name] = module
    return found


def _named(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        yield (f"{prefix}.{name}" if prefix else name), parameter


def cut(model: PreTrainedModel) -> list[ModuleChunk]:
    """The chunks of a model in the order in which its modules are declared.

    Raises ``UnsupportedModelError`` where a parameter cannot be streamed with a module's call.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no repeated layers to stream (no "
            f"GradientCheckpointingLayer and no module named in _no_split_modules). "
            f"Load it with transformers; it needs no streaming."
        )
    names = {id(m): n for n, m in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = (
        isinstance(embedding, nn.Embedding)
        and isinstance(head, nn.Linear)
        and head.weight is embedding.weight
    )
    taken: dict[int, str] = {}
    chunks: dict[str, ModuleChunk] = {}

    def claim(name: str, role: Role, modules: tuple[nn.Module, ...]) -> None:
        parameters: dict[str, nn.Parameter] = {}
        for module in modules:
            for full, parameter in _named(module, names[id(module)]):
                owner = taken.setdefault(id(parameter), name)
                if owner != name:
                    raise UnsupportedModelError(
                        f"parameter {full!r} of {name!r} is shared with {owner!r}; only an input "
                        f"embedding tied to the output head can be shared. Untie it first."
                    )
                if all(parameter is not p for p in parameters.values()):
                    parameters[full] = parameter
        chunks[name] = ModuleChunk(name, role, modules, parameters)

    special: set[int] = set()
    if isinstance(embedding, nn.Embedding):
        special.add(id(embedding))
    if isinstance(head, nn.Linear):
        special.add(id(head))
    for name, module in model.named_modules():
        inside = any(name == outer or name.startswith(f"{outer}.") for outer in chunks)
        if name in layers:
            claim(name, Role.LAYER, (module,))
        elif id(module) in special:
            if not tied:
                claim(name, Role.EMBEDDING if module is embedding else Role.HEAD, (module,))
            elif module is embedding:
                assert head is not None
                claim(name, Role.TIED, (module, head))
        elif not inside and any(True for _ in module.parameters(recurse=False)):
            if any(True for _ in module.children()) and not isinstance(
                module, (nn.Linear, nn.Embedding)
            ):
                owned = [n for n, _ in module.named_parameters(recurse=False)]
                raise UnsupportedModelError(
                    f"module {name or type(model).__name__!r} owns {owned} beside submodules, so "
                    f"they cannot be fetched by a call of their own. Keep this model resident."
                )
            role = Role.POSITIONS if isinstance(module, nn.Embedding) else Role.REST
            claim(name, role, (module,))
    missing = [n for n, p in model.named_parameters() if id(p) not in taken]
    assert not missing, missing
    return list(chunks.values())
