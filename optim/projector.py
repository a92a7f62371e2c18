"""Projectors: linear maps of a matrix gradient to a few coordinates, and back.

The gradient's shorter side is projected (``side="std"``), so that the coordinates of an m x n
matrix at rank r are max(m, n) x r numbers.  Tensors of more axes are flattened to (first, rest).
A projector's own state is a few plain tensors, or nothing where it can be made from a seed again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from ..quant.int4_group import Int4GroupCodec
from .base import BasisChange, Kind, Slot, StepContext, float_slot
from .host.machine import multiplies_bf16
from .seeds import fold_in
from .spec import Shape

Side = Literal["std", "reverse_std", "left", "right"]
Method = Literal["svd", "randomized", "power"]


@dataclass(frozen=True)
class Projector(ABC):
    """A linear map of matrices; a frozen dataclass of its settings."""

    #: Whether coordinates of an old basis can be turned into those of a new one.
    rotates: ClassVar[bool]

    @abstractmethod
    def low_shape(self, rows: int, cols: int) -> Shape:
        """Return the shape of the coordinates of a matrix."""

    @abstractmethod
    def slots(self, rows: int, cols: int) -> dict[str, Slot]:
        """Return the projector's own states for a matrix of this shape."""

    @abstractmethod
    def refresh(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> None:
        """Choose a new basis from the gradient (rows, cols) or from the seed."""

    @abstractmethod
    def basis(self, rows: int, cols: int, states: Mapping[str, Tensor], period: int) -> Tensor:
        """Return what ``down`` and ``up`` need; ``period`` is a seed that changes at refreshes."""

    @abstractmethod
    def down(self, grad: Tensor, basis: Tensor) -> Tensor:
        """Return the coordinates of a matrix."""

    @abstractmethod
    def up(self, low: Tensor, basis: Tensor, rows: int, cols: int) -> Tensor:
        """Return the matrix that coordinates stand for."""

    def change(self, old: Tensor, new: Tensor, rows: int, cols: int) -> BasisChange:
        """Return the change of coordinates between two bases."""
        raise ValueError(
            f"{type(self).__name__} has no change of basis; use carry='keep' or carry='reset'"
        )


@dataclass(frozen=True)
class MatrixProjector(Projector):
    """Projection by a (short side, rank) matrix from the left or from the right."""

    rank: int
    side: Side = "std"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if self.side not in ("std", "reverse_std", "left", "right"):
            raise ValueError(
                f"proj_type={self.side!r} is unknown; choose 'std', 'reverse_std', 'left', 'right'"
            )

    def on_left(self, rows: int, cols: int) -> bool:
        """Whether the rows' side is the one that shrinks."""
        if self.side in ("left", "right"):
            return self.side == "left"
        return (rows < cols) == (self.side == "std")

    def extent(self, rows: int, cols: int) -> int:
        """Return the length of the side that shrinks."""
        return rows if self.on_left(rows, cols) else cols

    def used_rank(self, rows: int, cols: int) -> int:
        """Return the rank, no larger than either side."""
        return min(self.rank, rows, cols)

    def low_shape(self, rows: int, cols: int) -> Shape:
        rank = self.used_rank(rows, cols)
        return (rank, cols) if self.on_left(rows, cols) else (rows, rank)

    def down(self, grad: Tensor, basis: Tensor) -> Tensor:
        return basis.T @ grad if self.on_left(*grad.shape) else grad @ basis

    def up(self, low: Tensor, basis: Tensor, rows: int, cols: int) -> Tensor:
        return basis @ low if self.on_left(rows, cols) else low @ basis.T


@final
@dataclass(frozen=True)
class OrthogonalProjector(MatrixProjector):
    """An orthonormal basis of the gradient's leading singular subspace (GaLore's projector).

    ``method``: ``"svd"`` is exact; ``"randomized"`` starts from noise; ``"power"`` starts from the
    last basis (from noise at first) and does ``iterations`` power steps with a QR each (three
    reach 99.7 % of the optimum on a real model's gradients ten steps apart), tens of
    times cheaper.  ``int4`` keeps the basis in 4 bits (Q-GaLore), half a byte an element and a
    bf16 scale every ``int4_block`` instead of 4 bytes.  The basis is a tensor of its own, never a
    view of the whole factor.
    """

    rotates: ClassVar[bool] = True

    method: Method = "power"
    iterations: int = 3
    int4: bool = False
    int4_block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("svd", "randomized", "power"):
            raise ValueError(
                f"method={self.method!r} is unknown; choose 'svd', 'randomized' or 'power'"
            )

    def slots(self, rows: int, cols: int) -> dict[str, Slot]:
        shape = (self.extent(rows, cols), self.used_rank(rows, cols))
        if not self.int4:
            return {"projector": float_slot(shape, Kind.PLAIN)}
        parts = Int4GroupCodec(self.int4_block).spec(shape)
        return {f"projector.{part}": Slot(spec, Kind.PLAIN) for part, spec in parts.items()}

    def refresh(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> None:
        rows, cols = grad.shape
        tall = grad if self.on_left(rows, cols) else grad.T
        rank = self.used_rank(rows, cols)
        if self.method == "svd":
            found = torch.linalg.svd(tall, full_matrices=False)[0][:, :rank].contiguous()
        elif self.method == "randomized" or context.step == 1:
            found = self._from_noise(tall, rank, context)
        else:
            found = self._power(tall, self.basis(rows, cols, states, 0))
        if self.int4:
            for part, value in Int4GroupCodec(self.int4_block).encode(found.contiguous()).items():
                states[f"projector.{part}"].copy_(value)
        else:
            states["projector"].copy_(found)

    def basis(self, rows: int, cols: int, states: Mapping[str, Tensor], period: int) -> Tensor:
        if not self.int4:
            return states["projector"]
        codec = Int4GroupCodec(self.int4_block)
        shape = (self.extent(rows, cols), self.used_rank(rows, cols))
        return codec.decode(
            {part: states[f"projector.{part}"] for part in codec.spec(shape)}, shape
        )

    def change(self, old: Tensor, new: Tensor, rows: int, cols: int) -> BasisChange:
        turn = new.T @ old
        squares = turn.square()
        if self.on_left(rows, cols):
            return BasisChange(lambda x: turn @ x, lambda x: squares @ x)
        return BasisChange(lambda x: x @ turn.T, lambda x: x @ squares.T)

    def _power(self, tall: Tensor, found: Tensor) -> Tensor:
        # Products of large matrices in bf16 where the processor multiplies it, in half the time:
        # that moves the subspace by far less than the next batch does.  Orthogonal in fp32.
        half = tall.device.type == "cpu" and tall.numel() >= 1 << 18 and multiplies_bf16()
        factor = tall.to(torch.bfloat16) if half else tall
        for step in range(self.iterations):
            image = (factor @ (factor.T @ found.to(factor.dtype))).to(torch.float32)
            last = step == self.iterations - 1
            found = torch.linalg.qr(image)[0] if last else _conditioned(image)
        return found

    def _from_noise(self, tall: Tensor, rank: int, context: StepContext) -> Tensor:
        # Halko, Martinsson and Tropp (arXiv:0909.4061): oversampled, two power iterations.
        width = min(rank + 8, *tall.shape)
        seed = fold_in(context.seed, context.step)
        probe = tall @ seeded_normal((tall.shape[1], width), seed, tall.device)
        found = torch.linalg.qr(probe)[0]
        for _ in range(2):
            found = torch.linalg.qr(tall @ (tall.T @ found))[0]
        inner = torch.linalg.svd(found.T @ tall, full_matrices=False)[0]
        return (found @ inner[:, :rank]).contiguous()


def _conditioned(columns: Tensor) -> Tensor:
    """Return a well-conditioned basis of the columns' span: by Cholesky, half the price of a QR."""
    scaled = columns / columns.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(scaled.T @ scaled)
    if bool(failed):  # dependent columns, or none: QR takes them all
        return torch.linalg.qr(columns)[0]
    return torch.linalg.solve_triangular(factor.T, scaled, upper=True, left=False)


@final
@dataclass(frozen=True)
class RandomProjector(MatrixProjector):
    """Gaussian entries of variance 1/rank, made again from the seed at every step: no state."""

    rotates: ClassVar[bool] = False

    def slots(self, rows: int, cols: int) -> dict[str, Slot]:
        return {}

    def refresh(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> None:
        return

    def basis(self, rows: int, cols: int, states: Mapping[str, Tensor], period: int) -> Tensor:
        rank = self.used_rank(rows, cols)
        shape = (self.extent(rows, cols), rank)
        return seeded_normal(shape, period, torch.device("cpu")).div_(math.sqrt(rank))


def seeded_normal(shape: Shape, seed: int, device: torch.device) -> Tensor:
    """Return fp32 normals that depend on shape and seed only; drawn on the CPU for any device."""
    generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.randn(shape, generator=generator).to(device)
