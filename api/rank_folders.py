"""Whether a model is loaded as one rank of several, and where that rank keeps its store."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from headrace.offload.ranks import Ranks

from .errors import InputError


def find_ranks() -> Ranks | None:
    """The ranks of this run, or None where this process is the only one.

    Every rank must call this at the same point.
    """
    if dist.is_available() and dist.is_initialized():
        return Ranks() if dist.get_world_size() > 1 else None
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise InputError(
            f"WORLD_SIZE is {count}, but torch.distributed is not initialised, so the ranks cannot "
            f"average their gradients. Call torch.distributed.init_process_group() before "
            f"headrace.load (TrainingArguments(...) does it, if it is made first)"
        )
    return None


def rank_folder(folder: Path, ranks: Ranks | None) -> Path:
    """A rank's own part of a store's folder."""
    return folder if ranks is None else folder / f"rank-{ranks.rank}-of-{ranks.count}"


def check_mixed_precision() -> None:
    """Refuse an Accelerator's autocast, which it does not put around a model of several ranks.

    Such a model is marked as prepared, or accelerate would wrap it in DistributedDataParallel; it
    then gets no autocast either, and the run would silently be one in the weights' own type.
    """
    from accelerate.state import AcceleratorState, is_initialized

    kind = AcceleratorState().mixed_precision if is_initialized() else "no"
    if kind != "no":
        raise InputError(
            f"{kind}=True (mixed precision) has no effect with several ranks: give "
            f"headrace.load(..., dtype=...) the type to compute in instead, and leave {kind} out"
        )
