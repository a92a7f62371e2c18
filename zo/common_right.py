"""Low-rank directions with one right factor for all: LOZO's, for populations of any size.

Direction i of a step is ``A_i V^T``: A_i [p, r] is new every step, V [d, r] belongs to the window
and to all directions.  Factors are as small as one direction's, however many there are, so that a
population with directions for every example costs little beyond its base matmuls.

V is drawn anew for every window, or is a layer's strongest input directions (a ``Basis``), as in
AIM-ZO: a random direction meets ``r / d`` of a gradient's squared length on average, the inputs'
own two about half of it.

LOZO: "Enhancing zeroth-order fine-tuning for language models with low-rank structures", 2024.
Deviation: elements of a random direction have variance 1, as MeZO's have.  AIM-ZO: "Activation-
informed subspaces for multi-query zeroth-order fine-tuning", 2026.  Deviations: see ``aim``, and
directions have as many left factors as the basis has columns; they move a layer's outputs about as
far as random ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .basis import Basis
from .directions import Place
from .factored import Factored, Window, check_sizes
from .noise import Factor, Kind, noise, noise_of_directions
from .perturb import StepUpdate, apply_update


@final
@dataclass(frozen=True, slots=True)
class CommonRight(Factored):
    """Rank-``rank`` directions that share right factors; these last ``steps`` steps.

    ``basis``: measured input directions instead of random ones; weights that it lacks (GPT-2's
    transposed ones) keep random ones.  State: fp32 [p + d, rank] a matrix, nothing on disk.
    ``LowRank`` gives every direction a right factor of its own: wider windows, and work that grows
    with the square of the population.

    >>> from headrace.zo import CommonRight
    >>> CommonRight(directions=64, rank=2).window_steps
    25
    """

    directions: int
    rank: int = 2
    steps: int = 25
    kind: Kind = Kind.GAUSSIAN
    basis: Basis | None = None

    def __post_init__(self) -> None:
        check_sizes(self.directions, self.rank)
        if self.basis is not None and self.basis.rank != self.rank:
            raise ValueError(
                f"rank is {self.rank}, but the basis has {self.basis.rank} columns a layer"
            )

    def open_window(self, place: Place, seed: int) -> CommonRightWindow:
        return CommonRightWindow(self, place, seed)


@final
class CommonRightWindow(Window):
    """Factors of one matrix."""

    def __init__(self, directions: CommonRight, place: Place, seed: int) -> None:
        self._directions = directions
        self._shape = (place.shape[0], directions.rank)
        self._stream = place.stream ^ Factor.LEFT
        basis = directions.basis
        if basis is not None and place.name in basis:
            self._right = basis.matrix(place.name, place.shape[1])
        else:
            self._right = _random_right(directions, place, seed)
        self._left: Tensor | None = None

    @property
    def right(self) -> Tensor:
        return self._right

    @property
    def left(self) -> Tensor | None:
        return self._left

    def directions(self, seed: int) -> Tensor:
        made = noise_of_directions(
            self._directions.kind,
            seed=seed,
            stream=self._stream,
            directions=self._directions.directions,
            count=math.prod(self._shape),
        )
        return made.view(-1, *self._shape)

    def accumulate(self, update: StepUpdate) -> None:
        if self._left is None:
            self._left = torch.zeros(self._shape)
        apply_update(self._left, [update], kind=self._directions.kind, stream=self._stream)


def _random_right(directions: CommonRight, place: Place, seed: int) -> Tensor:
    normals = noise(
        directions.kind,
        seed=seed,
        stream=place.stream ^ Factor.RIGHT,
        direction=0,
        start=0,
        count=place.shape[1] * directions.rank,
    )
    return normals.view(place.shape[1], directions.rank) / math.sqrt(directions.rank)
