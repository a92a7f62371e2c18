"""AdamW and Lion with companded 8-bit states as fused update rules.

Each is the fast path of a ``BrickRule`` and equals it bit for bit; tensors that are not on the
CPU go through the bricks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..quant.companded import Companded8Codec
from ..quant.rounding import seed_key
from .adam import Adam
from .adamw import AdamScalars
from .brick_rule import BrickRule
from .host.bits import host_view
from .host.companded import BLOCK, adamw_companded, lion_companded
from .host.masters import no_extra
from .lion import Lion
from .masters import FullMaster, MasterName, SplitMaster, check_master, master_of
from .seeds import fold_in
from .spec import Shape, StateSpec
from .storage import encoding_of


@final
class CompandedRule:
    """Update rule: AdamW or Lion, companded 8-bit states (``states="int8"``), any master.

    AdamW's states cost 2.0625 bytes a parameter, Lion's 1.03; the master's come on top.
    """

    def __init__(self, brick: Adam | Lion, *, master: str = "split") -> None:
        self._lion = isinstance(brick, Lion)
        self._master: MasterName = check_master(master)
        self._bricks = BrickRule(brick, encoding_of("int8"), master=master)
        assert Companded8Codec().block_size == BLOCK, "the kernels are compiled for one block"

    @property
    def elementwise(self) -> bool:
        """Ranges of a parameter may be updated apart from each other."""
        return True

    @property
    def granule(self) -> int:
        """Ranges start and end at multiples of a block."""
        return BLOCK

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
        first = (host_view(states["exp_avg.codes"]), host_view(states["exp_avg.absmax"]))
        if self._lion:
            scalars = AdamScalars.of({"eps": 0.0, **hyper}, step).packed()
            lion_companded(w, extra, g, *first, scalars, element_offset, low, high)
            return
        scalars = AdamScalars.of(hyper, step).packed()
        second = (host_view(states["exp_avg_sq.codes"]), host_view(states["exp_avg_sq.absmax"]))
        adamw_companded(w, extra, g, *first, *second, scalars, element_offset, low, high)
