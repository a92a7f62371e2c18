"""What NF4 and FP4 of bitsandbytes share: a 16-entry table times each block's largest magnitude.

Flat blocks; the even element of a pair sits in the high four bits.  With double quantisation the
fp32 magnitudes are themselves encoded: their mean is taken off and the rest goes through the
signed 8-bit dynamic map in blocks of 256 (Dettmers et al., 2023, QLoRA).  Bytes equal those of
bitsandbytes, but for its CPU library's coarse 8-bit rounding (see ``int8_blockwise``); the mean
is summed in fp64, so that it does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .blocks import FlatCodec
from .codec import Shape
from .int8_blockwise import SMALLEST_ABSMAX, Int8BlockwiseCodec, normalised
from .rounding import CounterGenerator
from .scales import block_amax
from .spec import TensorSpec
from .tables import code_table

#: Magnitudes that share a second-level scale.
NESTED_BLOCK: Final = 256


@dataclass(frozen=True)
class FourBitTableCodec(FlatCodec):
    """Common arithmetic of the 4-bit table formats; parts as the concrete classes say."""

    block_size: int = 64
    double_quantized: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(
                f"block_size {self.block_size} of codec {self.name!r} is not a positive even number"
            )

    def block_spec(self) -> dict[str, torch.dtype]:
        return {"absmax": torch.float32}

    def spec(self, shape: Shape) -> dict[str, TensorSpec]:
        specs = super().spec(shape)
        if self.double_quantized:
            (blocks,) = specs["absmax"].shape
            specs["absmax"] = TensorSpec((blocks,), torch.uint8)
            specs["nested_absmax"] = TensorSpec((-(-blocks // NESTED_BLOCK),), torch.float32)
            specs["nested_offset"] = TensorSpec((), torch.float32)
        return specs

    def encode_granule(self, shape: Shape) -> int:
        # The mean magnitude is a number of the whole tensor.
        if self.double_quantized:
            return max(TensorSpec(tuple(shape), torch.uint8).numel, 1)
        return self.block_size

    def encode(self, x: Tensor, *, generator: CounterGenerator | None = None) -> dict[str, Tensor]:
        codes, stats, _ = self._encode_flat(x, generator)
        if not self.double_quantized:
            return {"codes": codes, **stats}
        return {"codes": codes, **encode_magnitudes(stats["absmax"])}

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        absmax = block_amax(blocks)
        scaled = normalised(blocks, absmax, short=blocks.shape[1] < self.block_size)
        table = code_table(self.code_values(), blocks.device)
        codes = table.nearest(scaled) if uniform is None else table.stochastic(scaled, uniform)
        return codes, {"absmax": absmax}

    def block_numbers(
        self, parts: Mapping[str, Tensor], first: int, last: int
    ) -> dict[str, Tensor]:
        if not self.double_quantized:
            return super().block_numbers(parts, first, last)
        return {"absmax": decode_magnitudes(parts, first, last)}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        return unit * stats["absmax"]

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        absmax = block_amax(blocks)[:, None]
        gap = code_table(self.code_values(), blocks.device).largest_gap
        bound = absmax * (gap * (1.0 if stochastic else 0.5) + 1e-6) + SMALLEST_ABSMAX
        return bound.expand(blocks.shape)

    def max_error(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        bound = super().max_error(x, stochastic=stochastic)
        if not self.double_quantized or x.numel() == 0:
            return bound
        _, stats, _ = self._encode_flat(x, None)
        absmax = stats["absmax"]
        shifted = absmax - absmax.to(torch.float64).mean().to(torch.float32)
        of_magnitude = Int8BlockwiseCodec(NESTED_BLOCK).max_error(shifted) + absmax * 2e-7
        per_element = of_magnitude.repeat_interleave(self.block_size)[: x.numel()]
        return bound + per_element.view(x.shape)


def encode_magnitudes(absmax: Tensor) -> dict[str, Tensor]:
    """Encode fp32 block magnitudes (blocks,) by double quantisation."""
    if absmax.numel():
        offset = absmax.to(torch.float64).mean().to(torch.float32)
    else:
        offset = absmax.new_zeros(())
    nested = Int8BlockwiseCodec(NESTED_BLOCK).encode(absmax - offset)
    return {
        "absmax": nested["codes"],
        "nested_absmax": nested["absmax"],
        "nested_offset": offset,
    }


def decode_magnitudes(parts: Mapping[str, Tensor], first: int, last: int) -> Tensor:
    """Return the fp32 magnitudes of blocks ``first .. last`` from double-quantised parts."""
    codes = parts["absmax"][first:last]
    values = code_table(Int8BlockwiseCodec().code_values(), codes.device).lookup(codes)
    owner = torch.arange(first, last, device=codes.device) // NESTED_BLOCK
    return values * parts["nested_absmax"][owner] + parts["nested_offset"]
