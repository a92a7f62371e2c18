"""FRUGAL: a stateful optimizer on a changing part of a matrix, signSGD on the rest."""

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
    """FRUGAL (Zmushko et al., arXiv:2411.07837): lift(N) + s * sign(G - lift(R)), times ``scale``.

    With a random ``SliceProjector`` the state-full part is ``density`` of the shorter side's
    slices, with a ``CoordinateProjector`` that share of single elements; it is drawn from the seed
    every ``gap`` steps, and its moments restart then (``reset``).  ``state_free_scale`` (s) is
    the paper's 1.0 for pre-training; 0.1 suits fine-tuning.
    """

    state_free_scale: float = 1.0
    scale: float = 1.0

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
        lifted = self.projector.up(low_step, basis, rows, cols)
        return lifted.add_(rest.mul_(self.state_free_scale)).mul_(self.scale)
