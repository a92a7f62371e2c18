"""Any brick, state encoding and master as an update rule, for resident and streamed parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from ..quant.rounding import CounterGenerator
from .arithmetic import fp32
from .base import BasisChange, Brick, StepContext
from .masters import MasterName, check_master, master_of
from .seeds import fold_in
from .spec import Shape, StateSpec
from .storage import Encoding


@final
class BrickRule:
    """Update rule of a brick, in torch operations.

    Does ``weight = weight * (1 - lr * weight_decay) - lr * direction`` in fp32.  Elementwise if
    the brick is and if the encoding's codecs look no further than a block; then the bits do not
    depend on how a parameter is cut.  Scratch: about five fp32 copies of what is updated at once.

    >>> from headrace.optim.lion import Lion
    >>> from headrace.optim.storage import encoding_of
    >>> rule = BrickRule(Lion(), encoding_of("int8"), master="sr")
    >>> rule.elementwise, rule.granule
    (True, 128)
    """

    def __init__(self, brick: Brick, encoding: Encoding, *, master: str = "fp32") -> None:
        self._brick = brick
        self._encoding = encoding
        self._master: MasterName = check_master(master)

    @property
    def elementwise(self) -> bool:
        """Whether ranges of a parameter may be updated apart from each other."""
        return self._brick.elementwise and self._encoding.granule is not None

    @property
    def granule(self) -> int:
        """Ranges start and end at multiples of this many elements."""
        return self._encoding.granule or 1

    def state_spec(self, shape: Shape, dtype: torch.dtype) -> StateSpec:
        """Return name -> spec of the states of a parameter or range of this shape."""
        shape = tuple(shape)
        kept = self._encoding.state_spec(self._brick.init_spec(shape))
        return kept | master_of(self._master, dtype).state_spec(shape)

    def init_states(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fill freshly zeroed states in place from the initial weight."""
        slots = self._brick.init_spec(tuple(weight.shape))
        decoded = self._encoding.decode(slots, states)
        for name, state in decoded.items():
            if self._encoding.codec(slots[name].kind) is not None:
                state.zero_()  # all-zero parts are not the code of zeros in every format
        self._brick.init(decoded)
        self._encoding.encode(slots, decoded, states, CounterGenerator(0))
        master_of(self._master, weight.dtype).init(weight, states)

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
        slots = self._brick.init_spec(tuple(shape))
        decoded = self._encoding.decode(slots, states)
        nothing = next(iter(states.values())).new_empty(0, dtype=torch.float32)
        context = StepContext(step, hyper, seed, 0, nothing)
        self._brick.rotate(decoded, tuple(shape), change, context)
        # Noise that no step of the run draws.
        noise = CounterGenerator(fold_in(fold_in(seed, step), step))
        self._encoding.encode(slots, decoded, states, noise)

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
        if weight.numel() == 0:
            return
        noise = CounterGenerator(fold_in(seed, step), element_offset)
        master = master_of(self._master, weight.dtype)
        value = master.read(weight, states)
        context = StepContext(step, hyper, seed, element_offset, value)
        slots = self._brick.init_spec(tuple(weight.shape))
        decoded = self._encoding.decode(slots, states)
        grad = grad.to(torch.float32, copy=True)
        if hyper.get("maximize", False):
            grad.neg_()
        direction = self._brick.update(grad, decoded, context)
        self._encoding.encode(slots, decoded, states, noise)
        lr = float(hyper["lr"])
        decay = fp32(1.0 - lr * float(hyper["weight_decay"]))
        master.write(weight, states, (value * decay).sub_(direction.mul_(fp32(lr))), noise)
