"""GaLore: an inner optimizer in the gradient's leading singular subspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .base import StepContext
from .projected import Projected


@final
@dataclass(frozen=True)
class GaLore(Projected):
    """GaLore (Zhao et al., arXiv:2403.03507): direction = scale * lift(inner(project(G))).

    State of an m x n matrix at rank r: min(m, n) r for the basis and max(m, n) r a moment.
    Deviations: moments are re-projected when the basis changes (``carry``), weight decay happens
    before the step as in AdamW, eps is added after bias correction, tensors of more than two axes
    are flattened.
    """

    scale: float = 0.25

    def combine(
        self,
        grad: Tensor,
        low_grad: Tensor,
        low_step: Tensor,
        basis: Tensor,
        states: Mapping[str, Tensor],
        context: StepContext,
    ) -> Tensor:
        rows, cols = grad.shape
        return self.projector.up(low_step, basis, rows, cols).mul_(self.scale)
