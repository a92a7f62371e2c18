"""FP8: E4M3 or E5M2 values times an fp32 scale of a tensor, a row, or a group of columns.

Values are clamped to the largest finite one before the cast: whether a cast saturates depends
on the format and on the version of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from .blocks import RowCodec
from .minifloat import MiniFloat, eight_bit_float
from .scales import block_amax, divide, poison, quotient


@final
@dataclass(frozen=True)
class Fp8Codec(RowCodec):
    """8-bit floats: parts ``codes`` (uint8 bit patterns, shape) and ``scale`` (fp32).

    ``scale`` is a factor that decoding multiplies by: amax / 448 (e4m3) or amax / 57344 (e5m2),
    one per row of the last axis (``granularity="row"``), per ``block_size`` columns
    (``"group"``), or one of shape ``()`` (``"tensor"``).  Worst error: |x| / 16 (e4m3) or
    |x| / 8 (e5m2), and at least scale * 2^-10 or scale * 2^-17; twice that stochastically.

    ``codes.view(torch.float8_e4m3fn)`` is the tensor that scaled matrix products take.

    >>> codec = Fp8Codec(granularity="tensor")
    >>> codec.decode(codec.encode(torch.tensor([448.0, -1.0625, 3.0])), (3,))
    tensor([448.,  -1.,   3.])
    """

    name: ClassVar[str] = "fp8"
    code_bits: ClassVar[int] = 8

    element: str = "e4m3"
    granularity: str = "row"
    block_size: int = 0

    def __post_init__(self) -> None:
        eight_bit_float(self.element)
        if self.granularity not in ("tensor", "row", "group"):
            raise ValueError(
                f"granularity {self.granularity!r} of codec {self.name!r} is not known; choose "
                f"'tensor', 'row' or 'group'"
            )
        if (self.granularity == "group") != (self.block_size > 0):
            raise ValueError(
                f"block_size {self.block_size} of codec {self.name!r} does not go with "
                f"granularity {self.granularity!r}: groups need a positive one, others 0"
            )

    @property
    def float_format(self) -> MiniFloat:
        """The element format."""
        return eight_bit_float(self.element)

    def block_spec(self) -> dict[str, torch.dtype]:
        return {} if self.granularity == "tensor" else {"scale": torch.float32}

    def whole_spec(self) -> dict[str, torch.dtype]:
        return {"scale": torch.float32} if self.granularity == "tensor" else {}

    def whole_stats(self, amax: Tensor) -> dict[str, Tensor]:
        return {"scale": quotient(poison(amax), self.float_format.largest)}

    def code_values(self) -> tuple[float, ...]:
        return self.float_format.values()

    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scale = self._scale(blocks, whole)
        codes = self.float_format.encode(divide(blocks, scale), uniform)
        return codes, {} if self.per_tensor else {"scale": scale}

    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        return unit * (whole["scale"] if self.per_tensor else stats["scale"])

    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        scale = self._scale(blocks, whole)
        error = self.float_format.error(divide(blocks, scale), stochastic=stochastic)
        # The last terms cover fp32 rounding and scales that underflow.
        floor = 2 * self.float_format.largest * 2.0**-149
        return error * scale[:, None] + blocks.abs() * 1e-6 + floor

    def _scale(self, blocks: Tensor, whole: Mapping[str, Tensor]) -> Tensor:
        if self.per_tensor:
            return whole["scale"].expand(blocks.shape[0])
        return quotient(block_amax(blocks), self.float_format.largest)
