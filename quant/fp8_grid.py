"""FP8 with one scale for each rectangle of a matrix: the layout of fine-grained FP8 checkpoints.

DeepSeek's and Qwen's FP8 checkpoints keep one scale for 128 x 128 weights, others one for each
output or for the whole matrix; all are grids of rectangles here, scales in the type the file
stores, so that such a checkpoint is streamed as it lies.  ``Fp8Codec`` is the one to choose for
one's own encodings: its groups lie along rows and can be encoded piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from .codec import Codec, Shape, check_input
from .minifloat import MiniFloat, eight_bit_float
from .rounding import CounterGenerator, slab_elements, slabs
from .scales import SCALE_DTYPES, SMALLEST_SUBNORMAL, check_scale_dtype, poison, quotient
from .spec import TensorSpec
from .tables import code_table


@final
@dataclass(frozen=True)
class Fp8GridCodec(Codec):
    """8-bit floats: parts ``codes`` (uint8 bit patterns, shape) and ``scale`` (a grid).

    The last two axes are cut into rectangles of ``block_rows`` x ``block_columns`` (0: the whole
    axis); the last ones may be short.  ``scale`` has a number for each, which decoding multiplies
    by: amax / 448 (e4m3) or amax / 57344 (e5m2), rounded to ``scale_dtype``.  Tensors of fewer
    axes are one row.  Worst error: |x| / 16 (e4m3) or |x| / 8 (e5m2), at least scale * 2^-10 or
    scale * 2^-17 (twice that stochastically), plus what a 16-bit scale rounded down cuts off the
    end (2^-8 of amax in bf16, 2^-11 in fp16).

    >>> codec = Fp8GridCodec(block_rows=2, block_columns=2)
    >>> parts = codec.encode(torch.tensor([[448.0, 3.0, 1.0], [0.0, 2.0, 448.0]]))
    >>> parts["scale"]
    tensor([[1., 1.]])
    >>> codec.decode(parts, (2, 3))[0]
    tensor([448.,   3.,   1.])
    """

    name: ClassVar[str] = "fp8_grid"

    element: str = "e4m3"
    block_rows: int = 128
    block_columns: int = 128
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        eight_bit_float(self.element)
        check_scale_dtype(self.scale_dtype)
        if self.block_rows < 0 or self.block_columns < 0:
            raise ValueError(
                f"rectangles of {self.block_rows} x {self.block_columns} of codec {self.name!r}: "
                f"give positive extents, or 0 for a whole axis"
            )

    @property
    def block_size(self) -> int:
        return 0

    @property
    def float_format(self) -> MiniFloat:
        """The element format."""
        return eight_bit_float(self.element)

    def spec(self, shape: Shape) -> dict[str, TensorSpec]:
        grid = self._grid(shape)
        scale = TensorSpec((*grid.lead, grid.down, grid.across), SCALE_DTYPES[self.scale_dtype])
        return {"codes": TensorSpec(tuple(shape), torch.uint8), "scale": scale}

    def encode_granule(self, shape: Shape) -> int:
        grid = self._grid(shape)
        if grid.rows % grid.height and math.prod(grid.lead) != 1:
            return max(math.prod(shape), 1)  # short rectangles in the middle of the elements
        return max(grid.height * grid.cols, 1)

    def decode_granule(self, shape: Shape) -> int:
        return max(self._grid(shape).cols, 1)

    def encode(self, x: Tensor, *, generator: CounterGenerator | None = None) -> dict[str, Tensor]:
        check_input(x, self.name)
        parts = self.empty_parts(tuple(x.shape), x.device)
        if not x.numel():
            parts["scale"].zero_()
            return parts
        grid = self._grid(tuple(x.shape))
        flat, codes = x.detach().reshape(-1), parts["codes"].view(-1)
        scales = parts["scale"].view(-1, grid.across)
        for first, last, start, stop in self._bands(grid, x.device):
            rows = flat[start:stop].to(torch.float32).view(-1, grid.cols)
            scale = self._scales(rows, grid)
            factor = _widen(scale.to(torch.float32), rows.shape, grid)
            unit = torch.where(factor == 0, torch.zeros_like(rows), rows / factor)
            uniform = None
            if generator is not None:
                uniform = generator.uniform(start, stop - start, device=x.device).view(rows.shape)
            codes[start:stop] = self.float_format.encode(unit, uniform).reshape(-1)
            scales[first:last] = scale
        return parts

    def decode_range(
        self, parts: Mapping[str, Tensor], shape: Shape, start: int, stop: int
    ) -> Tensor:
        self._check_range(shape, start, stop)
        codes = parts["codes"].view(-1)[start:stop]
        if start == stop:
            return torch.empty(0, dtype=torch.float32, device=codes.device)
        grid = self._grid(shape)
        unit = code_table(self.float_format.values(), codes.device).lookup(codes)
        rows = torch.arange(start // grid.cols, stop // grid.cols, device=codes.device)
        band = rows // grid.rows * grid.down + rows % grid.rows // grid.height
        scale = parts["scale"].view(-1, grid.across)[band].to(torch.float32)
        wide = scale.repeat_interleave(grid.width, dim=1)[:, : grid.cols]
        return (unit.view(-1, grid.cols) * wide).reshape(-1)

    def max_error(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        grid = self._grid(tuple(x.shape))
        flat = x.detach().reshape(-1)
        bound = torch.zeros(flat.shape, dtype=torch.float32, device=x.device)
        floor = 2 * self.float_format.largest * SMALLEST_SUBNORMAL[self.scale_dtype]
        for _, _, start, stop in self._bands(grid, x.device):
            rows = flat[start:stop].to(torch.float32).view(-1, grid.cols)
            factor = _widen(self._scales(rows, grid).to(torch.float32), rows.shape, grid)
            unit = torch.where(factor == 0, torch.zeros_like(rows), rows / factor)
            error = self.float_format.error(unit, stochastic=stochastic)
            piece = error * factor + rows.abs() * 1e-6 + floor
            bound[start:stop] = piece.reshape(-1)
        return bound.view(x.shape)

    def _grid(self, shape: Shape) -> _Grid:
        shape = tuple(shape)
        cols = shape[-1] if shape else 1
        rows = shape[-2] if len(shape) > 1 else 1
        height, width = self.block_rows or max(rows, 1), self.block_columns or max(cols, 1)
        lead = shape[:-2] if len(shape) > 2 else ()
        return _Grid(lead, rows, cols, height, width, -(-rows // height), -(-cols // width))

    def _scales(self, rows: Tensor, grid: _Grid) -> Tensor:
        """Return the scales (bands, across) of whole bands of rectangles."""
        count, below = -(-rows.shape[0] // grid.height), -rows.shape[0] % grid.height
        right = grid.across * grid.width - grid.cols
        padded = torch.nn.functional.pad(rows.abs(), (0, right, 0, below))
        amax = padded.view(count, grid.height, grid.across, grid.width).amax(dim=(1, 3))
        scale = quotient(poison(amax), self.float_format.largest)
        return poison(scale.to(SCALE_DTYPES[self.scale_dtype]))

    @staticmethod
    def _bands(grid: _Grid, device: torch.device) -> list[tuple[int, int, int, int]]:
        """Return (first band, last band, first element, last element) of each piece of work."""
        if not grid.rows * grid.cols * math.prod(grid.lead):
            return []  # an empty tensor
        pieces = []
        per_slab = max(slab_elements(device) // (grid.height * grid.cols), 1)
        for matrix in range(math.prod(grid.lead)):
            for low, high in slabs(grid.down, 1, target=per_slab):
                first_row, last_row = low * grid.height, min(high * grid.height, grid.rows)
                base = matrix * grid.rows
                pieces.append(
                    (
                        matrix * grid.down + low,
                        matrix * grid.down + high,
                        (base + first_row) * grid.cols,
                        (base + last_row) * grid.cols,
                    )
                )
        return pieces


@final
@dataclass(frozen=True, slots=True)
class _Grid:
    """How a shape is cut: its last two axes, a rectangle's extents, rectangles down and across."""

    lead: Shape
    rows: int
    cols: int
    height: int
    width: int
    down: int
    across: int


def _widen(scale: Tensor, shape: tuple[int, ...], grid: _Grid) -> Tensor:
    """Repeat (bands, across) over the elements of their rectangles, cut to ``shape``."""
    wide = scale.repeat_interleave(grid.height, dim=0)[: shape[0]]
    return wide.repeat_interleave(grid.width, dim=1)[:, : shape[1]]
