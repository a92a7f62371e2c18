"""NVFP4: E2M1 values in blocks of 16, an E4M3 scale a block, one fp32 scale a tensor.

The two-level form only: without the tensor's scale, block scales of ordinary weights fall below
the smallest E4M3 normal number and 2 dB or more are lost.  Block scales are kept in
2^-6 .. 448, and 1/g is multiplied in, as torchao does, so bytes equal torchao's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from .blocks import RowCodec
from .minifloat import E2M1, E4M3
from .scales import block_amax, poison, quotient
from .tables import code_table

_SMALLEST_SCALE: Final = 2.0**-6  # the smallest normal E4M3 number
_SMALLEST_GLOBAL: Final = 2.0**-119  # keeps 1 / (g * 2^-6) finite in fp32


@final
@dataclass(frozen=True)
class Nvfp4Codec(RowCodec):
    """Parts ``codes`` (uint8, even element low), ``scale`` (uint8 E4M3), ``global_scale`` (fp32).

    Blocks of 16 along the last axis; g = amax of the tensor / (448 * 6).  Cost: 4.5 bits an
    element.  Worst error, with S = g * scale the block's factor: |x| / 4, at least S / 4, plus
    what the rounding of the block's scale cuts off (|x| - 6 S where positive, at most |x| / 16).
    The statistic of the whole tensor comes first, so pieces cannot be encoded separately.

    >>> codec = Nvfp4Codec()
    >>> codec.decode(codec.encode(torch.tensor([6.0, -3.0, 0.0])), (3,))
    tensor([ 6., -3.,  0.])
    """

    name: ClassVar[str] = "nvfp4"
    code_bits: ClassVar[int] = 4

    block_size: int = 16

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} of codec {self.name!r} is below 1")

    def block_spec(self) -> dict[str, torch.dtype]:
        return {"scale": torch.uint8}

    def whole_spec(self) -> dict[str, torch.dtype]:
        return {"global_scale": torch.float32}

    def whole_stats(self, amax: Tensor) -> dict[str, Tensor]:
        scale = quotient(poison(amax), E4M3.largest * E2M1.largest)
        return {"global_scale": scale.clamp(min=_SMALLEST_GLOBAL)}

    def code_values(self) -> tuple[float, ...]:
        return E2M1.values()

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes, scale = self._block_scale(blocks, whole["global_scale"])
        inverse = (1.0 / whole["global_scale"]) / scale
        return E2M1.encode(blocks * inverse[:, None], uniform), {"scale": codes}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        scale = code_table(E4M3.values(), unit.device).lookup(stats["scale"])
        return unit * (whole["global_scale"] * scale)

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        _, scale = self._block_scale(blocks, whole["global_scale"])
        factor = (whole["global_scale"] * scale)[:, None]
        error = E2M1.error(blocks / factor, stochastic=stochastic)
        return error * factor + blocks.abs() * 1e-6

    @staticmethod
    def _block_scale(blocks: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
        wanted = quotient(block_amax(blocks), E2M1.largest) / global_scale
        codes = E4M3.encode(wanted.clamp(_SMALLEST_SCALE, E4M3.largest))
        return codes, code_table(E4M3.values(), blocks.device).lookup(codes)
