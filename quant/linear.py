"""Layers whose weights are kept encoded: ``EncodedLinear``, and any module's parameters.

The parts are ordinary parameters that need no gradient, named after the weight:
``weight_codes``, ``weight_absmax``, ...  They are what is moved, saved and loaded; the names are
those in quantised files.  ``layer.weight`` is an ``EncodedTensor``: it decodes on the parts'
device when it is used and again in backward, so adapters (PEFT's LoRA, DoRA) wrap these layers as
they wrap ``nn.Linear``, and results have the bits of the same layer with the decoded weight.

``module.to(dtype)`` changes the type that weights decode to, never the type of a part.
"""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from .codec import Codec, Shape
from .encoded import EncodedTensor, PartsOwner, encoded_tensor


@final
@dataclass(frozen=True, slots=True)
class EncodedSlot:
    """What a module knows of one of its encoded weights."""

    codec: Codec
    shape: Shape  # of the encoded tensor
    dtype: torch.dtype
    transposed: bool = False  # the weight is the encoded tensor with its last axes exchanged


@final
class _PartsInModule(PartsOwner):
    """Parts that are parameters of a module, looked up at each use."""

    def __init__(self, module: EncodedModule, weight_name: str) -> None:
        self._module = module
        self._weight_name = weight_name

    def parts(self) -> Mapping[str, Tensor]:
        return self._module.encoded_parts(self._weight_name)

    def describe(self) -> str:
        return f"{type(self._module).__name__}.{self._weight_name}"

    def key(self) -> tuple[int, str]:
        return id(self._module), self._weight_name


def part_parameter_name(weight_name: str, part_name: str) -> str:
    """Return the parameter name of a part, in modules and in files.

    >>> part_parameter_name("gate_up_proj", "codes")
    'gate_up_proj_codes'
    """
    return f"{weight_name}_{part_name}"


class EncodedModule(nn.Module, ABC):
    """Base of modules some of whose weights are encoded; stands before the module's own class.

    Made through ``EncodedLinear``, ``attach_encoded`` or ``encode_parameters``.
    """

    encoded_slots: dict[str, EncodedSlot]

    def encoded_weight(self, weight_name: str) -> EncodedTensor:
        """Return the frozen tensor that stands for an encoded weight."""
        slot = self.encoded_slots[weight_name]
        owner = _PartsInModule(self, weight_name)
        tensor = encoded_tensor(owner, slot.codec, slot.shape, slot.dtype)
        return tensor.transpose(-2, -1) if slot.transposed else tensor  # type: ignore[return-value]

    def encoded_parts(self, weight_name: str) -> dict[str, Tensor]:
        """Return the current parts of an encoded weight by the codec's names."""
        slot = self.encoded_slots[weight_name]
        return {
            part_name: self._parameters[part_parameter_name(weight_name, part_name)].data  # type: ignore[union-attr]
            for part_name in slot.codec.spec(slot.shape)
        }

    def add_encoded(
        self,
        weight_name: str,
        parts: Mapping[str, Tensor],
        *,
        codec: Codec,
        shape: Shape,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        """Register the parts of an encoded tensor of ``shape`` that decodes to ``dtype``.

        ``transposed`` says that the weight is that tensor with its last two axes exchanged.
        """
        codec.check_parts(parts, shape)
        self.encoded_slots = getattr(self, "encoded_slots", {}) | {
            weight_name: EncodedSlot(codec, tuple(shape), dtype, transposed)
        }
        for part_name, part in parts.items():
            parameter = nn.Parameter(part, requires_grad=False)
            self.register_parameter(part_parameter_name(weight_name, part_name), parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        part_ids = {
            id(self._parameters[part_parameter_name(weight_name, part_name)])
            for weight_name, slot in self.encoded_slots.items()
            for part_name in slot.codec.spec(slot.shape)
        }

        def keeping_part_dtypes(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in part_ids and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keeping_part_dtypes, recurse)
        # The type to decode to follows ``.half()``, ``.to(torch.bfloat16)`` and the like.
        self.encoded_slots = {
            weight_name: replace(slot, dtype=fn(torch.empty(0, dtype=slot.dtype)).dtype)
            for weight_name, slot in self.encoded_slots.items()
        }
        return self


@final
class EncodedLinear(EncodedModule, nn.Linear):
    """``nn.Linear`` whose weight is the decoding of its parts, at every use.

    Memory: the parts; while in use also the decoded weight.  Input (..., in_features), output
    (..., out_features), as ``nn.Linear``; the bias, if any, is an ordinary parameter.

    >>> from .nf4 import Nf4Codec
    >>> linear = nn.Linear(64, 32, bias=False)
    >>> encoded = EncodedLinear.from_linear(linear, Nf4Codec())
    >>> x = torch.randn(2, 64)
    >>> torch.equal(encoded(x), nn.functional.linear(x, encoded.weight.decode()))
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        codec: Codec,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
    ) -> None:
        # nn.Linear's own constructor would allocate the weight.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        shape = (out_features, in_features)
        self.add_encoded("weight", parts, codec=codec, shape=shape, dtype=dtype)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, codec: Codec) -> EncodedLinear:
        """Encode a linear layer's weight; the bias parameter is shared with the layer."""
        weight = linear.weight.detach()
        return cls(
            linear.in_features,
            linear.out_features,
            codec=codec,
            parts=codec.encode(weight),
            dtype=weight.dtype,
            bias=linear.bias,
        )

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        *,
        codec: Codec,
        dtype: torch.dtype,
        bias: bool,
        device: torch.device,
    ) -> EncodedLinear:
        """Return a layer with uninitialised parts (on ``meta``: no memory at all)."""
        made_bias = None
        if bias:
            made_bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))
        return cls(
            in_features,
            out_features,
            codec=codec,
            parts=codec.empty_parts((out_features, in_features), device),
            dtype=dtype,
            bias=made_bias,
        )

    @property
    def weight(self) -> EncodedTensor:  # type: ignore[override]
        """The frozen weight, (out_features, in_features)."""
        return self.encoded_weight("weight")

    def extra_repr(self) -> str:
        slot = self.encoded_slots["weight"]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, codec={slot.codec.name}, dtype={slot.dtype}"
        )


