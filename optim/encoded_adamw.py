"""AdamW and Lion with encoded states as fused update rules.

Each is the fast path of a ``BrickRule``, with its states, and equals it bit for bit.  Tensors that
are not on the CPU go through the bricks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from ..quant.rounding import seed_key
from .adam import Adam
from .adamw import AdamScalars
from .base import Brick
from .brick_rule import BrickRule
from .host.bits import host_view
from .host.coat import adamw_coat
from .host.companded import adamw_companded, lion_companded
from .host.dynamic import adamw_dynamic, dynamic_tables
from .host.machine import permutes_bytes
from .host.masters import no_extra
from .lion import Lion
from .masters import FullMaster, MasterName, SplitMaster, check_master, master_of
from .seeds import fold_in
from .spec import Shape, StateSpec
from .storage import encoding_of

#: The parts of one encoded moment, in the order that the kernels take them.
_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "int8": ("codes", "absmax"),
    "int8_dynamic": ("codes", "absmax"),
    "coat": ("codes", "absmax", "power"),
}


def is_fused(brick: Brick, states: str) -> bool:
    """Whether ``EncodedRule`` has a kernel for a brick with states of this encoding."""
    return (isinstance(brick, Adam) and states in _PARTS) or (
        isinstance(brick, Lion) and states == "int8"
    )


@final
class EncodedRule:
    """Update rule: AdamW with states ``"int8"``, ``"int8_dynamic"`` or ``"coat"``, or Lion with
    ``"int8"``; any master.

    AdamW's states cost 2.0625, 2.031 or 2.078 bytes a parameter, Lion's 1.03; the master's come
    on top.
    """

    def __init__(self, brick: Adam | Lion, states: str, *, master: str = "split") -> None:
        if not is_fused(brick, states):
            raise ValueError(
                f"states={states!r} of {type(brick).__name__} have no fused kernel; "
                f"use BrickRule({type(brick).__name__}(), encoding_of({states!r}))"
            )
        self._lion = isinstance(brick, Lion)
        self._states = states
        self._master: MasterName = check_master(master)
        self._bricks = BrickRule(brick, encoding_of(states), master=master)

    @property
    def elementwise(self) -> bool:
        """Ranges of a parameter may be updated apart from each other."""
        return True

    @property
    def granule(self) -> int:
        """Ranges start and end at multiples of a block."""
        return self._bricks.granule

    def state_spec(self, shape: Shape, dtype: torch.dtype) -> StateSpec:
        """Return name -> spec of the states of a parameter or range of this shape."""
        return self._bricks.state_spec(shape, dtype)

    def init_states(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fill freshly zeroed states in place from the initial weight."""
        self._bricks.init_states(weight, states)

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
        if weight.device.type != "cpu":
            self._bricks.update(
                weight, grad, states, step=step, hyper=hyper, seed=seed,
                element_offset=element_offset,
            )  # fmt: skip
            return
        w, g = host_view(weight), host_view(grad)
        match master_of(self._master, weight.dtype):
            case FullMaster():
                extra = host_view(states["master"])
            case SplitMaster():
                extra = host_view(states["remainder"])
            case _:
                extra = no_extra()
        low, high = (np.uint32(word) for word in seed_key(fold_in(seed, step)))
        first = [host_view(states[f"exp_avg.{part}"]) for part in _PARTS[self._states]]
        if self._lion:
            scalars = AdamScalars.of({"eps": 0.0, **hyper}, step).packed()
            lion_companded(w, extra, g, *first, scalars, element_offset, low, high)
            return
        scalars = AdamScalars.of(hyper, step).packed()
        second = [host_view(states[f"exp_avg_sq.{part}"]) for part in _PARTS[self._states]]
        arguments = (w, extra, g, *first, *second, scalars, element_offset, low, high)
        match self._states:
            case "int8":
                adamw_companded(*arguments)
            case "int8_dynamic":
                adamw_dynamic(*arguments, dynamic_tables(wide=permutes_bytes()))
            case _:
                adamw_coat(*arguments)
