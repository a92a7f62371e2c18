"""Flat-block codecs of other libraries' optimizer states: torchao's 4-bit and FP8 layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from .blocks import FlatCodec
from .minifloat import E4M3
from .scales import block_amax, divide, quotient
from .tables import code_table

_SIGNED_4BIT: Final = (
    -0.8875,
    -0.6625,
    -0.4375,
    -0.2125,
    -0.0775,
    -0.0325,
    -0.0055,
    0.0,
    0.0055,
    0.0325,
    0.0775,
    0.2125,
    0.4375,
    0.6625,
    0.8875,
    1.0,
)
_UNSIGNED_4BIT: Final = tuple((i + 1) / 16 for i in range(16))

#: torchao's smallest scale: a block of zeros divides by it.
_SMALLEST_SCALE: Final = 1e-12


@final
@dataclass(frozen=True)
class State4BitCodec(FlatCodec):
    """4-bit states as torchao keeps them: dynamic map if signed, else sixteenths without zero.

    Parts: ``codes`` (two a byte, the even element in the high half) and ``absmax`` (fp32 a
    block).  Cost: 4 + 32 / block_size bits an element.  The unsigned map has no zero (Li et al.,
    2023, "Memory Efficient Optimizers with 4-bit States"), so zeros decode to 1/16 of their
    block's maximum, the one exception to "zeros decode to zeros".
    """

    name: ClassVar[str] = "state4"
    code_bits: ClassVar[int] = 4
    high_first: ClassVar[bool] = True

    block_size: int = 128
    signed: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(
                f"block_size {self.block_size} of codec {self.name!r} is not a positive even number"
            )

    def block_spec(self) -> dict[str, torch.dtype]:
        return {"absmax": torch.float32}

    def code_values(self) -> tuple[float, ...]:
        return _SIGNED_4BIT if self.signed else _UNSIGNED_4BIT

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        absmax = block_amax(blocks)
        scaled = (blocks / absmax.clamp(min=_SMALLEST_SCALE)[:, None]).clamp(-1.0, 1.0)
        table = code_table(self.code_values(), blocks.device)
        codes = table.nearest(scaled) if uniform is None else table.stochastic(scaled, uniform)
        return codes, {"absmax": absmax}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        return unit * stats["absmax"]

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        absmax = block_amax(blocks)[:, None]
        gap = 0.225 if self.signed else 0.0625
        bound = absmax * (gap + 1e-6) + _SMALLEST_SCALE
        return (bound + (0.0 if self.signed else 1.0) * (-blocks).clamp(min=0.0)).expand(
            blocks.shape
        )


@final
@dataclass(frozen=True)
class Fp8BlockwiseCodec(FlatCodec):
    """E4M3 over flat blocks: parts ``codes`` (uint8 patterns, shape) and ``scale`` (fp32).

    The largest magnitude of a block becomes 448.  Cost: 8 + 32 / block_size bits an element.
    """

    name: ClassVar[str] = "fp8_blockwise"
    code_bits: ClassVar[int] = 8

    block_size: int = 256

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} of codec {self.name!r} is below 1")

    def block_spec(self) -> dict[str, torch.dtype]:
        return {"scale": torch.float32}

    def code_values(self) -> tuple[float, ...]:
        return E4M3.values()

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scale = quotient(block_amax(blocks), E4M3.largest)
        return E4M3.encode(divide(blocks, scale), uniform), {"scale": scale}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        return unit * stats["scale"]

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        scale = block_amax(blocks)[:, None] / E4M3.largest
        scaled = divide(blocks, scale[:, 0]).abs().clamp(max=E4M3.largest)
        return E4M3.error(scaled, stochastic=stochastic) * scale * (1 + 1e-5) + 2.0**-140
