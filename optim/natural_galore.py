"""Natural gradient in the projected space: an empirical Fisher matrix from the last gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .base import BasisChange, Brick, Kind, Slot, StepContext, float_slot
from .spec import Shape


@final
@dataclass(frozen=True)
class NaturalGradient(Brick):
    """Precondition by the inverse of damping * I + H H' (Natural GaLore, arXiv:2410.16029).

    H holds the last ``history`` gradients, d is the damping.  By the Woodbury identity this needs
    a history x history solve only; times d it is  g - H (I + H'H/d)^-1 H'g / d.  The result is
    rescaled to the gradient's own norm, so that learning rates keep their meaning.  State:
    ``history`` times the gradient, which the
    paper's memory table leaves out; it follows changes of the basis.
    """

    history: int = 20
    damping: float = 1e-3

    @property
    def elementwise(self) -> bool:
        return False

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {"gradient_history": float_slot((self.history, *shape), Kind.PLAIN)}

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        kept = states["gradient_history"]
        kept[(context.step - 1) % self.history].copy_(grad)
        # Rows that were never written are zero and add nothing.
        h = kept.reshape(self.history, -1)
        g = grad.reshape(-1)
        # The small system goes through its eigenvalues: gradients of any size stay solvable.
        values, vectors = torch.linalg.eigh((h @ h.T).to(torch.float64) / self.damping)
        projected = vectors.T @ (h @ g).to(torch.float64) / (1.0 + values.clamp(min=0.0))
        solved = (vectors @ projected / self.damping).to(torch.float32)
        natural = g - solved @ h
        # What is left below the rounding error of the subtraction is noise: do not blow it up.
        norm = torch.linalg.vector_norm(g)
        floor = (norm * 1e-6).clamp(min=1e-30)
        size = norm / torch.maximum(torch.linalg.vector_norm(natural), floor)
        return natural.mul_(size).reshape(grad.shape)

    def rotate(
        self, states: Mapping[str, Tensor], shape: Shape, change: BasisChange, context: StepContext
    ) -> None:
        for old in states["gradient_history"]:
            old.copy_(change.mix(old))
