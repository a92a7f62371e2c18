"""``headrace.resume``: go on from the last committed step of a run's store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headrace.offload.commit import read_layout
from headrace.offload.errors import StoreError
from headrace.offload.ranks import Ranks

from .loading import load
from .rank_folders import find_ranks, rank_folder


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
    ranks = find_ranks()
    given = [Path(p) for p in ([store] if isinstance(store, (str, Path)) else store)]
    paths = [rank_folder(path, ranks) for path in given]
    _check_ranks(given, ranks)
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


def _check_ranks(folders: Sequence[Path], ranks: Ranks | None) -> None:
    """Refuse a store that was written by another number of ranks."""
    found = sorted(p.name for folder in folders for p in folder.glob("rank-*-of-*"))
    count = 1 if ranks is None else ranks.count
    if found and not any(name.endswith(f"-of-{count}") for name in found):
        raise StoreError(
            f"{folders[0]} was written by {found[0].rpartition('-')[2]} ranks and this run has "
            f"{count}. Start as many, or take the run over with headrace.export and "
            f"headrace.export_states there and headrace.import_states here."
        )
