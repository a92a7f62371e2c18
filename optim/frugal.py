"""FRUGAL: a stateful optimizer on a changing part of the columns, signSGD on the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .base import StepContext
from .projected import Projected


@final
@dataclass(frozen=True)
class Frugal(Projected):
    """FRUGAL (Zmushko et al., arXiv:2411.07837): direction = lift(N) + s * sign(G - lift(R)).

    With a random ``SliceProjector`` the state-full part is ``density`` of the shorter side's
    slices, drawn from the seed every ``gap`` steps, and its moments restart then (``reset``).
    ``state_free_scale`` is the paper's 1.0 for pre-training; 0.1 suits fine-tuning.
    """

    state_free_scale: float = 1.0

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
        rest = torch.sign(grad - self.projector.up(low_grad, basis, rows, cols))
        return self.projector.up(low_step, basis, rows, cols).add_(rest.mul_(self.state_free_scale))
