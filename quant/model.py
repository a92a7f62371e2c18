"""Whole models over encoded weights: encode one in memory, or shape one for a folder's parts.

Both replace ``nn.Linear`` by ``EncodedLinear`` and other modules' parameters in place.  A part is
named after its parameter with the part's name behind it, in the model as in the files.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .codec import Codec
from .encoded import EncodedTensor
from .fold import ChooseCodec
from .folder import TensorRecord
from .linear import EncodedLinear, EncodedModule, attach_encoded
from .spec import TensorSpec


def encode_model(model: nn.Module, choose: ChooseCodec) -> list[str]:
    """Encode the parameters that ``choose`` names a codec for, in place; return their names.

    One parameter at a time is held twice.  A parameter that several modules share is refused:
    the others would keep the exact one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    encoded: list[str] = []
    while parameters:
        name, parameter = parameters.popitem()
        codec = choose(name, TensorSpec(tuple(parameter.shape), parameter.dtype))
        if codec is None:
            continue
        if len(names_of[id(parameter)]) > 1:
            raise ValueError(
                f"{names_of[id(parameter)]} are one parameter and cannot be encoded separately; "
                f"keep it as it is"
            )
        parts = codec.encode(parameter.detach())
        replace_weight(model, name, codec, parts, tuple(parameter.shape))
        encoded.append(name)
    return encoded[::-1]


def declare_encoded(model: nn.Module, records: Mapping[str, TensorRecord]) -> None:
    """Give a model (usually on ``meta``) uninitialised parts for every encoded record.

    Afterwards the model's parameters are the tensors that the folder stores, under the same
    names.  Weights decode to the type that the model's parameters have now.
    """
    for name, record in records.items():
        if record.codec is not None:
            declare_weight(model, name, record.codec, record.shape)


def declare_weight(
    model: nn.Module, name: str, codec: Codec, shape: tuple[int, ...], *, transposed: bool = False
) -> None:
    """Give one weight of a model (usually on ``meta``) uninitialised parts.

    ``shape`` is of what the parts decode to; ``transposed`` says that the weight is that with
    its last two axes exchanged.
    """
    parameter = _find(model, name)
    visible = (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape)
    if tuple(parameter.shape) != visible:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)} in the model and {visible} in the encoded "
            f"checkpoint; they belong to different models"
        )
    parts = codec.empty_parts(shape, parameter.device)
    replace_weight(model, name, codec, parts, shape, transposed=transposed)


def encoded_weights(model: nn.Module) -> dict[str, EncodedTensor]:
    """Return every encoded weight of a model by its name."""
    return {
        f"{module_name}.{weight_name}" if module_name else weight_name: weight
        for module_name, module in model.named_modules()
        if isinstance(module, EncodedModule)
        for weight_name in module.encoded_slots
        for weight in (module.encoded_weight(weight_name),)
    }


def decoding_bytes(module: nn.Module) -> int:
    """Return the largest sum of a decoded weight and the scratch of decoding it.

    What a module computing over encoded weights allocates beyond its parts and activations, as
    long as one weight is decoded at a time (a stack of experts that is used whole counts whole).
    """
    return max(
        (
            weight.numel() * weight.element_size()
            + weight.view_.codec.decode_scratch_bytes(weight.view_.whole_shape, weight.device)
            for weight in encoded_weights(module).values()
        ),
        default=0,
    )


def _find(model: nn.Module, name: str) -> nn.Parameter:
    module_name, _, weight_name = name.rpartition(".")
    modules = dict(model.named_modules())
    module = modules.get(module_name)
    parameter = None if module is None else module._parameters.get(weight_name)
    if parameter is None:
        raise ValueError(f"the model has no parameter {name!r}; the folder is of another model")
    return parameter


def replace_weight(
    model: nn.Module,
    name: str,
    codec: Codec,
    parts: Mapping[str, Tensor],
    shape: tuple[int, ...],
    *,
    transposed: bool = False,
) -> None:
    """Replace one parameter of a model by parts that decode to ``shape``, in place."""
    module_name, _, weight_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    if type(module) is not nn.Linear or not module_name or transposed:
        attach_encoded(module, weight_name, parts, codec=codec, shape=shape, transposed=transposed)
        return
    parent_name, _, leaf = module_name.rpartition(".")
    layer = EncodedLinear(
        module.in_features,
        module.out_features,
        codec=codec,
        parts=parts,
        dtype=module.weight.dtype,
        bias=module.bias,
    )
    layer.train(module.training)
    setattr(model.get_submodule(parent_name), leaf, layer)
