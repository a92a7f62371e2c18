"""INT8 with the dynamic map: a 256-entry table times the largest magnitude of each block.

The format of 8-bit optimizer states in bitsandbytes (Dettmers et al., 2022, "8-bit Optimizers
via Block-wise Quantization"): codes index an ascending table of seven decades, so that small
values keep relative accuracy.  Codes and scales are those of bitsandbytes, either way round.

Rounding is to the nearest table value, ties down, of x * (1 / absmax) in full blocks and
x / absmax in a short last one: what bitsandbytes computes in its reference kernels.  Its CPU
library rounds through a coarse table instead (about 0.7 % of the codes differ by one, and zero
becomes 5e-6 of the block's maximum); this codec does not follow it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from .blocks import FlatCodec
from .scales import block_amax
from .tables import code_table, dynamic_map

#: Blocks whose largest magnitude is below this decode to zero (bitsandbytes' floor).
SMALLEST_ABSMAX = 1e-38


def normalised(blocks: Tensor, absmax: Tensor, *, short: bool) -> Tensor:
    """Scale fp32 (blocks, width) to [-1, 1] by their largest magnitudes, as bitsandbytes does."""
    floor = absmax.clamp(min=SMALLEST_ABSMAX)[:, None]
    scaled = blocks / floor if short else blocks * (1.0 / floor)
    return scaled.clamp(-1.0, 1.0)


@final
@dataclass(frozen=True)
class Int8BlockwiseCodec(FlatCodec):
    """8-bit dynamic map over flat blocks: parts ``codes`` (uint8, shape) and ``absmax`` (fp32).

    Cost: 8 + 32 / block_size bits an element.  Worst error in a block: 0.0071 * absmax (half the
    widest gap of the signed table; 0.0036 unsigned); twice that with stochastic rounding.
    ``signed=False`` is for values that are never negative (second moments): negative ones
    become 0.

    >>> codec = Int8BlockwiseCodec()
    >>> parts = codec.encode(torch.tensor([-0.5, 0.0, 1.0]))
    >>> codec.decode(parts, (3,))[1:]
    tensor([0., 1.])
    """

    name: ClassVar[str] = "int8_blockwise"
    code_bits: ClassVar[int] = 8

    block_size: int = 256
    signed: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} of codec {self.name!r} is below 1")

    def block_spec(self) -> dict[str, torch.dtype]:
        return {"absmax": torch.float32}

    def code_values(self) -> tuple[float, ...]:
        return dynamic_map(signed=self.signed)

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        absmax = block_amax(blocks)
        scaled = normalised(blocks, absmax, short=blocks.shape[1] < self.block_size)
        table = code_table(self.code_values(), blocks.device)
        codes = table.nearest(scaled) if uniform is None else table.stochastic(scaled, uniform)
        return codes, {"absmax": absmax}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        return unit * stats["absmax"]

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        absmax = block_amax(blocks)[:, None]
        gap = code_table(self.code_values(), blocks.device).largest_gap
        # The lowest signed value is -0.993, so the lowest gap is as wide as the widest one.
        bound = gap * absmax * (1.0 if stochastic else 0.5) + absmax * 1e-6 + SMALLEST_ABSMAX
        bound = bound.expand(blocks.shape)
        return bound if self.signed else bound + (-blocks).clamp(min=0.0)
