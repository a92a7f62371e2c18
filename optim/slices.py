"""Sparse projectors: some rows, some columns or some single elements of a gradient.

Coordinates are elements of the gradient itself (scaled, where a paper says so), so that projecting
costs no arithmetic and the basis is a few indices, or nothing where a seed gives them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from .base import Kind, Slot, StepContext, float_slot
from .projector import Projector
from .seeds import fold_in
from .spec import Shape, TensorSpec


@final
@dataclass(frozen=True)
class SliceProjector(Projector):
    """Some rows or columns of the shorter side, chosen anew at every refresh.

    ``choice="norm"`` takes those of largest norm (GRASS, arXiv:2406.17660, Top-r) and keeps their
    int32 indices; ``"random"`` draws them from the seed and keeps nothing.
    """

    rotates: ClassVar[bool] = False

    rank: int = 0
    density: float = 0.25
    choice: Literal["norm", "random"] = "norm"

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0.0 <= self.density <= 1.0:
            raise ValueError(
                f"rank={self.rank} must not be negative and density={self.density} lies in 0 .. 1"
            )

    def count(self, rows: int, cols: int) -> int:
        """Return how many slices are chosen: ``rank`` if it is given, else by ``density``."""
        short = min(rows, cols)
        return min(self.rank, short) if self.rank else max(round(self.density * short), 1)

    def low_shape(self, rows: int, cols: int) -> Shape:
        count = self.count(rows, cols)
        return (count, cols) if rows < cols else (rows, count)

    def slots(self, rows: int, cols: int) -> dict[str, Slot]:
        if self.choice == "random":
            return {}
        spec = TensorSpec((self.count(rows, cols),), torch.int32)
        return {"slices": Slot(spec, Kind.PLAIN)}

    def refresh(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> None:
        if self.choice == "random":
            return
        rows, cols = grad.shape
        norms = grad.square().sum(dim=1 if rows < cols else 0)
        # A stable sort: equal norms keep their order on every device.
        order = torch.sort(norms, descending=True, stable=True).indices
        states["slices"].copy_(order[: self.count(rows, cols)].sort().values)

    def basis(self, rows: int, cols: int, states: Mapping[str, Tensor], period: int) -> Tensor:
        if self.choice == "norm":
            return states["slices"].long()
        drawn = torch.randperm(min(rows, cols), generator=_generator(period))
        return drawn[: self.count(rows, cols)].sort().values

    def down(self, grad: Tensor, basis: Tensor) -> Tensor:
        return grad.index_select(0 if grad.shape[0] < grad.shape[1] else 1, basis)

    def up(self, low: Tensor, basis: Tensor, rows: int, cols: int) -> Tensor:
        full = low.new_zeros((rows, cols))
        return full.index_copy_(0 if rows < cols else 1, basis, low)


@final
@dataclass(frozen=True)
class MultinomialProjector(Projector):
    """Slices of the shorter side, drawn with replacement in proportion to their norms.

    GRASS (arXiv:2406.17660), Multinomial-Norm: slice j of probability q_j is scaled by
    1 / sqrt(rank q_j) on the way down and again on the way up, so that the projection of a matrix
    is the matrix in the mean.  A slice may be drawn twice; its coordinates then count twice.
    State: ``rank`` int32 indices and fp32 factors.
    """

    rotates: ClassVar[bool] = False

    rank: int = 128

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")

    def low_shape(self, rows: int, cols: int) -> Shape:
        count = min(self.rank, rows, cols)
        return (count, cols) if rows < cols else (rows, count)

    def slots(self, rows: int, cols: int) -> dict[str, Slot]:
        count = min(self.rank, rows, cols)
        indices = Slot(TensorSpec((count,), torch.int32), Kind.PLAIN)
        return {"slices": indices, "slice_factors": float_slot((count,), Kind.PLAIN)}

    def refresh(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> None:
        rows, cols = grad.shape
        norms = torch.linalg.vector_norm(grad, dim=1 if rows < cols else 0).double().cpu()
        count = states["slices"].numel()
        total = norms.sum()
        # A gradient of zeros prefers no slice.
        shares = norms / total if total > 0 else torch.full_like(norms, 1.0 / norms.numel())
        generator = _generator(fold_in(context.seed, context.step))
        points = torch.rand(count, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(shares.cumsum(0), points).clamp_(max=shares.numel() - 1)
        drawn = drawn.sort().values
        states["slices"].copy_(drawn)
        # Rounding of the running sum may hit a slice of no share: its coordinates are zero anyway.
        states["slice_factors"].copy_((count * shares[drawn]).clamp_(min=1e-12).rsqrt())

    def basis(self, rows: int, cols: int, states: Mapping[str, Tensor], period: int) -> Tensor:
        # Indices and factors in one tensor; float64 holds both exactly.
        return torch.stack((states["slices"].double(), states["slice_factors"].double()))

    def down(self, grad: Tensor, basis: Tensor) -> Tensor:
        left = grad.shape[0] < grad.shape[1]
        factors = basis[1].float()
        chosen = grad.index_select(0 if left else 1, basis[0].long())
        return chosen * (factors[:, None] if left else factors)

    def up(self, low: Tensor, basis: Tensor, rows: int, cols: int) -> Tensor:
        left = rows < cols
        factors = basis[1].float()
        full = low.new_zeros((rows, cols))
        scaled = low * (factors[:, None] if left else factors)
        return full.index_add_(0 if left else 1, basis[0].long(), scaled)


@final
@dataclass(frozen=True)
class CoordinateProjector(Projector):
    """Single elements all over the matrix, drawn anew at every refresh; no state.

    FRUGAL's random coordinates (arXiv:2411.07837).  One element is drawn out of each of
    ``density`` x elements equal runs of the flattened matrix: as many as asked for, none twice,
    without a permutation of all.
    """

    rotates: ClassVar[bool] = False

    density: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density={self.density} must lie in 0 .. 1, 0 excluded")

    def low_shape(self, rows: int, cols: int) -> Shape:
        return (max(round(self.density * rows * cols), 1),)

    def slots(self, rows: int, cols: int) -> dict[str, Slot]:
        return {}

    def refresh(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> None:
        return

    def basis(self, rows: int, cols: int, states: Mapping[str, Tensor], period: int) -> Tensor:
        (count,) = self.low_shape(rows, cols)
        starts = torch.arange(count + 1, dtype=torch.int64) * (rows * cols) // count
        lengths = starts.diff()
        uniform = torch.rand(count, generator=_generator(period), dtype=torch.float64)
        return starts[:-1] + (uniform * lengths).long().minimum(lengths - 1)

    def down(self, grad: Tensor, basis: Tensor) -> Tensor:
        return grad.reshape(-1).index_select(0, basis)

    def up(self, low: Tensor, basis: Tensor, rows: int, cols: int) -> Tensor:
        return low.new_zeros(rows * cols).index_copy_(0, basis, low).view(rows, cols)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
