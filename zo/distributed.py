"""Several workers on one run: they share seeds and exchange losses, never weights or gradients.

Every worker holds the whole model, makes the same noise, gathers the same scalars and so computes
the same update; a step costs a few bytes a worker on any network.  ``split="directions"`` divides
the members of a step between workers (same batch everywhere); ``split="data"`` gives every worker
its own batch and averages losses.  Sums run in rank order, so results do not depend on timing.

Workers come and go by restarting the group (``torchrun`` does it): ``agree_on_log`` then gives
everyone the longest log of any worker, and ``ZOStep.resume`` brings each up to date by replay.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
import torch.distributed as dist
from torch import Tensor

from ..offload.errors import StoreFormatError
from .log import read_log
from .step import Objective, StepResult, ZOStep


@final
@dataclass(frozen=True, slots=True)
class OneByte:
    """Losses as one byte each: deviation from the worker's mean, square-root companded.

    Projected grads up to about ``largest`` in magnitude are represented; larger ones saturate
    (which clips them).  The relative error is at most 1/127 near ``largest`` and the absolute
    error near zero ``largest / 127**2``.
    """

    largest: float

    def __post_init__(self) -> None:
        if not self.largest > 0:
            raise ValueError(f"largest must be positive, got {self.largest}")

    def encode(self, losses: Sequence[float], eps: float) -> Tensor:
        """int8 codes of one worker's losses; -128 stands for a loss that is inf or NaN."""
        values = torch.tensor(losses, dtype=torch.float64)
        if not bool(torch.isfinite(values).all()):
            return torch.full(values.shape, -128, dtype=torch.int8)
        share = ((values - values.mean()) / (self.largest * eps)).clamp(-1, 1)
        return (share.sign() * share.abs().sqrt() * 127).round().to(torch.int8)

    def decode(self, codes: Tensor, eps: float) -> Tensor:
        """fp64 deviations, NaN where a loss was not finite."""
        share = codes.double() / 127
        values = share.sign() * share.square() * (self.largest * eps)
        return torch.where(codes == -128, torch.full_like(values, torch.nan), values)


@final
class DistributedStep:
    """Drives a ``ZOStep`` on every worker of a process group in lockstep.

    ``one_byte`` compresses what is exchanged under ``split="data"``; the log then holds deviations
    instead of losses.  All workers must construct it and call ``step`` together.
    """

    def __init__(
        self,
        zo: ZOStep,
        *,
        split: Literal["directions", "data"] = "directions",
        one_byte: OneByte | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if split not in ("directions", "data"):
            raise ValueError(f"split must be 'directions' or 'data', got {split!r}")
        if one_byte is not None and split != "data":
            raise ValueError("one_byte averages over workers: it goes with split='data'")
        self._zo = zo
        self._split = split
        self._one_byte = one_byte
        self._group = group
        self._check_agreement()

    def step(self, objective: Objective, *, batch: int = 0, lr: float | None = None) -> StepResult:
        """Evaluate this worker's share, exchange scalars, and take the common step."""
        members = range(len(self._zo.settings.estimator.members()))
        if self._split == "directions":
            rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
            mine = [member for member in members if member % size == rank]
            values = torch.full((len(members),), torch.nan, dtype=torch.float64)
            values[mine] = torch.tensor(self._zo.losses_of(objective, mine), dtype=torch.float64)
            parts = self._gather(values)
            losses = [float(parts[member % size][member]) for member in members]
        else:
            own = self._zo.losses_of(objective, list(members))
            losses = self._averaged(own)
        return self._zo.finish_step(losses, batch=batch, lr=lr)

    def _averaged(self, own: Sequence[float]) -> list[float]:
        eps = self._zo.settings.eps
        if self._one_byte is None:
            parts = self._gather(torch.tensor(own, dtype=torch.float64))
        else:
            codes = self._gather(self._one_byte.encode(own, eps))
            parts = [self._one_byte.decode(code, eps) for code in codes]
        total = torch.zeros(len(own), dtype=torch.float64)
        for part in parts:
            total += part
        return (total / len(parts)).tolist()

    def _gather(self, values: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, values, group=self._group)
        return parts

    def _check_agreement(self) -> None:
        """Refuse workers that would drift apart: other settings, other base, other step."""
        mine = self._zo.identity()
        lines = torch.tensor(list(mine.encode()), dtype=torch.uint8)
        if any(not torch.equal(lines, other) for other in self._gather(lines)):
            raise ValueError(
                "workers differ in settings, base weights or step; start them from the same base "
                "and call agree_on_log before ZOStep.resume"
            )


def agree_on_log(path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None) -> int:
    """Give every worker the longest log that any worker has; returns its number of records.

    0 means that nobody has one: everyone then creates its log.  A worker that was killed mid-step,
    lost its disk or never took part is brought up to date this way.  Called by all workers, each
    with its own path, while no log is open.
    """
    target = Path(path)
    count = -1
    if target.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opening the log will warn of a torn tail
            _, records = read_log(target)
        count = len(records)
    size = dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([count]), group=group)
    best = max(int(other) for other in counts)
    if best < 0:
        return 0
    source = next(rank for rank, other in enumerate(counts) if int(other) == best)
    is_source = dist.get_rank(group) == source
    data = target.read_bytes() if is_source else b""
    length = torch.tensor([len(data)], dtype=torch.int64)
    root = source if group is None else dist.get_global_rank(group, source)
    dist.broadcast(length, root, group=group)
    buffer = torch.empty(int(length), dtype=torch.uint8)
    if is_source:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, root, group=group)
    if count < best:
        _replace(target, buffer.numpy().tobytes())
    return best


def _replace(target: Path, data: bytes) -> None:
    descriptor, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_log(draft)
        os.replace(draft, target)
    except StoreFormatError as error:
        Path(draft).unlink()
        raise StoreFormatError(f"another worker sent a damaged log: {error}") from error
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
