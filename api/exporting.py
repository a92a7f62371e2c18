"""``export``: a streamed model as an ordinary Hugging Face folder, without gathering its weights.

Chunks are read one after another, LoRA adapters on top are merged into their weights
(``merged_weights``), fused or renamed tensors get their checkpoint names back, and every few
chunks become one safetensors shard.  Weights that were encoded are written decoded, or encoded
again.  Memory beside the budgets: the largest chunk, decoded (at least 128 MiB), three times.
The folder appears whole or not at all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from headrace.quant.codec import Codec
from headrace.quant.fold import PendingTensor, default_choice, encode_folder
from headrace.quant.registry import codec_for_format
from headrace.quant.spec import TensorSpec

from .errors import InputError
from .merged_weights import Change, MergedTensor, merged_chunks, tensor_list
from .saving import check_new_folder, check_room, numbered_errors, written_whole
from .streamed import streamed_model_of

SHARD_BYTES = 128 << 20
#: Every weight with the codec that it had.
SAME = "same"


def export(model: nn.Module, folder: str | Path, *, format: str | Codec | None = None) -> None:
    """Write a streamed model, LoRA adapters merged, to a new folder.

    ``model`` is what ``headrace.load`` returned, or PEFT's wrapper around it.  Merging adds each
    adapter's product to its weight in fp32 and rounds once, as PEFT's own merge does.

    ``format`` None writes ordinary weights in the model's type (encoded ones decoded), which
    ``from_pretrained`` opens.  ``"same"`` encodes every weight again with the codec that it had;
    a format word or a codec encodes all linear layers with that, as ``headrace.quantize`` does
    (the merged weights are rounded again: expect the error of one more encoding).

    Example: ``headrace.export(model, "tuned")``.

    >>> import headrace
    >>> from transformers import AutoModelForCausalLM
    >>> model = headrace.load("model-folder", train="none", device="cpu")
    >>> headrace.export(model, "exported")
    >>> model.close()
    >>> AutoModelForCausalLM.from_pretrained("exported").num_parameters()
    37088
    """
    target = Path(folder)
    check_new_folder(target)
    with written_whole(target) as partial:
        write_model(model, partial, format=format)


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    format: str | Codec | None = None,
    change: Change | None = None,
) -> None:
    """Write config and weight shards into an empty folder; ``change`` as in ``merged_chunks``."""
    if format is None:
        write_shards(_checkpoint_tensors(model, change), folder)
    else:
        _write_encoded(model, folder, format)
    _write_config(streamed_model_of(model), folder)


def write_shards(chunks: Iterable[dict[str, Tensor]], folder: Path) -> None:
    """Write tensors, some at a time, as safetensors shards with an index if there are several."""
    weight_map: dict[str, str] = {}
    written: list[Path] = []
    total_bytes = 0
    for tensors in _grouped(chunks):
        path = folder / f"model-{len(written) + 1:05d}.safetensors"
        _save_shard(tensors, path)
        weight_map.update(dict.fromkeys(tensors, path.name))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        written.append(path)
    final_name = {path.name: _shard_name(place, len(written)) for place, path in enumerate(written)}
    for path in written:
        path.rename(folder / final_name[path.name])
    if len(written) > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: final_name[file] for name, file in sorted(weight_map.items())},
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    check_room(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    with numbered_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})


def _shard_name(place: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{place + 1:05d}-of-{count:05d}.safetensors"


def _grouped(chunks: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    for tensors in chunks:
        group.update({name: tensor.contiguous() for name, tensor in tensors.items()})
        if sum(tensor.nbytes for tensor in group.values()) >= SHARD_BYTES:
            yield group
            group = {}
    if group:
        yield group


def _checkpoint_tensors(model: nn.Module, change: Change | None) -> Iterator[dict[str, Tensor]]:
    """The merged tensors of each chunk under their checkpoint names."""
    from transformers.core_model_loading import revert_weight_conversion

    streamed = streamed_model_of(model)
    for _, merged in merged_chunks(model, change=change):
        tensors = {tensor.name: tensor.values() for tensor in merged}
        yield revert_weight_conversion(streamed, tensors)  # type: ignore[arg-type]


@final
class _ChunkReader:
    """Hands out the merged tensors of one chunk after another."""

    def __init__(self, model: nn.Module) -> None:
        self._chunks = merged_chunks(model)
        self._chunk: str | None = None
        self._tensors: dict[str, MergedTensor] = {}

    def read(self, chunk: str, name: str) -> Tensor:
        """One tensor; chunks are asked for in the model's order."""
        while self._chunk != chunk:
            self._tensors = {}  # before the next chunk is read, not after
            self._chunk, tensors = next(self._chunks)
            self._tensors = {tensor.name: tensor for tensor in tensors}
        return self._tensors[name].values()


def _write_encoded(model: nn.Module, folder: Path, format: str | Codec) -> None:
    listed = tensor_list(model)
    if format == SAME:
        codecs = {tensor.name: tensor.slot.codec for _, tensor in listed if tensor.slot}
        if not codecs:
            raise InputError(
                f"format {SAME!r} encodes each weight with the codec that it had, but no weight "
                f"of this model is encoded; name a format, or leave it out"
            )

        def same(name: str, spec: TensorSpec) -> Codec | None:
            return codecs.get(name)

        choose: Callable[[str, TensorSpec], Codec | None] = same
    else:
        codec = codec_for_format(format) if isinstance(format, str) else format
        choose = default_choice(codec)
    reader = _ChunkReader(model)
    pending = [
        PendingTensor(
            tensor.name, TensorSpec(tensor.shape, tensor.dtype), _read(reader, chunk, tensor.name)
        )
        for chunk, tensor in listed
    ]
    source = {
        "model": str(getattr(streamed_model_of(model).config, "_name_or_path", "")),
        "merged": "adapters",
    }
    encode_folder(pending, folder, choose=choose, source=source, on_tensor=lambda report: None)


def _read(reader: _ChunkReader, chunk: str, name: str) -> Callable[[], Tensor]:
    return lambda: reader.read(chunk, name)


def _write_config(streamed: Any, folder: Path) -> None:
    config = copy.deepcopy(streamed.config)
    config.architectures = [type(streamed).__name__]
    config.dtype = str(streamed.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if streamed.can_generate():
        streamed.generation_config.save_pretrained(folder)
