"""The folder of a zeroth-order run: what it was asked to do, and its replay log.

``run.json`` (written whole, before the first step) holds the options, a digest of the training rows
and what was measured before training; ``replay.zolog`` is the run itself (``headrace.zo.log``): one
fsynced record a step.  Base model, data and this folder rebuild everything, after a crash at any
instant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.quant.shards import write_json

from .errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from .data import Rows
    from .options import TuneOptions

RUN_NAME = "run.json"
LOG_NAME = "replay.zolog"
_KIND = "headrace zeroth-order run"


def is_zo_run(folder: Path) -> bool:
    """Whether the folder is that of a zeroth-order run."""
    return (folder / RUN_NAME).is_file()


def create_run(
    folder: Path, options: TuneOptions, rows: Rows, measured: Mapping[str, float | str | None]
) -> None:
    """Make the folder of a new run; refuses one that holds files already."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(
            f"--store {folder} holds files already; give a new folder, or go on with its run: "
            f"headrace tune --resume {folder}"
        )
    record = {
        "kind": _KIND,
        "options": options.to_json(),
        "rows": rows.digest(),
        "measured": dict(measured),
    }
    write_json(folder / RUN_NAME, record)


def check_plain(model: nn.Module, base: str, advice: str) -> None:
    """Refuse a base with encoded weights: a log is applied to weights, never to their codes."""
    from headrace.quant.model import encoded_weights

    names = list(encoded_weights(model))
    if names:
        raise InputError(
            f"{base}: {len(names)} weights are encoded, the first {names[0]!r}, and codes are "
            f"coarser than zeroth-order steps; {advice}"
        )


def read_run(folder: Path) -> dict[str, Any]:
    """Return the record of a run; a damaged or foreign one is refused."""
    path = folder / RUN_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    fields = {"options": dict, "rows": str, "measured": dict}
    if not isinstance(record, dict) or record.get("kind") != _KIND:
        raise InputError(f"{path} is not the record of a zeroth-order run")
    for name, kind in fields.items():
        if not isinstance(record.get(name), kind):
            raise InputError(f"{path}: {name!r} is missing or not {kind.__name__}")
    return record


def check_rows(record: Mapping[str, Any], rows: Rows, folder: Path) -> None:
    """Refuse to go on with other training rows."""
    if record["rows"] != rows.digest():
        raise InputError(
            f"{folder}: the run had other training rows; give the same data, split, sequence "
            f"length and tokenizer, or start a new run"
        )
