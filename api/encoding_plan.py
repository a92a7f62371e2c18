"""Which weights of a model are encoded, by which codec, and which way round.

``layout="headrace"`` encodes every matrix of every linear layer and every stack of experts.
``layout="transformers"`` encodes what transformers finds again without this library, and refuses
by name what its layout of the format has no place for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn
from transformers.pytorch_utils import Conv1D

from headrace.quant.calibrated import CALIBRATED_WORDS, calibrated_codec
from headrace.quant.codec import Codec, Shape
from headrace.quant.fold import default_choice
from headrace.quant.foreign_layouts import foreign_codec
from headrace.quant.registry import codec_for_format, codec_from_parameters
from headrace.quant.spec import TensorSpec

from .errors import InputError

LAYOUTS = ("headrace", "transformers")


@final
@dataclass(frozen=True)
class PlannedWeight:
    """How one weight is encoded: ``shape`` is what the codec sees, ``transposed`` whether that is
    the weight with its last two axes exchanged."""

    codec: Codec
    shape: Shape
    transposed: bool = False


def plan_encoding(
    model: nn.Module,
    encoding: str | Codec | Mapping[str, Any],
    *,
    layout: str = "headrace",
    keep: Sequence[str] = (),
) -> dict[str, PlannedWeight]:
    """Return the weights of a model (on ``meta``) to encode, by name.

    ``encoding`` is a format word, a codec, or a codec's parameters.  ``keep`` names modules to
    leave as they are: in full, or by the end of their name.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
    parameters = {
        name: TensorSpec(tuple(parameter.shape), parameter.dtype)
        for name, parameter in model.named_parameters()
        if not any(kept(name, module) for module in keep)
    }
    # The codec does not matter to which tensors are matrices.
    matrices = default_choice(codec_for_format("nf4"))
    names = [name for name, spec in parameters.items() if matrices(name, spec) is not None]
    if layout == "transformers":
        return _foreign_plan(model, encoding, {name: parameters[name].shape for name in names})
    return {
        name: PlannedWeight(_codec(encoding, parameters[name].shape), parameters[name].shape)
        for name in names
    }


def kept(name: str, module: str) -> bool:
    """Whether a parameter belongs to a module named in full or by the end of its name.

    >>> kept("model.layers.0.mlp.gate.weight", "mlp.gate"), kept("a.mlp.gate_proj.weight", "gate")
    (True, False)
    """
    return f".{module}." in f".{name}."


def _codec(encoding: str | Codec | Mapping[str, Any], shape: Shape) -> Codec:
    if isinstance(encoding, Codec):
        return encoding
    try:
        if isinstance(encoding, str):
            if encoding in CALIBRATED_WORDS:
                return calibrated_codec(encoding, shape)
            return codec_for_format(encoding)
        return codec_from_parameters(encoding)
    except ValueError as error:
        raise InputError(str(error)) from error


def _foreign_plan(
    model: nn.Module, encoding: str | Codec | Mapping[str, Any], shapes: Mapping[str, Shape]
) -> dict[str, PlannedWeight]:
    if not isinstance(encoding, str):
        raise InputError(
            f"layout='transformers' has its own block sizes: give a format word, not {encoding!r}"
        )
    seen: dict[str, tuple[Shape, bool]] = {}
    for name, shape in shapes.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if encoding == "mxfp4":
            # transformers knows MXFP4 for the experts of gpt-oss, inputs before outputs, alone.
            if type(module).__name__ == "GptOssExperts":
                seen[name] = ((*shape[:-2], shape[-1], shape[-2]), True)
        elif isinstance(module, Conv1D):
            seen[name] = ((shape[1], shape[0]), True)
        elif type(module) is nn.Linear:
            seen[name] = (shape, False)
        else:
            raise InputError(
                f"{name!r} of a {type(module).__name__} has no place in transformers' layout of "
                f"{encoding!r}. Keep it as it is (modules_to_not_convert="
                f"[{name.split('.')[-2]!r}]), or use layout='headrace'."
            )
        if encoding == "fp8" and seen.get(name, (shape, False))[1]:
            raise InputError(f"{name!r}: transformers has no FP8 layout for its transposed matrix")
    if not seen:
        raise InputError(
            f"{type(model).__name__} has no weight that transformers' layout of {encoding!r} has a "
            f"place for; use layout='headrace'"
        )
    try:
        codec = foreign_codec(encoding, [shape for shape, _ in seen.values()])
        for shape, _ in seen.values():
            codec.spec(shape)
    except ValueError as error:
        raise InputError(str(error)) from error
    return {name: PlannedWeight(codec, shape, turned) for name, (shape, turned) in seen.items()}


def kept_linears(model: nn.Module, planned: Mapping[str, PlannedWeight]) -> list[str]:
    """Names of the linear modules that are not encoded."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and f"{name}.weight" not in planned
    ]
