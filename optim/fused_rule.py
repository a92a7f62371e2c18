"""A brick's update rule by the fastest path that a tensor's device has.

On the CPU the host kernel, where there is one; on CUDA the device kernel, one launch for a
parameter; else, and on other devices, the bricks.  All give the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from .adam import Adam
from .adamw import AdamW
from .base import BasisChange, Brick
from .brick_rule import BrickRule
from .device.launch import fused_update, has_kernel, triton_is_installed
from .encoded_adamw import EncodedRule, is_fused
from .lion import Lion
from .masters import MasterName, check_master
from .spec import Shape, StateSpec
from .storage import encoding_of
from .streamed import UpdateRule


@final
class FusedRule:
    """Update rule of a brick, fused where it can be.

    ``required`` refuses to run the bricks where a kernel is missing; otherwise a missing Triton
    is warned of.  Scratch of the kernels: none beyond the chip; of the bricks: about five fp32
    copies of the parameter.

    >>> FusedRule(Adam(), "int8", master="split").granule
    128
    """

    def __init__(
        self, brick: Brick, states: str, *, master: str = "fp32", required: bool = False
    ) -> None:
        self._brick = brick
        self._states = states
        self._master: MasterName = check_master(master)
        self._required = required
        self._bricks = BrickRule(brick, encoding_of(states), master=master)
        self._host = _host_rule(brick, states, master)
        self._on_device = has_kernel(brick, states)
        if required and self._host is None and not self._on_device:
            raise ValueError(
                f"fused=True: {type(brick).__name__} with states={states!r} has no fused kernel "
                f"on any device; leave fused=None to run it as plain torch operations"
            )

    @property
    def elementwise(self) -> bool:
        """Whether ranges of a parameter may be updated apart from each other."""
        return self._bricks.elementwise

    @property
    def granule(self) -> int:
        """Ranges start and end at multiples of this many elements."""
        return self._bricks.granule

    def state_spec(self, shape: Shape, dtype: torch.dtype) -> StateSpec:
        """Return name -> spec of the states of a parameter or range of this shape."""
        return self._bricks.state_spec(shape, dtype)

    def init_states(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fill freshly zeroed states in place from the initial weight."""
        self._bricks.init_states(weight, states)

    def rotate(
        self,
        states: Mapping[str, Tensor],
        shape: Shape,
        change: BasisChange,
        *,
        step: int,
        hyper: Mapping[str, Any],
        seed: int,
    ) -> None:
        """Carry the states of coordinates of this shape into a new basis, before step ``step``."""
        self._bricks.rotate(states, shape, change, step=step, hyper=hyper, seed=seed)

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        states: Mapping[str, Tensor],
        *,
        step: int,
        hyper: Mapping[str, Any],
        seed: int,
        element_offset: int,
    ) -> None:
        """Do one step in place on contiguous tensors."""
        device = weight.device.type
        if device == "cuda" and self._on_device and self._triton():
            fused_update(
                self._brick, self._states, self._master, weight, grad, states, step=step,
                hyper=hyper, seed=seed, element_offset=element_offset,
            )  # fmt: skip
            return
        rule: UpdateRule = self._bricks
        if device == "cpu" and self._host is not None:
            rule = self._host
        elif self._required:
            raise ValueError(
                f"fused=True: {type(self._brick).__name__} with states={self._states!r} has no "
                f"fused kernel for a parameter on {weight.device}; leave fused=None to run it as "
                f"plain torch operations"
            )
        rule.update(
            weight, grad, states, step=step, hyper=hyper, seed=seed, element_offset=element_offset
        )

    def _triton(self) -> bool:
        if triton_is_installed():
            return True
        missing = (
            "Triton is not installed, so parameters on CUDA cannot be updated by fused kernels"
        )
        if self._required:
            raise ValueError(f"fused=True: {missing}; pip install 'headrace[kernels]'")
        warnings.warn(
            f"{missing}: plain torch operations give the same bits at tens of passes over memory "
            f"and five fp32 copies of the largest parameter; pip install 'headrace[kernels]', or "
            f"pass fused=False to choose them",
            RuntimeWarning,
            stacklevel=2,
        )
        return False


def _host_rule(brick: Brick, states: str, master: str) -> UpdateRule | None:
    """Return the rule with a host kernel, if there is one."""
    if isinstance(brick, Adam) and states == "fp32":
        return AdamW(master=master)
    if isinstance(brick, Adam | Lion) and is_fused(brick, states):
        return EncodedRule(brick, states, master=master)
    return None
