"""Low-rank directions with fresh left factors: LOZO's windows with EGGROLL's population.

Direction i of a step is ``A_i V_i^T / sqrt(r)``: A_i [p, r] is new every step, V_i [d, r] belongs
to the window, so that the updates of a whole window fit factors of rank N r, exactly.

LOZO: "Enhancing zeroth-order fine-tuning for language models with low-rank structures", 2024.
EGGROLL: "Evolution strategies at the hyperscale", 2025.  Deviations: each direction of a
population has a right factor of its own; elements of a direction have variance 1, as MeZO's have
(LOZO's release scales its update by 1/r only in the paper).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from .directions import Place
from .factored import Factored, Window, check_sizes
from .noise import Factor, Kind, noise, noise_of_directions
from .perturb import StepUpdate


@final
@dataclass(frozen=True, slots=True)
class LowRank(Factored):
    """Rank-``rank`` directions whose right factors last ``steps`` steps.

    State: fp32 [p + d, directions * rank] a matrix, nothing on disk.

    >>> from headrace.zo import LowRank
    >>> LowRank(directions=16, rank=1, steps=50).window_steps
    50
    """

    directions: int
    rank: int = 1
    steps: int = 50
    kind: Kind = Kind.GAUSSIAN

    def __post_init__(self) -> None:
        check_sizes(self.directions, self.rank)

    def open_window(self, place: Place, seed: int) -> LowRankWindow:
        return LowRankWindow(self, place, seed)


@final
class LowRankWindow(Window):
    """Factors of one matrix: direction i owns columns ``i * rank .. (i + 1) * rank``."""

    def __init__(self, directions: LowRank, place: Place, seed: int) -> None:
        self._directions = directions
        self._place = place
        width = directions.rank * directions.directions
        self._right = noise(
            directions.kind,
            seed=seed,
            stream=place.stream ^ Factor.RIGHT,
            direction=0,
            start=0,
            count=place.shape[1] * width,
        ).view(place.shape[1], width)
        self._left: Tensor | None = None
        self._scale = float(np.float32(1 / math.sqrt(directions.rank)))

    @property
    def right(self) -> Tensor:
        return self._right

    @property
    def left(self) -> Tensor | None:
        return self._left

    def directions(self, seed: int) -> Tensor:
        fresh = self._fresh(seed)
        count, rows, rank = fresh.shape
        whole = torch.zeros(count, rows, count, rank)
        # Direction i fills column block i, and no other.
        whole.diagonal(dim1=0, dim2=2).copy_(fresh.permute(1, 2, 0))
        return whole.view(count, rows, count * rank)

    def accumulate(self, update: StepUpdate) -> None:
        if self._left is None:
            self._left = torch.zeros(self._place.shape[0], self._right.shape[1])
        steps = self._fresh(update.seed)
        steps *= torch.tensor(np.array(update.scales, dtype=np.float32))[:, None, None]
        # [directions, p, r] to the column blocks of [p, directions * r].
        self._left -= steps.transpose(0, 1).reshape(self._left.shape)

    def _fresh(self, seed: int) -> Tensor:
        rows, rank = self._place.shape[0], self._directions.rank
        made = noise_of_directions(
            self._directions.kind,
            seed=seed,
            stream=self._place.stream ^ Factor.LEFT,
            directions=self._directions.directions,
            count=rows * rank,
        )
        return made.view(-1, rows, rank).mul_(self._scale)
