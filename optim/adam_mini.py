"""Adam-mini: one second moment for a whole block of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .base import Brick, Kind, Slot, StepContext, float_slot
from .spec import Shape


@final
@dataclass(frozen=True)
class AdamMini(Brick):
    """Adam-mini (Zhang et al., arXiv:2406.16793); a little over 4 bytes a parameter in fp32.

    A block is ``rows_per_block`` rows of the first axis: 1 is one output neuron, one token of an
    embedding; the head size gives the paper's query and key blocks.  Tensors with fewer than two
    axes are one block.  Roles are the caller's knowledge, never guessed from names.
    """

    rows_per_block: int = 1

    @property
    def elementwise(self) -> bool:
        return False

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        return {
            "exp_avg": float_slot(shape, Kind.SIGNED),
            "exp_avg_sq": float_slot((self._blocks(shape),), Kind.PLAIN),
        }

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        b1, b2 = context.betas()
        step, shape = context.step, tuple(grad.shape)
        m, v = states["exp_avg"], states["exp_avg_sq"]
        m.lerp_(grad, 1.0 - b1)
        mean_square = grad.square_().reshape(self._blocks(shape), -1).mean(dim=1)
        v.lerp_(mean_square, 1.0 - b2)
        denominator = (v / (1.0 - b2**step)).sqrt_().add_(context.number("eps"))
        unbiased = (m / (1.0 - b1**step)).reshape(v.numel(), -1)
        return unbiased.div_(denominator[:, None]).view(shape)

    def _blocks(self, shape: Shape) -> int:
        if len(shape) < 2 or shape[0] == 0:
            return 1
        if shape[0] % self.rows_per_block:
            raise ValueError(
                f"rows_per_block={self.rows_per_block} does not divide the {shape[0]} rows of a "
                f"parameter of shape {shape}; choose a divisor, or 1"
            )
        return shape[0] // self.rows_per_block
