"""Adapters merged into their base, layer by layer: ``headrace export`` and ``merge_and_unload``."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from headrace.quant.codec import Codec

from .closing import ClosedAfter
from .errors import InputError
from .exporting import export, write_model
from .preparation import load_tokenizer
from .saving import check_new_folder, written_whole
from .streamed import StreamedModel, streamed_model_of


def merge_and_unload(
    model: nn.Module, folder: str | Path, *, format: str | Codec | None = None
) -> PreTrainedModel:
    """Write a streamed model with its adapters merged, and open the result in its place.

    What ``peft_model.merge_and_unload()`` does in memory, by streaming: the merged weights are
    written to the new ``folder`` (see ``export`` for ``format``), ``model`` is closed, and the
    folder is opened with the same device, budgets and micro-batch, without adapters.

    >>> import headrace
    >>> from peft import LoraConfig, get_peft_model
    >>> base = headrace.load("model-folder", train="adapters", device="cpu")
    >>> tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    >>> merged = headrace.merge_and_unload(tuned, "merged")
    >>> any("lora" in name for name, _ in merged.named_parameters())
    False
    >>> merged.close()
    """
    from .loading import load

    streamed = streamed_model_of(model)
    runtime = streamed._runtime
    export(model, folder, format=format)
    streamed.close()
    return load(
        Path(folder).absolute(),
        train="none",
        device=runtime.device,
        device_budget=runtime.device_budget.limit_bytes,
        host_budget=runtime.host_budget.limit_bytes,
        micro_batch=runtime.micro_batch,
    )


def merge_adapters(
    folder: Path,
    out: Path,
    *,
    device_budget: int | str | None = None,
    host_budget: int | str | None = None,
    format: str | Codec | None = None,
) -> str:
    """Write the base of an adapter folder with the adapters merged; return the base's name.

    The base is streamed on the CPU within the budgets; it is never in memory whole.  ``format``
    is as in ``export``: ordinary weights, the codecs that the base has, or others.
    """
    check_new_folder(out)
    base = _base_of(folder)
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer.json").is_file() else base)

    from peft import PeftModel

    from .loading import load

    model = load(
        base,
        train="none",
        device="cpu",
        device_budget=device_budget,
        host_budget=host_budget,
    )
    assert isinstance(model, StreamedModel)
    with ClosedAfter(model.close):
        adapted = PeftModel.from_pretrained(model, str(folder))
        with written_whole(out) as partial:
            write_model(adapted, partial, format=format)
            tokenizer.save_pretrained(partial)
    return base


def _base_of(folder: Path) -> str:
    path = folder / "adapter_config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a folder with adapters"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    base = record.get("base_model_name_or_path") if isinstance(record, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: names no base model")
    return base
