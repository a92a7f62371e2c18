"""``export``: a streamed model as an ordinary Hugging Face folder, without gathering its weights.

Chunks are read one after another, LoRA adapters on top are merged into their weights, fused or
renamed tensors get their checkpoint names back, and every few chunks become one safetensors
shard.  Memory beside the budgets: the largest chunk (at least 128 MiB), three times.  The folder
appears whole or not at all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .saving import check_new_folder, written_whole

if TYPE_CHECKING:
    from .streamed_model import StreamedModel

SHARD_BYTES = 128 << 20


def export(model: nn.Module, folder: str | Path) -> None:
    """Write a streamed model, LoRA adapters merged, to a new folder that ``from_pretrained`` opens.

    ``model`` is what ``headrace.load`` returned, or PEFT's wrapper around it.  Merging adds each
    adapter's product to its weight in fp32 and rounds once, as PEFT's own merge does.

    Example: ``headrace.export(model, "tuned")``.
    """
    target = Path(folder)
    check_new_folder(target)
    with written_whole(target) as partial:
        write_model(model, partial)


def write_model(model: nn.Module, folder: Path) -> None:
    """Write config and weight shards into an empty folder."""
    from safetensors.torch import save_file

    streamed = streamed_model_of(model)
    deltas = _deltas(model)
    weight_map: dict[str, str] = {}
    written: list[Path] = []
    total_bytes = 0
    for tensors in _shards(streamed, deltas):
        path = folder / f"model-{len(written) + 1:05d}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, path.name))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        written.append(path)
    final = {path.name: _shard_name(place, len(written)) for place, path in enumerate(written)}
    for path in written:
        path.rename(folder / final[path.name])
    if len(written) > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: final[file] for name, file in sorted(weight_map.items())},
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_config(streamed, folder)


def streamed_model_of(model: nn.Module) -> StreamedModel:
    """Return the streamed model, wrappers (PEFT's and others) seen through."""
    from .streamed_model import StreamedModel

    for module in model.modules():
        if isinstance(module, StreamedModel):
            return module
    raise InputError(f"{type(model).__name__} is not streamed; open it with headrace.load")


def _shard_name(place: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{place + 1:05d}-of-{count:05d}.safetensors"


def _shards(
    streamed: StreamedModel, deltas: dict[int, list[nn.Module]]
) -> Iterator[dict[str, Tensor]]:
    """Tensors under their checkpoint names, in groups of at least ``SHARD_BYTES``."""
    from transformers.core_model_loading import revert_weight_conversion

    group: dict[str, Tensor] = {}
    bound = streamed._runtime.bound
    for chunk, tensors in streamed.chunk_tensors():
        for name, parameter in bound[chunk].parameters.items():
            for layer in deltas.get(id(parameter), []):
                tensors[name] = _merged(tensors[name], layer)
        reverted = revert_weight_conversion(streamed, tensors)  # type: ignore[arg-type]
        group.update({name: tensor.contiguous() for name, tensor in reverted.items()})
        if sum(tensor.nbytes for tensor in group.values()) >= SHARD_BYTES:
            yield group
            group = {}
    if group:
        yield group


def _deltas(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The adapted layers, by the identity of the weight that they add to."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or not isinstance(module, nn.Module):
            raise InputError(
                f"{name} carries a {type(module).__name__}; only LoRA adapters can be merged. "
                f"Save the adapter with save_pretrained instead."
            )
        variants = [a for a in module.active_adapters if a in module.lora_variant]
        if variants or any(module.lora_bias.get(a, False) for a in module.active_adapters):
            raise InputError(
                f"{name}: adapters with DoRA, a bias or another variant of LoRA cannot be merged "
                f"by streaming. Save the adapter with save_pretrained instead."
            )
        weight = module.get_base_layer().weight
        found.setdefault(id(weight), []).append(module)
    return found


@torch.no_grad()
def _merged(weight: Tensor, layer: Any) -> Tensor:
    merged = weight.to(torch.float32)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            merged += layer.get_delta_weight(adapter).to(merged)
    return merged.to(weight.dtype)


def _write_config(streamed: Any, folder: Path) -> None:
    config = copy.deepcopy(streamed.config)
    config.architectures = [type(streamed).__name__]
    config.dtype = str(streamed.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if streamed.can_generate():
        streamed.generation_config.save_pretrained(folder)
