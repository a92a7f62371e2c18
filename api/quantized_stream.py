"""``from_pretrained`` with a ``HeadraceConfig`` that has a store: encode to disk, then stream.

The checkpoint is encoded into the store one layer at a time, as ``headrace quantize`` does it and
with the same bytes; transformers' own loading then finds nothing left to do, and the model that it
built is streamed from the store in place.  A store whose encoding is finished, of the same
checkpoint and settings, is used as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from transformers import PreTrainedModel

from headrace.offload.activation import ParkPlace
from headrace.quant.codec import Codec
from headrace.quant.folder import INDEX_NAME, EncodedFolder
from headrace.quant.model import declare_encoded

from .budgets import default_budgets
from .checkpoint import Checkpoint
from .errors import InputError
from .loading import attach, check_complete
from .quantizing import quantize, source_of
from .rank_folders import find_ranks
from .structure import cut


@final
@dataclass(frozen=True)
class StreamOptions:
    """Where the encoded weights are, and what the stream may use."""

    folder: Path
    dtype: torch.dtype
    device: str
    device_budget: int | str | None
    host_budget: int | str | None
    micro_batch: int | None


def encode_into_store(
    model: Path,
    options: StreamOptions,
    *,
    format: str | Codec | Mapping[str, Any],
    keep: Sequence[str],
) -> None:
    """Encode the checkpoint in ``model``, or take up what an earlier run left in the folder."""
    folder, dtype = options.folder, options.dtype
    if (folder / INDEX_NAME).exists():
        found = EncodedFolder(folder).source
        wanted = source_of(model, format, keep=keep, dtype=dtype)
        if found != wanted:
            raise InputError(
                f"{folder} holds the encoding of {found}, not of {wanted}; give another store"
            )
    else:
        quantize(model, folder, format=format, keep=keep, dtype=dtype)


def attach_stream(model: PreTrainedModel, options: StreamOptions) -> None:
    """Stream the encoded weights under a model whose parameters are on meta."""
    plain: Any = model
    declare_encoded(plain, EncodedFolder(options.folder).records)
    plain.tie_weights()
    checkpoint = Checkpoint(copy.deepcopy(model), options.folder, options.dtype, converted=False)
    chunks = cut(model)
    check_complete(model, checkpoint, chunks, options.folder)
    budgets = default_budgets(
        options.device, device_budget=options.device_budget, host_budget=options.host_budget
    )
    with ExitStack() as opened:
        attach(
            model,
            chunks,
            checkpoint,
            device=torch.device(options.device),
            device_bytes=budgets.device_bytes,
            host_bytes=budgets.host_bytes,
            scratch_folder=options.folder.parent / "scratch",
            micro_batch=options.micro_batch,
            place=ParkPlace.AUTO,
            tile_bytes=budgets.device_bytes // 4,
            trainable=False,
            options=None,
            ranks=find_ranks(),
            opened=opened,
        )
        opened.pop_all()
