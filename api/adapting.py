"""Adapters whose first values come from base weights that are not in memory.

PEFT reads a layer's weight when it makes some adapters: DoRA starts its magnitudes at the norms
of the weight's rows, LoftQ and EoRA start the factors at a correction of the encoding error.
Here the base passes by once, chunk by chunk, and the adapters of each chunk get their values
while its weights are there.  The bits are those of PEFT over the same weights in memory.
Beyond the budgets: one decoded weight, and for corrections one chunk of the exact checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.offload.chunk import ChunkLayout
from headrace.offload.errors import HeadraceError
from headrace.offload.schedule import Phase
from headrace.quant.eora import eora

from .checkpoint import Checkpoint
from .compatibility import chosen_dtype
from .errors import InputError
from .merged_weights import weight_name_of
from .streamed import StreamedModel, streamed_model_of
from .structure import cut


def fill_from_base(streamed: StreamedModel) -> None:
    """Give adapters that PEFT made over absent weights the values that it meant to give them.

    Only DoRA's magnitudes can be made afterwards.  Initialisations that change the base (PiSSA,
    OLoRA, CorDA, LoftQ by PEFT itself) are refused: a streamed base is frozen.
    """
    waiting = {
        path: module
        for path, module in _lora_layers(streamed)
        if any(_absent(dora.weight) for dora in module.lora_magnitude_vector.values())
    }
    if waiting:
        with torch.no_grad():
            for _, _, module in _visits(streamed, waiting):
                _fill_magnitudes(module)
    check_filled(streamed)


def check_filled(model: nn.Module) -> None:
    """Refuse adapters that hold NaN: they were made from a base that was not in memory."""
    for path, module in _lora_layers(model):
        for name, parameter in module.named_parameters():
            if "base_layer" not in name and _absent(parameter):
                raise HeadraceError(
                    f"adapter {path}.{name} holds NaN: its initialisation reads (or changes) the "
                    f"base weight, which is streamed and frozen. Use init_lora_weights=True or "
                    f"'gaussian' (use_dora=True is fine with get_peft_model), or "
                    f"headrace.correct_adapters for LoftQ and EoRA."
                )


def correct_adapters(
    model: nn.Module,
    exact: str | Path,
    *,
    moments: Callable[[str], Tensor] | None = None,
) -> None:
    """Start LoRA adapters over encoded weights at the best low-rank correction of the encoding.

    ``model`` is PEFT's model over a streamed encoded base; ``exact`` the folder that the base
    was encoded from, read once.  Without ``moments``: the largest singular directions of
    W - decoded, LoftQ's initialisation for a base that is encoded already (Li et al., 2023, one
    iteration).  ``moments`` gives E[x xᵀ], (in, in), of a layer's inputs by the weight's name:
    then the error that the outputs feel is what is corrected (EoRA, Liu et al., 2024), worth
    about 5 dB at rank 16 where the plain correction is worth next to nothing.

    >>> import headrace
    >>> from peft import LoraConfig, get_peft_model
    >>> _ = headrace.quantize("model-folder", "model-nf4")
    >>> base = headrace.load("model-nf4", train="adapters", device="cpu")
    >>> tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    >>> headrace.correct_adapters(tuned, "model-folder")
    >>> base.close()
    """
    streamed = streamed_model_of(model)
    layers = dict(_lora_layers(streamed))
    read = _exact_reader(Path(exact), streamed)
    with torch.no_grad():
        for chunk, weight_name, module in _visits(streamed, layers):
            weight: Tensor = module.get_base_layer().weight
            wanted = read(chunk, weight_name)
            if wanted.shape != weight.shape:
                raise InputError(
                    f"{weight_name} has shape {tuple(weight.shape)} in the streamed model and "
                    f"{tuple(wanted.shape)} in {exact}; give the folder it was encoded from"
                )
            decoded = weight.to(torch.float32)
            counted = torch.eye(weight.shape[1]) if moments is None else moments(weight_name)
            for adapter in module.active_adapters:
                rank = int(module.r[adapter])
                a, b = eora(wanted, decoded, counted, rank=rank)
                module.lora_A[adapter].weight.data.copy_(a)
                module.lora_B[adapter].weight.data.copy_(b / module.scaling[adapter])


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _absent(value: Tensor) -> bool:
    return not value.is_meta and value.is_floating_point() and bool(value.isnan().any())


def _visits(streamed: StreamedModel, layers: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Chunk, weight name and adapted layer, each while the chunk's weights are in memory."""
    runtime = streamed._runtime
    runtime.flush()
    chunk_of = {n: chunk for chunk, bound in runtime.bound.items() for n in bound.parameters}
    names = {id(p): n for bound in runtime.bound.values() for n, p in bound.parameters.items()}
    by_chunk: dict[str, list[tuple[str, Any]]] = {}
    for path, module in layers.items():
        base = module.get_base_layer()
        weight_name, stored_name = weight_name_of(base, "weight", names, path)
        by_chunk.setdefault(chunk_of[stored_name], []).append((weight_name, module))
    runtime.engine.begin("forward")
    for chunk in runtime.bound:
        if chunk not in by_chunk:
            continue
        with runtime.resident(chunk, Phase.FORWARD):
            for weight_name, module in by_chunk[chunk]:
                yield chunk, weight_name, module


def _fill_magnitudes(module: Any) -> None:
    weight: Tensor = module.get_base_layer().weight
    for adapter, dora in module.lora_magnitude_vector.items():
        if not _absent(dora.weight):
            continue
        factors = module.lora_B[adapter].weight @ module.lora_A[adapter].weight
        norm = dora.get_weight_norm(weight, factors, scaling=module.scaling[adapter])
        dora.weight.data.copy_(norm)


def _exact_reader(folder: Path, streamed: StreamedModel) -> Callable[[str, str], Tensor]:
    """Reads weights of the checkpoint that a base was encoded from, one chunk in memory."""
    config = AutoConfig.from_pretrained(folder)
    kind = chosen_dtype(None, config)
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=kind)
    skeleton.tie_weights()
    if type(skeleton).__name__ != type(streamed).__name__:
        raise InputError(
            f"{folder} holds a {type(skeleton).__name__}, the base is a {type(streamed).__name__}"
        )
    checkpoint = Checkpoint(skeleton, folder, kind)
    streamed._runtime.closing.callback(checkpoint.index.close)
    layouts = {
        chunk.name: ChunkLayout.pack(
            chunk.name, [(n, p.shape, p.dtype) for n, p in chunk.parameters.items()]
        )
        for chunk in cut(skeleton)
    }
    held: dict[str, dict[str, Tensor]] = {}

    def read(chunk: str, name: str) -> Tensor:
        if chunk not in held:
            held.clear()
            held[chunk] = checkpoint.convert(layouts[chunk])
        return held[chunk][name]

    return read
