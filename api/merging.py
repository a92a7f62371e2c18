"""``headrace export``: the adapters of a finished run merged into their base, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import InputError
from .exporting import write_model
from .preparation import load_tokenizer
from .saving import check_new_folder, written_whole


def merge_adapters(
    folder: Path,
    out: Path,
    *,
    device_budget: int | str | None = None,
    host_budget: int | str | None = None,
) -> str:
    """Write the base of an adapter folder with the adapters merged; return the base's name.

    The base is streamed on the CPU within the budgets; it is never in memory whole.
    """
    check_new_folder(out)
    base = _base_of(folder)
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer.json").is_file() else base)

    from peft import PeftModel

    from .loading import load
    from .streamed_model import StreamedModel

    model = load(
        base,
        train="none",
        device="cpu",
        device_budget=device_budget,
        host_budget=host_budget,
    )
    assert isinstance(model, StreamedModel)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        with written_whole(out) as partial:
            write_model(adapted, partial)
            tokenizer.save_pretrained(partial)
    finally:
        model.close()
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
