"""LoRAM: train adapters on a structurally pruned base, use them on the whole one.

``prune`` drops MLP channels and attention heads of every decoder layer and writes what is left as
an ordinary model folder, one layer in memory at a time.  Adapters trained on it are small-model
training: a fraction of the bytes from disk and of the arithmetic.  ``recover`` gives their
factors the whole model's shapes, with zeros for what was dropped, so that they add exactly what
they learnt to the weights that were kept.  Zhang et al., 2025 (LoRAM-Stru); without the paper's
alignment pre-training, which is a ``headrace tune --method full`` of the pruned folder.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from .closing import ClosedAfter
from .errors import InputError
from .exporting import write_shards
from .loading import find_folder, load
from .saving import check_new_folder, written_whole
from .streamed import StreamedModel
from .structure import decoder_layers

KEPT_NAME: Final = "kept.json"
_CHANNELS = frozenset({"gate_proj", "up_proj", "down_proj"})
_HEADS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_INPUT_SIDE = frozenset({"down_proj", "o_proj"})  # what is dropped lies along their inputs


@final
@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that pruning changes, of one model."""

    channels: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read them from a model's configuration."""
        try:
            heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
            return cls(
                channels=int(config.intermediate_size),
                heads=heads,
                kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
                head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
            )
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"a {type(config).__name__} does not say its sizes as Llama does ({error}); "
                f"pruning supports layers with {sorted(_CHANNELS | _HEADS)}"
            ) from error

    def pruned(self, keep: float) -> Geometry:
        """Return the sizes when about the share ``keep`` stays: channels in eights, whole heads."""
        channels = min(self.channels, max(8, round(self.channels * keep / 8) * 8))
        kv_heads = max(1, round(self.kv_heads * keep))
        return Geometry(channels, kv_heads * self.heads // self.kv_heads, kv_heads, self.head_dim)


def prune(
    model: str | Path,
    out: str | Path,
    *,
    keep: float = 0.5,
    device_budget: int | str | None = None,
    host_budget: int | str | None = None,
) -> None:
    """Write a smaller model: in each layer the MLP channels and heads with the largest weights.

    ``keep`` is the share that stays, of channels and of groups of heads that share a key head.
    A channel counts by the product of the norms of its three vectors, a group by those of its
    values and outputs.  Streams the model once on the CPU.  What was kept is in ``kept.json``.

    >>> import headrace
    >>> from transformers import AutoConfig
    >>> headrace.prune("model-folder", "half-folder", keep=0.5)
    >>> whole, half = (AutoConfig.from_pretrained(f) for f in ("model-folder", "half-folder"))
    >>> half.intermediate_size / whole.intermediate_size
    0.5
    """
    if not 0.0 < keep <= 1.0:
        raise InputError(f"keep is {keep:g}; give more than 0, at most 1")
    target = Path(out)
    check_new_folder(target)
    folder = find_folder(model)
    streamed = load(
        folder, train="none", device="cpu", device_budget=device_budget, host_budget=host_budget
    )
    assert isinstance(streamed, StreamedModel)
    with ClosedAfter(streamed.close):
        whole = Geometry.of(streamed.config)
        left = whole.pruned(keep)
        _check_prunable(streamed)
        kept: dict[str, list[int]] = {}
        with written_whole(target) as partial:
            write_shards(_pruned_chunks(streamed, whole, left, kept), partial)
            config = copy.deepcopy(streamed.config)
            config.intermediate_size = left.channels
            config.num_attention_heads = left.heads
            config.num_key_value_heads = left.kv_heads
            config.head_dim = left.head_dim
            config.architectures = [type(streamed).__name__]
            config.save_pretrained(partial)
            if streamed.can_generate():
                streamed.generation_config.save_pretrained(partial)
            _copy_tokenizer(folder, partial)
            record = {"base": str(folder.absolute()), "keep": keep, "kept": kept}
            (partial / KEPT_NAME).write_text(json.dumps(record) + "\n", encoding="utf-8")


def recover(adapters: str | Path, out: str | Path) -> None:
    """Write adapters that were trained on a pruned base as adapters of the whole base.

    Rows and columns that the pruned base does not have are zero.  Only plain LoRA (rsLoRA too):
    a DoRA magnitude of a pruned weight is not one of the whole weight.

    >>> import headrace
    >>> from peft import LoraConfig, get_peft_model
    >>> headrace.prune("model-folder", "small-folder", keep=0.5)
    >>> base = headrace.load("small-folder", train="adapters", device="cpu")
    >>> tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj"]))
    >>> factors = {n: p.detach() for n, p in tuned.named_parameters() if p.requires_grad}
    >>> tuned.save_pretrained("small-tuned", state_dict=factors, save_embedding_layers=False)
    >>> base.close()
    >>> headrace.recover("small-tuned", "whole-tuned")
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    source, target = Path(adapters), Path(out)
    check_new_folder(target)
    settings = _read_json(source / "adapter_config.json")
    pruned = Path(str(settings.get("base_model_name_or_path")))
    if not (pruned / KEPT_NAME).is_file():
        raise InputError(
            f"{source} belongs to the base {pruned}, which holds no {KEPT_NAME}: it was not made "
            f"by headrace prune, and there is nothing to recover"
        )
    base, kept = _read_kept(pruned / KEPT_NAME)
    whole = Geometry.of(AutoConfig.from_pretrained(find_folder(base)))
    found = load_file(source / "adapter_model.safetensors")
    recovered = {name: _recovered(name, value, kept, whole) for name, value in found.items()}
    with written_whole(target) as partial:
        save_file(recovered, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        settings["base_model_name_or_path"] = base
        (partial / "adapter_config.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )
        _copy_tokenizer(source, partial)


def _check_prunable(streamed: StreamedModel) -> None:
    for name, layer in decoder_layers(streamed).items():  # type: ignore[arg-type]
        leaves = {
            path.split(".")[-2]
            for path, parameter in layer.named_parameters()
            if parameter.dim() >= 2 or path.endswith(".bias")
        }
        unknown = leaves - _CHANNELS - _HEADS
        if unknown or not (_CHANNELS | _HEADS) <= leaves:
            raise InputError(
                f"{name} has the matrices {sorted(leaves)}; pruning supports layers with exactly "
                f"{sorted(_CHANNELS | _HEADS)}"
            )


def _pruned_chunks(
    streamed: StreamedModel, whole: Geometry, left: Geometry, kept: dict[str, list[int]]
) -> Iterator[dict[str, Tensor]]:
    for _, tensors in streamed.chunk_tensors():
        owners = {name.rpartition(".")[0].rpartition(".")[0] for name in tensors}
        for owner in sorted(owners):
            norms = {
                leaf: _norms(leaf, tensors[f"{owner}.{leaf}.weight"], whole)
                for leaf in _CHANNELS | _HEADS
                if f"{owner}.{leaf}.weight" in tensors
            }
            if "down_proj" in norms:
                importance = norms["gate_proj"] * norms["up_proj"] * norms["down_proj"]
                kept[owner] = _largest(importance, left.channels)
            elif "o_proj" in norms:
                kept[owner] = _largest(norms["v_proj"] * norms["o_proj"], left.kv_heads)
        yield {name: _kept_part(name, value, kept, whole) for name, value in tensors.items()}


def _norms(leaf: str, weight: Tensor, whole: Geometry) -> Tensor:
    """The norm of each channel's, or each group of heads', part of a matrix."""
    along = weight.to(torch.float32)
    along = along.t() if leaf in _INPUT_SIDE else along
    count = whole.channels if leaf in _CHANNELS else whole.kv_heads
    return along.reshape(count, -1).norm(dim=1)


def _largest(importance: Tensor, count: int) -> list[int]:
    order = torch.argsort(importance, descending=True, stable=True)[:count]
    return sorted(int(index) for index in order)


def _rows(name: str, kept: dict[str, list[int]], whole: Geometry) -> Tensor | None:
    """Which indices of the whole stay, along the pruned side of a module; None: all of them."""
    owner, _, leaf = name.rpartition(".")
    indices = kept.get(owner)
    if indices is None or leaf not in _CHANNELS | _HEADS:
        return None
    chosen = torch.tensor(indices, dtype=torch.long)
    if leaf in _CHANNELS:
        return chosen
    # Heads that share a key head lie together.
    per_group = whole.head_dim
    if leaf in ("q_proj", "o_proj"):
        per_group *= whole.heads // whole.kv_heads
    return (chosen[:, None] * per_group + torch.arange(per_group)).reshape(-1)


def _kept_part(name: str, value: Tensor, kept: dict[str, list[int]], whole: Geometry) -> Tensor:
    module, _, what = name.rpartition(".")
    rows = _rows(module, kept, whole)
    if rows is None:
        return value
    if module.rpartition(".")[2] in _INPUT_SIDE:
        return value if what == "bias" else value[:, rows]
    return value[rows]


def _recovered(name: str, value: Tensor, kept: dict[str, list[int]], whole: Geometry) -> Tensor:
    path = name.removeprefix("base_model.model.")
    module, _, rest = path.partition(".lora_")
    if rest not in ("A.weight", "B.weight"):
        raise InputError(f"{name}: only plain LoRA factors can be recovered, of linear layers")
    leaf = module.rpartition(".")[2]
    owner = module.rpartition(".")[0]
    if leaf in _CHANNELS | _HEADS and owner not in kept:
        raise InputError(f"{name}: {KEPT_NAME} of the pruned base does not say what {owner} kept")
    rows = _rows(module, kept, whole)
    on_input = module.rpartition(".")[2] in _INPUT_SIDE
    if rows is None or on_input != (rest == "A.weight"):
        return value
    if leaf in _CHANNELS:
        size = whole.channels
    else:
        size = whole.head_dim * (whole.heads if leaf in ("q_proj", "o_proj") else whole.kv_heads)
    if rows.numel() != value.shape[1 if on_input else 0] or int(rows.max()) >= size:
        raise InputError(
            f"{name} has shape {tuple(value.shape)}, but {KEPT_NAME} says that {rows.numel()} of "
            f"{size} stayed: the adapter, the pruned folder and its base do not belong together"
        )
    if on_input:
        filled = value.new_zeros(value.shape[0], size)
        filled[:, rows] = value
    else:
        filled = value.new_zeros(size, value.shape[1])
        filled[rows] = value
    return filled


def _copy_tokenizer(folder: Path, target: Path) -> None:
    others = {"config.json", "generation_config.json", "adapter_config.json", KEPT_NAME}
    for path in sorted(folder.iterdir()):
        usual = path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja")
        if usual and path.name not in others and not path.name.endswith(".index.json"):
            shutil.copy2(path, target / path.name)


def _read_kept(path: Path) -> tuple[str, dict[str, list[int]]]:
    """Return the base that was pruned, and what stayed of each of its modules."""
    record = _read_json(path)
    base, kept = record.get("base"), record.get("kept")
    rows = list(kept.values()) if isinstance(kept, dict) else [None]
    if not isinstance(base, str) or not all(
        isinstance(row, list) and row and all(type(i) is int and i >= 0 for i in row)
        for row in rows
    ):
        raise InputError(f"{path}: is damaged; headrace prune writes it: prune the base again")
    return base, kept or {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: is not a JSON object")
    return record
