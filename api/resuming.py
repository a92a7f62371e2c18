"""``headrace.resume``: go on from the last committed step of a run's store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headrace.offload.commit import read_layout
from headrace.offload.errors import StoreError

from .loading import load


def resume(
    store: str | Path | Sequence[str | Path] | Mapping[str | Path, float], **changes: Any
) -> PreTrainedModel:
    """Open the model of a run at its last committed step; then make its optimizer again.

    ``store`` is the folder (or folders) that ``load`` was given.  ``changes`` are ``load``'s own
    options where they are to differ: other budgets, another device, another ``micro_batch``.
    Weights, optimizer states, step counters and random generators continue with the same bits
    once the optimizer of the run is made on the model (with its adapters, if it had any); learning
    rates are the scheduler's business.  Raises ``StoreError`` where nothing was committed.

    >>> import headrace
    >>> import torch
    >>> from headrace.optim import adamw
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> model = headrace.load("model-folder", train="all", store="run", device="cpu")
    >>> optimizer = adamw(model, lr=1e-3)
    >>> model(input_ids=tokens, labels=tokens).loss.backward()
    >>> optimizer.step()
    >>> model.close()
    >>> model = headrace.resume("run", device="cpu", host_budget="64MB")
    >>> optimizer = adamw(model, lr=1e-3)  # as in the run
    >>> headrace.statistics(model).steps
    1
    >>> model.close()
    """
    paths = [Path(p) for p in ([store] if isinstance(store, (str, Path)) else store)]
    for path in paths:
        layout = read_layout(path) if path.is_dir() else None
        if layout is not None:
            break
    else:
        raise StoreError(f"{paths[0]}: no run has its store there; give the folder of a run")
    meta = layout.meta
    assert isinstance(meta, dict)
    options: dict[str, Any] = {
        name: meta[name] for name in ("train", "dtype", "update", "micro_batch") if name in meta
    }
    options["durability"] = layout.durability
    options["snapshot_every"] = layout.snapshot_every
    model = changes.pop("model", meta.get("model"))
    return load(str(model), store=store, resume=True, **{**options, **changes})
