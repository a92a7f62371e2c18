"""LoQT: train all of a quantised model through low-rank factors that are merged now and then.

Loeschcke et al., 2024.  Every adapted matrix is W + P B: W stays encoded on disk, P (out, rank)
is the range of the loss's gradient with respect to W and stays fixed, B (rank, in) is trained and
starts at zero.  ``start`` measures the gradients in one streamed pass and sets P; after some steps
``merge`` writes a new encoded base with P B in it and opens that, and the next round starts.  The
paper's gaps between merges grow: ``merge_steps``.

The factors are those of PEFT's LoRA: P is ``lora_B`` (frozen), B is ``lora_A``.  Deviations from
the paper: the range of the gradient is found by a random sketch (Halko et al., 2011), so that the
gradient itself is never formed; P is kept in fp32 rather than NF4; a merge rounds to nearest, the
paper's alternating correction of the rounding error is ``headrace.correct_adapters``'s business.
Memory beside the budgets: rank + 16 columns of each adapted matrix, twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InputError
from .exporting import SAME
from .merging import merge_and_unload

_MORE_COLUMNS = 16  # of the sketch, beyond the rank


def start(model: nn.Module, batch: Mapping[str, Tensor], *, seed: int = 0) -> None:
    """Set the fixed factors of LoRA adapters over a streamed base to the gradient's range.

    ``model`` is PEFT's model; ``batch`` what its forward takes, labels included.  One forward and
    one backward pass.  Afterwards ``lora_B`` is frozen with orthonormal columns and ``lora_A`` is
    zero, so that the model computes what its base computes.

    Example::

        tuned = peft.get_peft_model(headrace.load("model-nf4"), config)
        headrace.loqt.start(tuned, batch)
    """
    layers = dict(_plain_layers(model))
    for name, layer in layers.items():
        largest = min(layer.in_features, layer.out_features)
        if _rank(layer) > largest:
            raise InputError(
                f"{name}: the rank {_rank(layer)} is above {largest}, the most that its matrix "
                f"can have; give it less (rank_pattern=), or leave it out"
            )
    sketches: dict[str, Tensor] = {}
    mixes: dict[str, Tensor] = {}
    for place, (name, layer) in enumerate(layers.items()):
        columns = min(_rank(layer) + _MORE_COLUMNS, layer.in_features, layer.out_features)
        generator = torch.Generator().manual_seed(seed + place)
        mix = torch.randn(layer.in_features, columns, generator=generator)
        factor = layer.lora_A[layer.active_adapters[0]].weight
        mixes[name] = mix.to(factor.device, torch.float32)
        sketches[name] = torch.zeros(layer.out_features, columns, device=factor.device)
    handles = [
        layer.register_forward_hook(_listener(sketches[name], mixes[name]))
        for name, layer in layers.items()
    ]
    try:
        loss = model(**batch).loss
        if loss is None:
            raise InputError("the batch gives no loss to take a gradient of; give it 'labels'")
        loss.backward()
        value = float(loss.detach())
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
    for name, sketch in sketches.items():
        if not bool(torch.isfinite(sketch).all()) or not bool(sketch.any()):
            raise InputError(
                f"{name}: its gradient is zero, or not finite (the loss is {value:g}); give "
                f"a batch with labels to learn from, and adapt only layers that it goes through"
            )
    with torch.no_grad():
        for name, layer in layers.items():
            adapter = layer.active_adapters[0]
            left, _, _ = torch.linalg.svd(sketches[name], full_matrices=False)
            fixed, trained = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
            fixed.copy_(left[:, : _rank(layer)])
            fixed.requires_grad_(False)
            trained.zero_()


def merge(model: nn.Module, folder: str | Path) -> PreTrainedModel:
    """Write the base with the factors merged, each matrix in its codec, and open that.

    ``model`` is closed.  Put fresh adapters on what comes back and call ``start`` again.
    """
    return merge_and_unload(model, folder, format=SAME)


def merge_steps(steps: int, *, first: int = 100, growth: float = 1.2) -> list[int]:
    """Return after which steps to merge: gaps of ``first``, then each ``growth`` times longer.

    >>> merge_steps(500)
    [100, 220, 364]
    """
    if first < 1 or not 1.0 <= growth < math.inf:
        raise InputError(f"gaps begin at {first} and grow by {growth}; give 1 or more for both")
    found: list[int] = []
    gap, at = float(first), float(first)
    while round(at) < steps:
        found.append(round(at))
        gap *= growth
        at += gap
    return found


def _plain_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    found = False
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        if len(layer.active_adapters) != 1 or layer.lora_variant or not layer.lora_A:
            raise InputError(
                f"{name}: LoQT trains one plain LoRA adapter over a linear layer; it has "
                f"{layer.active_adapters} with variants {sorted(layer.lora_variant)}"
            )
        found = True
        yield name, layer
    if not found:
        raise InputError("the model has no LoRA layers; wrap it with peft.get_peft_model first")


def _rank(layer: Any) -> int:
    return int(layer.r[layer.active_adapters[0]])


def _listener(sketch: Tensor, mix: Tensor) -> Any:
    """A forward hook that adds (gradient of the weight) x mix to the sketch during backward."""

    def listen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return  # the visit without a graph; the recomputation comes later
        rows = inputs[0].detach()

        def add(gradient: Tensor) -> None:
            mixed = rows.reshape(-1, rows.shape[-1]).to(torch.float32) @ mix
            flat = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
            sketch.addmm_(flat.t(), mixed)

        output.register_hook(add)

    return listen
