"""Which parameters of a streamed model a run trains, and how each of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from ..offload.runtime import Runtime
from ..quant.encoded import EncodedTensor
from .directions import Directions
from .factored import Factored
from .quantised import encoded_matrices, encoded_parts
from .select import matrices_of


@final
@dataclass(frozen=True, slots=True)
class Selection:
    """Trained parameters by name, in the model's order, and their chunks."""

    parameters: Mapping[str, Tensor]
    chunk_of: Mapping[str, str]
    written: frozenset[str]
    """Ordinary parameters: updates change their bytes."""
    held: Mapping[str, str]
    """Scales of encoded weights, with their chunks: masters stay in host memory."""
    encoded: Mapping[str, EncodedTensor]
    """Encoded weights: low-rank differences are kept beside them."""

    def by_chunk(self) -> dict[str, list[str]]:
        """The trained names of every chunk that has some."""
        found: dict[str, list[str]] = {}
        for name, chunk in self.chunk_of.items():
            found.setdefault(chunk, []).append(name)
        return found


def select_streamed(
    model: nn.Module,
    runtime: Runtime,
    directions: Directions,
    select: Callable[[str, nn.Parameter], bool] | None,
) -> Selection:
    """Choose as ``select.select_parameters`` does for a resident model.

    In an encoded model, low-rank directions train the encoded matrices too, and dense ones the
    scales only where ``select`` asks for them (``quantised.trains_scales``).
    """
    parts = encoded_parts(model)
    factored = isinstance(directions, Factored)
    usable = matrices_of(model, include_embeddings=select is not None) if factored else set()
    encoded = encoded_matrices(model) if factored else {}
    parameters: dict[str, Tensor] = {}
    chunk_of: dict[str, str] = {}
    kept: dict[str, EncodedTensor] = {}
    for chunk, bound in runtime.bound.items():
        for name, parameter in bound.parameters.items():
            whole = parts.get(name)
            if factored and whole is not None:
                weight = encoded.get(whole)
                wanted = select is None or select(whole, parameter)
                if weight is not None and directions.accepts(tuple(weight.shape)) and wanted:
                    parameters[whole] = kept[whole] = weight
                    chunk_of[whole] = chunk
                continue
            if factored and id(parameter) not in usable:
                continue
            if not directions.accepts(tuple(parameter.shape)):
                continue
            if select is None and (whole is not None or not parameter.is_floating_point()):
                continue
            if select is not None and not select(name, parameter):
                continue
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} has dtype {parameter.dtype}; only floating point is trained"
                )
            parameters[name] = parameter
            chunk_of[name] = chunk
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no streamed parameter that {type(directions).__name__} "
            "can train: check `select`"
        )
    held = {name: chunk_of[name] for name in parameters if name in parts}
    written = frozenset(parameters) - kept.keys() - held.keys()
    return Selection(parameters, chunk_of, written, held, kept)
