"""What all projected optimizers share: when the basis changes and what becomes of the moments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from .base import Brick, Kind, Slot, StepContext, count_slot, float_slot
from .projector import MatrixProjector, Projector
from .seeds import fold_in
from .spec import Shape

Carry = Literal["keep", "reset", "re-project"]


@final
@dataclass(frozen=True)
class LazyRefresh:
    """Refresh less often where the subspace stays (Q-GaLore, arXiv:2407.08296, section 3.2).

    Whenever the mean overlap of the last ``queue`` bases with their predecessors reaches
    ``threshold``, the gap of this matrix grows ``growth`` times.  The overlap is that of the
    subspaces, |Qold' Qnew|^2 / rank, in 0 .. 1; the paper's cosine of first singular vectors
    depends on their arbitrary signs.
    """

    threshold: float = 0.4
    queue: int = 5
    growth: float = 2.0

    def __post_init__(self) -> None:
        if self.queue < 1 or not self.growth >= 1.0:
            raise ValueError(
                f"queue_size={self.queue} and gamma_proj={self.growth} must be at least 1"
            )


@dataclass(frozen=True)
class Projected(Brick):
    """An inner brick that runs on a matrix gradient's coordinates in a changing basis.

    The basis changes every ``gap`` steps (first at step 1).  ``carry`` says what happens to the
    inner moments then: ``"keep"`` their numbers (as the first GaLore did, though they belong to
    the old basis), ``"reset"`` them with their bias correction, or ``"re-project"`` them.
    """

    inner: Brick
    projector: Projector
    gap: int = 200
    carry: Carry = "re-project"
    lazy: LazyRefresh | None = None

    def __post_init__(self) -> None:
        if self.gap < 1:
            raise ValueError(f"update_proj_gap={self.gap} must be at least 1")
        if self.carry not in ("keep", "reset", "re-project"):
            raise ValueError(
                f"carry={self.carry!r} is unknown; choose 'keep', 'reset' or 're-project'"
            )
        if self.carry == "re-project" and not self.projector.rotates:
            raise ValueError(
                f"{type(self.projector).__name__} has no change of basis: moments cannot be "
                f"re-projected; use carry='keep' or carry='reset'"
            )
        if self.lazy is not None and not self.projector.rotates:
            raise ValueError(f"{type(self.projector).__name__} has no subspace to be lazy about")

    @abstractmethod
    def combine(
        self,
        grad: Tensor,
        low_grad: Tensor,
        low_step: Tensor,
        basis: Tensor,
        states: Mapping[str, Tensor],
        context: StepContext,
    ) -> Tensor:
        """Return the direction (rows, cols) from the gradient and the inner brick's direction."""

    def extra_slots(self) -> dict[str, Slot]:
        """Return states beside those of the projector and the inner brick."""
        return {}

    @property
    def elementwise(self) -> bool:
        return False

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        rows, cols = as_matrix(shape)
        slots = self.inner.init_spec(self.projector.low_shape(rows, cols))
        slots |= self.projector.slots(rows, cols) | self.extra_slots()
        if self.lazy is not None:
            slots["refresh_gap"] = count_slot()
            slots["refresh_at"] = count_slot()
            slots["refreshes"] = count_slot()
            slots["overlaps"] = float_slot((self.lazy.queue,), Kind.PLAIN)
        if self.carry == "reset":
            slots["restarted_at"] = count_slot()
        return slots

    def init(self, states: Mapping[str, Tensor]) -> None:
        self.inner.init(states)
        if self.lazy is not None:
            states["refresh_gap"].fill_(self.gap)

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        rows, cols = as_matrix(tuple(grad.shape))
        matrix = grad.reshape(rows, cols)
        if self.due(states, context):
            self.refresh(matrix, states, context)
        basis = self.current_basis(rows, cols, states, context)
        low_grad = self.projector.down(matrix, basis)
        inner_context = context
        if self.carry == "reset":
            inner_context = context.at_step(context.step - int(states["restarted_at"]))
        low_step = self.inner.update(low_grad.clone(), states, inner_context)
        direction = self.combine(matrix, low_grad, low_step, basis, states, inner_context)
        return direction.reshape(grad.shape)

    # -- the changing basis --------------------------------------------------------------------

    def due(self, states: Mapping[str, Tensor], context: StepContext) -> bool:
        """Whether the basis changes at this step."""
        if self.lazy is None:
            return (context.step - 1) % self.gap == 0
        return context.step - 1 >= int(states["refresh_at"])

    def current_basis(
        self, rows: int, cols: int, states: Mapping[str, Tensor], context: StepContext
    ) -> Tensor:
        """Return what the projector's ``down`` and ``up`` need at this step."""
        period = fold_in(context.seed, (context.step - 1) // self.gap)
        return self.projector.basis(rows, cols, states, period).to(context.weight.device)

    def refresh(self, matrix: Tensor, states: Mapping[str, Tensor], context: StepContext) -> None:
        """Change the basis for a gradient (rows, cols); carry the inner moments over."""
        rows, cols = matrix.shape
        first = context.step == 1
        low_shape = self.projector.low_shape(rows, cols)
        old = None
        if not first and self.projector.rotates:
            old = self.current_basis(rows, cols, states, context).clone()
        self.projector.refresh(matrix, states, context)
        if old is not None:
            new = self.current_basis(rows, cols, states, context)
            if self.carry == "re-project":
                change = self.projector.change(old, new, rows, cols)
                self.inner.rotate(states, low_shape, change, context)
            if self.lazy is not None:
                self._grow_gap(self.lazy, old, new, states)
        if not first and self.carry == "reset":
            for name in self.inner.init_spec(low_shape):
                states[name].zero_()
            self.inner.init(states)
            states["restarted_at"].fill_(context.step - 1)
        if self.lazy is not None:
            states["refresh_at"].fill_(context.step - 1 + int(states["refresh_gap"]))

    @staticmethod
    def _grow_gap(
        lazy: LazyRefresh, old: Tensor, new: Tensor, states: Mapping[str, Tensor]
    ) -> None:
        overlap = (old.T @ new).square().sum() / old.shape[1]
        count = int(states["refreshes"])
        states["overlaps"][count % lazy.queue] = overlap
        states["refreshes"] += 1
        if count + 1 >= lazy.queue and bool(states["overlaps"].mean() >= lazy.threshold):
            states["refresh_gap"].fill_(round(int(states["refresh_gap"]) * lazy.growth))


def as_matrix(shape: Shape) -> tuple[int, int]:
    """Return the rows and columns of a tensor flattened behind its first axis.

    >>> as_matrix((4, 3, 3))
    (4, 9)
    """
    if len(shape) < 2:
        raise ValueError(
            f"a projected optimizer needs matrices, got a parameter of shape {shape}; give it to "
            f"another rule (recipes do so by themselves)"
        )
    rest = 1
    for extent in shape[1:]:
        rest *= extent
    return shape[0], rest


def channel_ratio(
    low_step: Tensor, low_grad: Tensor, projector: Projector, rows: int, cols: int
) -> Tensor:
    """Return |step| / |gradient| for every slice of the long side, shaped to scale (rows, cols)."""
    left = projector.on_left(rows, cols) if isinstance(projector, MatrixProjector) else rows < cols
    axis = 0 if left else 1
    ratio = torch.linalg.vector_norm(low_step, dim=axis, keepdim=True)
    return ratio.div_(torch.linalg.vector_norm(low_grad, dim=axis, keepdim=True).add_(1e-8))


def uncorrected(context: StepContext) -> float:
    """Return what Adam's bias corrections divide a direction's size by.

    The norm-growth limiters of Fira and APOLLO look at directions before bias correction.
    """
    betas: Any = context.hyper["betas"]
    b1, b2 = float(betas[0]), float(betas[1])
    return float((1.0 - b1**context.step) / (1.0 - b2**context.step) ** 0.5)
