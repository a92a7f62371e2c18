"""Activation subspaces: directions whose right sides lie where a layer's inputs live (AIM-ZO).

With Q [d, k] a layer's measured input directions (``basis.Basis``), direction i of a step is
``sqrt(d / k) a_i (Q b_i)^T`` with a_i [p] and b_i [k] normal.

AIM-ZO: activation-informed subspaces for multi-query zeroth-order fine-tuning, 2026.  Deviations:
its basis follows the activations of every step, and a log would have to carry each; here the basis
is that of the base model, is kept as signed bytes, and lies in the log's header, so that replay
needs neither data nor forwards.  All of the basis is used, not a random choice of its columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from .basis import Basis
from .directions import Place
from .factored import Factored, Window, check_sizes
from .noise import Factor, Kind, noise_of_directions
from .perturb import StepUpdate


@final
@dataclass(frozen=True, slots=True)
class ActivationSubspace(Factored):
    """Rank-1 directions within measured input directions; ``measure_basis`` makes ``basis``.

    Size of a log's header: about 1.4 bytes times ``rank`` an input feature and layer (2.1 MB for
    SmolLM2-135M at rank 16).  State: fp32 [p, rank] a matrix.

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import ActivationSubspace, measure_basis
    >>> model = nn.Sequential(nn.Linear(8, 4, bias=False))
    >>> basis = measure_basis(model, [{"input": torch.eye(8)}], rank=2)
    >>> ActivationSubspace(directions=4, basis=basis).window_steps
    50
    """

    directions: int
    basis: Basis
    steps: int = 50

    def __post_init__(self) -> None:
        check_sizes(self.directions)

    def open_window(self, place: Place, seed: int) -> ActivationWindow:
        return ActivationWindow(self, place)


@final
class ActivationWindow(Window):
    """One matrix and its input directions; the same in every window."""

    def __init__(self, directions: ActivationSubspace, place: Place) -> None:
        self._count = directions.directions
        self._place = place
        self._right = directions.basis.matrix(place.name, place.shape[1])
        self._scale = float(np.float32(math.sqrt(place.shape[1] / self._right.shape[1])))
        self._left: Tensor | None = None

    @property
    def right(self) -> Tensor:
        return self._right

    @property
    def left(self) -> Tensor | None:
        return self._left

    def directions(self, seed: int) -> Tensor:
        outer, inner = self._factors(seed)
        return outer[:, :, None] * inner[:, None, :]

    def accumulate(self, update: StepUpdate) -> None:
        if self._left is None:
            self._left = torch.zeros(self._place.shape[0], self._right.shape[1])
        outer, inner = self._factors(update.seed)
        # One direction after the other: the order of a library matmul depends on its threads.
        for a, b, scale in zip(outer, inner, update.scales, strict=True):
            self._left -= (a * float(np.float32(scale)))[:, None] * b

    def _factors(self, seed: int) -> tuple[Tensor, Tensor]:
        """a [directions, p] and sqrt(d / rank) b [directions, rank]."""

        def normals(factor: Factor, count: int) -> Tensor:
            return noise_of_directions(
                Kind.GAUSSIAN,
                seed=seed,
                stream=self._place.stream ^ factor,
                directions=self._count,
                count=count,
            )

        outer = normals(Factor.LEFT, self._place.shape[0])
        return outer, normals(Factor.CORE, self._right.shape[1]).mul_(self._scale)