@functools.cache
def _encoded_class(cls: type[nn.Module], weight_names: tuple[str, ...]) -> type[EncodedModule]:
    """Return a subclass of ``cls`` whose named weights are properties that give wrappers."""

    def reader(weight_name: str) -> property:
        def read(self: EncodedModule) -> EncodedTensor:
            return self.encoded_weight(weight_name)

        return property(read, doc=f"The frozen {weight_name}, kept encoded.")

    members: dict[str, Any] = {name: reader(name) for name in weight_names}
    if issubclass(cls, EncodedModule):  # one more weight of a module that has encoded ones
        return type(cls.__name__, (cls,), members)
    return type(f"Encoded{cls.__name__}", (EncodedModule, cls), members)


def attach_encoded(
    module: nn.Module,
    weight_name: str,
    parts: Mapping[str, Tensor],
    *,
    codec: Codec,
    shape: Shape,
    transposed: bool = False,
) -> None:
    """Replace one parameter of a module by parts that exist already, in place.

    The parameter (which may be on ``meta``) says shape and dtype of what is decoded; the encoded
    tensor has that shape, or, ``transposed``, that with its last two axes exchanged.
    """
    parameter = _parameter(module, weight_name)
    visible = (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape)
    if tuple(parameter.shape) != visible:
        raise ValueError(
            f"{type(module).__name__}.{weight_name} has shape {tuple(parameter.shape)}; the parts "
            f"decode to {visible}"
        )
    codec.check_parts(parts, shape)
    _become_encoded(module, (weight_name,)).add_encoded(
        weight_name, parts, codec=codec, shape=shape, dtype=parameter.dtype, transposed=transposed
    )


def encode_parameters(module: nn.Module, codecs: Mapping[str, Codec]) -> None:
    """Replace parameters of one module by encoded ones, in place; its code stays as it is.

    For modules that are not ``nn.Linear``: stacks of experts (experts, out, in) read one expert
    at a time, transposed linear layers, embeddings.  The module becomes an instance of a subclass
    of its own class, in which each named weight is an ``EncodedTensor``; a use of
    ``module.weight[expert]`` decodes that expert only.
    """
    chosen = {name: (codec, _parameter(module, name)) for name, codec in codecs.items()}
    encoded = {name: codec.encode(value.detach()) for name, (codec, value) in chosen.items()}
    made = _become_encoded(module, tuple(chosen))
    for weight_name, (codec, parameter) in chosen.items():
        made.add_encoded(
            weight_name,
            encoded[weight_name],
            codec=codec,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
        )


def _parameter(module: nn.Module, weight_name: str) -> nn.Parameter:
    parameter = module._parameters.get(weight_name)
    if parameter is None:
        raise ValueError(
            f"{type(module).__name__} has no parameter {weight_name!r}; it has "
            f"{sorted(name for name, value in module._parameters.items() if value is not None)}"
        )
    return parameter


def _become_encoded(module: nn.Module, weight_names: tuple[str, ...]) -> EncodedModule:
    """Drop the named parameters and make the module one whose weights are read encoded."""
    for weight_name in weight_names:
        del module._parameters[weight_name]
    module.__class__ = _encoded_class(type(module), weight_names)  # type: ignore[arg-type]
    assert isinstance(module, EncodedModule)
    return module
