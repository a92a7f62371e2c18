"""AdamW with fp32 moments as one fused update rule (Loshchilov and Hutter, arXiv:1711.05101).

Guarantees: elementwise, so any tiling gives the same bits; the ``split`` master equals the
``fp32`` master bit for bit; CPU and other devices do the same fp32 operations in the same order.
Against ``torch.optim.AdamW`` the order differs by a few fp32 roundings of the *update* (bias
corrections multiply instead of divide), never more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..quant.rounding import CounterGenerator, seed_key
from .adam import Adam
from .arithmetic import fp32
from .brick_rule import BrickRule
from .host import adamw as kernels
from .host.bits import host_view
from .masters import (
    FullMaster,
    MasterName,
    SplitMaster,
    StochasticMaster,
    check_master,
    master_of,
)
from .seeds import fold_in
from .spec import Shape, StateSpec, TensorSpec
from .storage import encoding_of


@final
@dataclass(frozen=True, slots=True)
class AdamScalars:
    """The numbers of one Adam step, computed in double precision and rounded once to fp32."""

    lr: float
    decay: float
    b1: float
    b2: float
    o1: float
    o2: float
    c1: float
    c2: float
    eps: float
    sign: float

    @staticmethod
    def of(hyper: Mapping[str, Any], step: int) -> AdamScalars:
        """Read ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``maximize`` of a param group."""
        b1, b2 = (float(beta) for beta in hyper["betas"])
        lr = float(hyper["lr"])
        return AdamScalars(
            lr=fp32(lr),
            decay=fp32(1.0 - lr * float(hyper["weight_decay"])),
            b1=fp32(b1),
            b2=fp32(b2),
            o1=fp32(1.0 - b1),
            o2=fp32(1.0 - b2),
            c1=fp32(1.0 / (1.0 - b1**step)),
            c2=fp32(1.0 / math.sqrt(1.0 - b2**step)),
            eps=fp32(float(hyper["eps"])),
            sign=-1.0 if hyper.get("maximize", False) else 1.0,
        )

    def packed(self) -> tuple[np.float32, ...]:
        """Return the tuple that the host kernels take."""
        return tuple(
            np.float32(x)
            for x in (
                self.lr,
                self.decay,
                self.b1,
                self.b2,
                self.o1,
                self.o2,
                self.c1,
                self.c2,
                self.eps,
                self.sign,
            )
        )


@final
class AdamW:
    """Update rule: AdamW, fp32 ``exp_avg`` and ``exp_avg_sq``, and a choice of master weights.

    States cost 8 bytes a parameter plus the master's (``fp32`` 4, ``split`` 2, ``sr`` 0; an fp32
    weight is its own master).  State names interchange with ``torch.optim.AdamW``.

    >>> AdamW(master="split").state_spec((2,), torch.bfloat16)["remainder"].nbytes
    4
    """

    def __init__(self, *, master: str = "fp32") -> None:
        self._master: MasterName = check_master(master)
        self._bricks = BrickRule(Adam(), encoding_of("fp32"), master=master)

    @property
    def elementwise(self) -> bool:
        """Ranges of a parameter may be updated apart from each other."""
        return True

    @property
    def granule(self) -> int:
        """Ranges may start anywhere."""
        return 1

    def state_spec(self, shape: Shape, dtype: torch.dtype) -> StateSpec:
        """Return name -> spec of the states of a parameter or range of this shape."""
        shape = tuple(shape)
        moments = {
            "exp_avg": TensorSpec(shape, torch.float32),
            "exp_avg_sq": TensorSpec(shape, torch.float32),
        }
        return moments | master_of(self._master, dtype).state_spec(shape)

    def init_states(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fill freshly zeroed states in place from the initial weight."""
        master_of(self._master, weight.dtype).init(weight, states)

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
        """Do one step in place; all tensors contiguous, the gradient in any of the float dtypes."""
        if weight.device.type == "cpu":
            noise = CounterGenerator(fold_in(seed, step), element_offset)
            self._update_host(weight, grad, states, AdamScalars.of(hyper, step), noise)
        else:
            self._bricks.update(
                weight,
                grad,
                states,
                step=step,
                hyper=hyper,
                seed=seed,
                element_offset=element_offset,
            )

    def _update_host(
        self,
        weight: Tensor,
        grad: Tensor,
        states: Mapping[str, Tensor],
        scalars: AdamScalars,
        noise: CounterGenerator,
    ) -> None:
        w, g = host_view(weight), host_view(grad)
        m, v = host_view(states["exp_avg"]), host_view(states["exp_avg_sq"])
        packed = scalars.packed()
        match master_of(self._master, weight.dtype):
            case FullMaster():
                kernels.adamw_master(w, g, host_view(states["master"]), m, v, packed)
            case SplitMaster():
                kernels.adamw_split(w, g, host_view(states["remainder"]), m, v, packed)
            case StochasticMaster():
                low, high = (np.uint32(word) for word in seed_key(noise.seed))
                kernels.adamw_stochastic(w, g, m, v, packed, noise.element_offset, low, high)
            case _:
                kernels.adamw_weight(w, g, m, v, packed)
