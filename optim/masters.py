"""Master weights: where the fp32 value behind a 16-bit weight lives.

| name    | states               | bytes a parameter | what is kept         |
|---------|----------------------|-------------------|----------------------|
| `fp32`  | `master` fp32        | 2 + 4             | the fp32 value       |
| `split` | `remainder` int16    | 2 + 2             | the same fp32 value  |
| `sr`    | none                 | 2                 | unbiased in the mean |

An fp32 weight is its own master under every name.  The weight is always its master rounded to
nearest even (`sr`: stochastically).  A master that would lie exactly half way beyond an even bf16
number is kept one fp32 unit nearer to it, in both `fp32` and `split`: without this, 16 bits of
remainder could not tell 65537 numbers apart, and with it the two are equal bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from ..quant.rounding import CounterGenerator, bfloat16_stochastic
from .spec import Shape, StateSpec, TensorSpec

MasterName = Literal["fp32", "split", "sr"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Master(ABC):
    """One way to keep the fp32 value of a weight; in torch operations, on any device."""

    name: ClassVar[str]

    @abstractmethod
    def state_spec(self, shape: Shape) -> StateSpec:
        """Return the states that keep the master of a weight of this shape."""

    @abstractmethod
    def init(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """Fill the states so that the master equals the weight."""

    @abstractmethod
    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """Return the fp32 master; it may alias a state and must not be changed in place."""

    @abstractmethod
    def write(
        self, weight: Tensor, states: Mapping[str, Tensor], value: Tensor, noise: CounterGenerator
    ) -> None:
        """Set the master to an fp32 value and round it into the weight."""


@final
class WeightIsMaster(Master):
    """An fp32 weight, which needs no other master."""

    name = "weight"

    def state_spec(self, shape: Shape) -> StateSpec:
        return {}

    def init(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        pass

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        return weight

    def write(
        self, weight: Tensor, states: Mapping[str, Tensor], value: Tensor, noise: CounterGenerator
    ) -> None:
        weight.copy_(value)


@final
class FullMaster(Master):
    """A separate fp32 tensor beside a 16-bit weight."""

    name = "fp32"

    def state_spec(self, shape: Shape) -> StateSpec:
        return {"master": TensorSpec(shape, torch.float32)}

    def init(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        states["master"].copy_(weight)

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        return states["master"]

    def write(
        self, weight: Tensor, states: Mapping[str, Tensor], value: Tensor, noise: CounterGenerator
    ) -> None:
        value = untie(value) if weight.dtype == torch.bfloat16 else value
        states["master"].copy_(value)
        weight.copy_(value)


@final
class SplitMaster(Master):
    """A bf16 weight and the 16 bits that its exact fp32 master has beyond it."""

    name = "split"

    def state_spec(self, shape: Shape) -> StateSpec:
        return {"remainder": TensorSpec(shape, torch.int16)}

    def init(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        states["remainder"].zero_()

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
        return (high + states["remainder"]).view(torch.float32)

    def write(
        self, weight: Tensor, states: Mapping[str, Tensor], value: Tensor, noise: CounterGenerator
    ) -> None:
        value = untie(value)
        rounded = value.to(torch.bfloat16)
        high = rounded.contiguous().view(torch.int16).to(torch.int32) << 16
        low = (value.view(torch.int32) - high).to(torch.int16)
        # A NaN's remainder is zero: adding its low bits back could carry it out of the NaNs.
        states["remainder"].copy_(low.masked_fill_(value.isnan(), 0))
        weight.copy_(rounded)


@final
class StochasticMaster(Master):
    """No master: a bf16 weight, rounded stochastically by a counter of its element index."""

    name = "sr"

    def state_spec(self, shape: Shape) -> StateSpec:
        return {}

    def init(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        pass

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        return weight.to(torch.float32)

    def write(
        self, weight: Tensor, states: Mapping[str, Tensor], value: Tensor, noise: CounterGenerator
    ) -> None:
        weight.copy_(bfloat16_stochastic(value, noise))


def untie(value: Tensor) -> Tensor:
    """Move fp32 values exactly half way beyond an even bf16 number towards it by one fp32 unit."""
    bits = value.contiguous().view(torch.int32)
    return (bits - ((bits & 0x1FFFF) == 0x8000).to(torch.int32)).view(torch.float32)


def check_master(name: str) -> MasterName:
    """Return the name if it is that of a master format, else raise."""
    known: dict[str, MasterName] = {"fp32": "fp32", "split": "split", "sr": "sr"}
    if name in known:
        return known[name]
    raise ValueError(f"master={name!r} is unknown; choose 'fp32', 'split' or 'sr'")


def master_of(name: MasterName, dtype: torch.dtype) -> Master:
    """Return the master of a weight of this dtype."""
    if dtype == torch.float32:
        return WeightIsMaster()
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"optimizers update float32, bfloat16 and float16 weights, got {dtype}; cast the "
            f"parameter or freeze it (requires_grad=False)"
        )
    if name == "fp32":
        return FullMaster()
    if dtype == torch.float16:
        raise ValueError(
            f"master={name!r} needs bfloat16 weights: a float16 weight is not the upper half of "
            f"an fp32 number. Use master='fp32', or load the model in bfloat16"
        )
    return SplitMaster() if name == "split" else StochasticMaster()
