"""Random subspaces: directions ``U Z V^T`` with orthonormal U, V fixed for a window (SubZero+).

The r x r coordinates are where the population lives and, if asked, where Adam runs: its two moments
cost 2 r^2 numbers a matrix instead of 2 p d.

SubZero: "Zeroth-order fine-tuning of LLMs in random subspaces", 2024; SubZero+ (one-sided queries
and Adam in the subspace), 2026.  Deviation: moments start anew with every window (they live in
coordinates that no longer exist), with bias correction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .directions import Place
from .factored import Factored, Window, check_sizes
from .noise import Factor, Kind, noise, noise_of_directions
from .perturb import StepUpdate


@final
@dataclass(frozen=True, slots=True)
class CoreAdam:
    """Adam on the coordinates of a subspace.

    >>> from headrace.zo import CoreAdam, RandomSubspace
    >>> RandomSubspace(directions=4, rank=8, adam=CoreAdam(beta2=0.99)).adam
    CoreAdam(beta1=0.9, beta2=0.99, eps=1e-08)
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise ValueError(f"betas must be in [0, 1) and eps positive, got {self}")


@final
@dataclass(frozen=True, slots=True)
class RandomSubspace(Factored):
    """``sqrt(p d) / r * U Z_i V^T``: U [p, r], V [d, r] Haar-orthonormal, Z_i [r, r] normal.

    ``adam=None`` is plain descent.  Matrices smaller than ``rank`` use the rank they have.

    >>> from headrace.zo import RandomSubspace, TwoPoint, ZOSettings
    >>> directions = RandomSubspace(directions=4, rank=8)
    >>> settings = ZOSettings(lr=1e-3, estimator=TwoPoint(4), directions=directions)
    >>> settings.directions.rank
    8
    """

    directions: int
    rank: int = 24
    steps: int = 50
    adam: CoreAdam | None = None

    def __post_init__(self) -> None:
        check_sizes(self.directions, self.rank)

    def open_window(self, place: Place, seed: int) -> SubspaceWindow:
        return SubspaceWindow(self, place, seed)


@final
class SubspaceWindow(Window):
    """One matrix in one random subspace."""

    def __init__(self, directions: RandomSubspace, place: Place, seed: int) -> None:
        self._place = place
        self._adam = directions.adam
        self._count = directions.directions
        rows, columns = place.shape
        self._rank = min(directions.rank, rows, columns)
        self._left_basis = _haar(rows, self._rank, seed, place.stream ^ Factor.LEFT)
        self._right = _haar(columns, self._rank, seed, place.stream ^ Factor.RIGHT)
        self._scale = math.sqrt(rows * columns) / self._rank
        self._core: Tensor | None = None
        self._moments = (torch.zeros(()), torch.zeros(()))
        self._updates = 0

    @property
    def right(self) -> Tensor:
        return self._right

    @property
    def left(self) -> Tensor | None:
        return None if self._core is None else self._lift(self._core)

    def directions(self, seed: int) -> Tensor:
        return self._lift(self._coordinates(seed) * self._scale)

    def accumulate(self, update: StepUpdate) -> None:
        total = torch.zeros(self._rank, self._rank, dtype=torch.float64)
        coordinates = self._coordinates(update.seed)
        for one, grad in zip(coordinates, update.grads, strict=True):
            total += one * (grad / len(update.grads))
        if self._core is None:
            self._core = torch.zeros(self._rank, self._rank, dtype=torch.float64)
        self._updates += 1
        if self._adam is None:
            self._core -= total * (update.lr * self._scale)
            return
        first = self._moments[0] * self._adam.beta1 + total * (1 - self._adam.beta1)
        second = self._moments[1] * self._adam.beta2 + total.square() * (1 - self._adam.beta2)
        self._moments = (first, second)
        first = first / (1 - self._adam.beta1**self._updates)
        second = second / (1 - self._adam.beta2**self._updates)
        self._core -= update.lr * (first / (second.sqrt() + self._adam.eps))

    def _coordinates(self, seed: int) -> Tensor:
        made = noise_of_directions(
            Kind.GAUSSIAN,
            seed=seed,
            stream=self._place.stream ^ Factor.CORE,
            directions=self._count,
            count=self._rank**2,
        )
        return made.view(-1, self._rank, self._rank).double()

    def _lift(self, core: Tensor) -> Tensor:
        return (self._left_basis.double() @ core).float()


def _haar(rows: int, rank: int, seed: int, stream: int) -> Tensor:
    """Orthonormal columns, uniformly distributed: QR of normals with R's diagonal positive."""
    normals = noise(
        Kind.GAUSSIAN, seed=seed, stream=stream, direction=0, start=0, count=rows * rank
    )
    basis, triangle = torch.linalg.qr(normals.view(rows, rank).double())
    return (basis * torch.sign(torch.diagonal(triangle))).float()
