"""A streamed model's weights with its adapters merged, one chunk in memory at a time.

Weights that are kept encoded are decoded, so that every tensor bears the name and shape of the
model's own parameter.  A merged weight has the bits of PEFT's own merge into that weight: the
product of the factors is added in fp32 and the sum is rounded once; DoRA rescales the rows of
the sum.  Memory: one chunk as stored, and the decoded tensors that a caller has taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from headrace.quant.linear import EncodedModule, EncodedSlot, part_parameter_name

from .errors import InputError
from .streamed import StreamedModel, streamed_model_of


@final
@dataclass(frozen=True, slots=True)
class MergedTensor:
    """One tensor of a chunk: its name, what it was encoded with, and how to have its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slot: EncodedSlot | None  # None: stored as it is
    values: Callable[[], Tensor]  # merged, decoded; valid until the next chunk is taken


@final
@dataclass(slots=True)
class _Plan:
    """How the stored tensors of a model become its weights."""

    encoded: dict[str, EncodedSlot] = field(default_factory=dict)  # weight name -> slot
    part_of: dict[str, tuple[str, str]] = field(default_factory=dict)  # stored -> (weight, part)
    layers: dict[str, list[Any]] = field(default_factory=dict)  # weight name -> adapted layers
    biases: dict[str, list[Any]] = field(default_factory=dict)


Change = Callable[[str, dict[str, Tensor]], None]


def merged_chunks(
    model: nn.Module, *, change: Change | None = None
) -> Iterator[tuple[str, list[MergedTensor]]]:
    """Yield every chunk's name and tensors, adapters of ``model`` merged.

    ``change`` may write into the stored tensors of a chunk (copies) before anything else does.

    ``model`` is what ``headrace.load`` returned or PEFT's wrapper around it.  Adapters that
    cannot be merged are refused by name before anything is read.
    """
    streamed = streamed_model_of(model)
    plan = _plan(model, streamed)
    for chunk, stored in streamed.chunk_tensors():
        if change is not None:
            change(chunk, stored)
        yield chunk, _tensors_of(plan, stored)


def tensor_list(model: nn.Module) -> list[tuple[str, MergedTensor]]:
    """Return (chunk, tensor) for every tensor of the model, without its values.

    Asking one of these for ``values`` is an error: they come from ``merged_chunks``.
    """
    streamed = streamed_model_of(model)
    plan = _plan(model, streamed)
    found: list[tuple[str, MergedTensor]] = []
    for chunk, bound in streamed._runtime.bound.items():
        parameters: dict[str, Tensor] = {n: p.detach() for n, p in bound.parameters.items()}
        found += [(chunk, tensor) for tensor in _tensors_of(plan, parameters)]
    return found


def _tensors_of(plan: _Plan, stored: dict[str, Tensor]) -> list[MergedTensor]:
    tensors: list[MergedTensor] = []
    done: set[str] = set()
    for name, value in stored.items():
        weight_name, _ = plan.part_of.get(name, (name, ""))
        if weight_name in done:
            continue
        done.add(weight_name)
        slot = plan.encoded.get(weight_name)
        if slot is None:
            shape, dtype = tuple(value.shape), value.dtype
        else:
            shape, dtype = slot.shape, slot.dtype
            if slot.transposed:
                shape = (*shape[:-2], shape[-1], shape[-2])
        tensors.append(
            MergedTensor(weight_name, shape, dtype, slot, _values(plan, stored, weight_name))
        )
    return tensors


def _values(plan: _Plan, stored: dict[str, Tensor], name: str) -> Callable[[], Tensor]:
    @torch.no_grad()
    def values() -> Tensor:
        slot = plan.encoded.get(name)
        if slot is None:
            value = stored[name]
        else:
            parts = {
                part: stored[stored_name]
                for stored_name, (weight, part) in plan.part_of.items()
                if weight == name
            }
            value = slot.codec.decode(parts, slot.shape, slot.dtype)
            if slot.transposed:
                value = value.transpose(-2, -1).contiguous()
        for layer in plan.layers.get(name, []):
            value = _merged(value, layer, name)
        for layer in plan.biases.get(name, []):
            value = _merged_bias(value, layer)
        return value

    return values


