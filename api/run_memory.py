"""How a tune run goes on after it was stopped: what its store remembers of it.

Every commit of the store carries the run's options, a digest of its rows, and what was measured
before training.  The step counter is the whole position in the data (``data.BatchOrder``), so
nothing else is needed to go on with the same rows; weights, states and generators come back with
the store itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from .errors import InputError
from .options import TuneOptions
from .zo_run import is_zo_run, read_run

if TYPE_CHECKING:
    from .data import Rows

# What may differ when a run goes on: where things lie, how much memory they get, what is shown.
CHANGEABLE = frozenset(
    {
        "model",
        "data",
        "eval_data",
        "out",
        "device",
        "device_budget",
        "host_budget",
        "eval_every",
        "eval_rows",
        "prompt",
        "sample_tokens",
    }
)


@final
class RunMemory:
    """What a run writes into each commit: its options and what it measured before training."""

    def __init__(self, options: TuneOptions, rows: Rows) -> None:
        self._record: dict[str, Any] = {"options": options.to_json(), "rows": rows.digest()}
        self.loss_before: float | None = None
        self.sample_before: str | None = None
        self.num_tokens = 0
        self.train_seconds = 0.0

    def capture(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the record for the next commit, and no blobs."""
        measured = {
            "loss_before": self.loss_before,
            "sample_before": self.sample_before,
            "num_tokens": self.num_tokens,
            "train_seconds": self.train_seconds,
        }
        return {"tune": {**self._record, **measured}}, {}

    def restore(self, user: Mapping[str, Any], store: Path) -> None:
        """Take over what an earlier process measured; other rows are refused."""
        record = _tune_record(user, store)
        if record["rows"] != self._record["rows"]:
            raise InputError(
                f"{store}: the run had other training rows; give the same data, split, sequence "
                f"length and tokenizer, or start a new run"
            )
        self.loss_before = record["loss_before"]
        self.sample_before = record["sample_before"]
        self.num_tokens = record["num_tokens"]
        self.train_seconds = record["train_seconds"]


def _tune_record(user: Any, store: Path) -> dict[str, Any]:
    record = user.get("tune") if isinstance(user, Mapping) else None
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise InputError(f"{store}: holds no run of headrace tune; nothing can be resumed from it")
    return record


def recorded_options(store: Path, changed: Mapping[str, Any]) -> TuneOptions:
    """Return the options to go on with a store's run, some of them changed.

    Only what cannot change the result may be changed; the rest is refused by name.
    """
    from headrace.offload.io import DiskLanes
    from headrace.offload.store import Store
    from headrace.offload.timeline import Timeline

    if not store.is_dir():
        raise InputError(f"--resume {store}: no such folder")
    fixed = sorted(name.replace("_", "-") for name in changed.keys() - CHANGEABLE)
    if fixed:
        raise InputError(f"--{fixed[0]} cannot change when a run is resumed; leave it out")
    if is_zo_run(store):
        record = read_run(store)
    else:
        with DiskLanes(timeline=Timeline()) as lanes, Store.open([store], lanes=lanes) as opened:
            user = opened.last_user
        record = _tune_record(user.get("user") if isinstance(user, Mapping) else None, store)
    known = {field.name for field in fields(TuneOptions)}
    recorded = {name: value for name, value in record["options"].items() if name in known}
    return TuneOptions(**{**recorded, "store": store, **changed, "resume": True})