def _plan(model: nn.Module, streamed: StreamedModel) -> _Plan:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {
        id(parameter): name
        for bound in streamed._runtime.bound.values()
        for name, parameter in bound.parameters.items()
    }
    plan = _Plan()
    for module in streamed.modules():
        if not isinstance(module, EncodedModule):
            continue
        for leaf, slot in module.encoded_slots.items():
            for part in slot.codec.spec(slot.shape):
                part_leaf = part_parameter_name(leaf, part)
                stored = names[id(module._parameters[part_leaf])]
                weight_name = f"{stored.removesuffix(part_leaf)}{leaf}"
                plan.part_of[stored] = (weight_name, part)
                plan.encoded[weight_name] = slot
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer):
            raise InputError(
                f"{path} carries a {type(module).__name__}; only LoRA adapters can be merged. "
                f"Save the adapter with save_pretrained instead."
            )
        _check_mergeable(path, module)
        base: Any = module.get_base_layer()  # type: ignore[no-untyped-call]
        leaf = str(getattr(module, "parameter_name", "weight"))
        weight_name, _ = weight_name_of(base, leaf, names, path)
        plan.layers.setdefault(weight_name, []).append(module)
        if any(module.lora_bias.get(a, False) for a in module.active_adapters):
            bias_name, _ = weight_name_of(base, "bias", names, path)
            plan.biases.setdefault(bias_name, []).append(module)
    return plan


def _check_mergeable(path: str, module: Any) -> None:
    from peft.tuners.lora.variants import DoraLinearVariant

    for adapter in module.active_adapters:
        variant = module.lora_variant.get(adapter)
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise InputError(
                f"{path}: adapter {adapter!r} is a {type(variant).__name__}, which cannot be "
                f"merged by streaming. Save the adapter with save_pretrained instead."
            )
        if variant is not None and len(module.active_adapters) > 1:
            raise InputError(
                f"{path}: DoRA adapter {adapter!r} is active together with others "
                f"({', '.join(module.active_adapters)}); activate one of them with set_adapter."
            )


def weight_name_of(base: nn.Module, leaf: str, names: dict[int, str], path: str) -> tuple[str, str]:
    """Return the name, before PEFT wrapped the model, of a parameter of an adapted module.

    Beside it that of a stored tensor of it; ``names`` gives the stored tensors' names by
    identity, ``path`` is what errors call the adapter.
    """
    if isinstance(base, EncodedModule) and leaf in base.encoded_slots:
        slot = base.encoded_slots[leaf]
        part_leaf = part_parameter_name(leaf, next(iter(slot.codec.spec(slot.shape))))
        stored = names[id(base._parameters[part_leaf])]
        return f"{stored.removesuffix(part_leaf)}{leaf}", stored
    parameter = base._parameters.get(leaf)
    if parameter is None or id(parameter) not in names:
        raise InputError(
            f"{path}: the adapter adds to {leaf!r} of a {type(base).__name__}, which has no "
            f"streamed parameter of that name"
        )
    return names[id(parameter)], names[id(parameter)]


def _merged(weight: Tensor, layer: Any, name: str) -> Tensor:
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
            continue
        delta = layer.get_delta_weight(adapter).to(weight.device)
        if adapter not in layer.lora_variant:
            weight = (weight.to(torch.float32) + delta.to(torch.float32)).to(weight.dtype)
            continue
        magnitude = layer.lora_magnitude_vector[adapter]
        rows = delta.t() if layer.fan_in_fan_out else delta
        norm = magnitude.get_weight_norm(weight, rows, scaling=1)
        factor = (magnitude.weight / norm).view(-1, 1)
        factor = factor.t() if layer.fan_in_fan_out else factor
        weight = (factor * (weight + delta)).to(weight.dtype)
    if not bool(torch.isfinite(weight).all()):
        raise InputError(
            f"{name}: the merged weight holds NaN or infinities; the adapter is broken, or was "
            f"never given its values"
        )
    return weight


def _merged_bias(bias: Tensor, layer: Any) -> Tensor:
    for adapter in layer.active_adapters:
        if layer.lora_bias.get(adapter, False):
            delta = layer.lora_B[adapter].bias * layer.scaling[adapter]
            bias = (bias.to(torch.float32) + delta.to(torch.float32)).to(bias.dtype)
    return bias
