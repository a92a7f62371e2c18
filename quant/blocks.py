"""Block codecs: the layouts that most formats share, so that a format file holds arithmetic only.

A block codec cuts the tensor into blocks of values that share statistics, turns each value into
an 8-bit or 4-bit code, and keeps a few numbers per block.  Two layouts:

* ``FlatCodec``: blocks of ``block_size`` consecutive elements of the flattened tensor; the last
  block may be short.  Codes: 8-bit in the tensor's shape, 4-bit packed into a flat vector.
* ``RowCodec``: blocks lie along the last axis and never cross a row; the last block of a row may
  be short (statistics see it padded with zeros), and ``group_size`` 0 makes the row one block.
  Codes: 8-bit in the tensor's shape, 4-bit packed along the last axis.

Work goes slab by slab (``slab_elements``), so scratch memory does not grow with the
tensor; slabs start at block boundaries, so the bits do not depend on the slab size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .codec import Codec, Shape, check_input
from .rounding import CounterGenerator, slab_elements, slabs
from .spec import TensorSpec
from .tables import code_table, pack_nibbles, pair_table


@dataclass(frozen=True)
class BlockCodec(Codec):
    """What both layouts share: the format's arithmetic as hooks over (blocks, width) matrices."""

    #: Bits of a code: 8 or 4.
    code_bits: ClassVar[int]
    #: Whether the even element of a packed pair sits in the high four bits.
    high_first: ClassVar[bool] = False
    #: Torch type of the codes of 8-bit formats (uint8 patterns, or int8 integers).
    code_dtype: ClassVar[torch.dtype] = torch.uint8

    @abstractmethod
    def block_spec(self) -> dict[str, torch.dtype]:
        """Return name -> dtype of the numbers kept once per block."""

    @abstractmethod
    def code_values(self) -> tuple[float, ...]:
        """Return the value of every code (indexed by its bit pattern), before scaling."""

    @abstractmethod
    def encode_blocks(
        self, blocks: Tensor, uniform: Tensor | None, whole: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode fp32 (blocks, width): uint8 codes of that shape and per-block numbers (blocks,).

        ``uniform`` has the shape of ``blocks`` for stochastic rounding, else is None.
        """

    @abstractmethod
    def expand(
        self, unit: Tensor, stats: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> Tensor:
        """Turn looked-up values (blocks, width) and per-block numbers (blocks, 1) into values."""

    @abstractmethod
    def block_error(self, blocks: Tensor, stochastic: bool, whole: Mapping[str, Tensor]) -> Tensor:
        """Bound the error of every element of fp32 (blocks, width)."""

    def whole_spec(self) -> dict[str, torch.dtype]:
        """Return name -> dtype of the numbers (shape ``()``) kept once per tensor."""
        return {}

    def whole_stats(self, amax: Tensor) -> dict[str, Tensor]:
        """Return the per-tensor numbers from the largest magnitude of the tensor (shape ``()``)."""
        return {}

    @property
    def zero_code(self) -> int:
        """Code that fills the unused half of a last byte."""
        return 0

    # -- shared machinery ---------------------------------------------------------------------

    def _whole_parts(self, flat: Tensor) -> dict[str, Tensor]:
        if not self.whole_spec():
            return {}
        amax = torch.zeros((), dtype=torch.float32, device=flat.device)
        for start, stop in slabs(flat.numel(), 1, target=slab_elements(flat.device)):
            # torch.maximum keeps NaN, so that a NaN anywhere reaches the statistic.
            amax = torch.maximum(amax, flat[start:stop].to(torch.float32).abs().amax())
        return self.whole_stats(amax)

    def _unit(self, codes: Tensor, count: int) -> Tensor:
        """Look ``count`` flat values up from 8-bit codes or packed 4-bit codes (flat)."""
        if self.code_bits == 8:
            patterns = codes.view(torch.uint8)
            return code_table(self.code_values(), codes.device).lookup(patterns)
        pairs = pair_table(self.code_values(), self.high_first, codes.device)
        return torch.index_select(pairs, 0, codes.to(torch.int32)).view(-1)[:count]

    def _stored(self, codes: Tensor) -> Tensor:
        """Return unpacked uint8 codes (rows, width) as they are stored, flat."""
        if self.code_bits == 4:
            codes = pack_nibbles(codes, high_first=self.high_first, padding=self.zero_code)
            return codes.reshape(-1)
        return codes.reshape(-1).view(self.code_dtype)


@dataclass(frozen=True)
class FlatCodec(BlockCodec):
    """Blocks of consecutive elements of the flattened tensor."""

    def spec(self, shape: Shape) -> dict[str, TensorSpec]:
        numel = math.prod(shape)
        if self.code_bits == 8:
            codes = TensorSpec(tuple(shape), self.code_dtype)
        else:
            codes = TensorSpec((-(-numel // 2),), torch.uint8)
        blocks = -(-numel // self.block_size)
        stats = {name: TensorSpec((blocks,), dtype) for name, dtype in self.block_spec().items()}
        whole = {name: TensorSpec((), dtype) for name, dtype in self.whole_spec().items()}
        return {"codes": codes, **stats, **whole}

    def encode_granule(self, shape: Shape) -> int:
        return self.block_size if not self.whole_spec() else max(math.prod(shape), 1)

    def decode_granule(self, shape: Shape) -> int:
        return self.block_size

    def _encode_flat(
        self, x: Tensor, generator: CounterGenerator | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return flat stored codes, per-block numbers, per-tensor numbers."""
        check_input(x, self.name)
        flat = x.detach().reshape(-1)
        numel, width = flat.numel(), self.block_size
        stored = numel if self.code_bits == 8 else -(-numel // 2)
        code_dtype = self.code_dtype if self.code_bits == 8 else torch.uint8
        codes = torch.empty(stored, dtype=code_dtype, device=x.device)
        whole = self._whole_parts(flat)
        stats = {
            name: torch.empty(-(-numel // width), dtype=dtype, device=x.device)
            for name, dtype in self.block_spec().items()
        }
        full = numel - numel % width
        # The short last block goes through on its own, unpadded.
        ranges = [*slabs(full, width, target=slab_elements(x.device))]
        if full < numel:
            ranges.append((full, numel))
        for start, stop in ranges:
            blocks = flat[start:stop].to(torch.float32).view(-1, min(width, stop - start))
            uniform = None
            if generator is not None:
                uniform = generator.uniform(start, stop - start, device=x.device)
                uniform = uniform.view(blocks.shape)
            piece, numbers = self.encode_blocks(blocks, uniform, whole)
            piece = self._stored(piece.view(1, -1))
            begin = start if self.code_bits == 8 else start // 2
            codes[begin : begin + piece.numel()] = piece
            first = start // width
            for name, value in numbers.items():
                stats[name][first : first + value.numel()] = value
        return codes, stats, whole

    def encode(self, x: Tensor, *, generator: CounterGenerator | None = None) -> dict[str, Tensor]:
        codes, stats, whole = self._encode_flat(x, generator)
        if self.code_bits == 8:
            codes = codes.view(x.shape)
        return {"codes": codes, **stats, **whole}

    def block_numbers(
        self, parts: Mapping[str, Tensor], first: int, last: int
    ) -> dict[str, Tensor]:
        """Return the per-block numbers of blocks ``first .. last`` as the arithmetic wants them."""
        return {name: parts[name][first:last] for name in self.block_spec()}

    def decode_range(
        self, parts: Mapping[str, Tensor], shape: Shape, start: int, stop: int
    ) -> Tensor:
        self._check_range(shape, start, stop)
        if start == stop:
            return torch.empty(0, dtype=torch.float32, device=parts["codes"].device)
        width, count = self.block_size, stop - start
        stored = parts["codes"].view(-1)
        if self.code_bits == 8:
            unit = self._unit(stored[start:stop], count)
        else:
            unit = self._unit(stored[start // 2 : -(-stop // 2)], count)
        numbers = self.block_numbers(parts, start // width, -(-stop // width))
        whole = {name: parts[name] for name in self.whole_spec()}
        full = count // width
        head = self.expand(
            unit[: full * width].view(full, width),
            {name: value[:full, None] for name, value in numbers.items()},
            whole,
        ).reshape(-1)
        if full * width == count:
            return head
        tail = self.expand(
            unit[full * width :].view(1, -1),
            {name: value[full:, None] for name, value in numbers.items()},
            whole,
        ).reshape(-1)
        return torch.cat([head, tail])

    def max_error(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        flat = x.detach().reshape(-1).to(torch.float32)
        whole = self._whole_parts(flat)
        full = flat.numel() - flat.numel() % self.block_size
        pieces = [flat[:full].view(full // self.block_size, self.block_size)]
        if full < flat.numel():
            pieces.append(flat[full:].view(1, -1))
        bounds = [self.block_error(piece, stochastic, whole).reshape(-1) for piece in pieces]
        return torch.cat(bounds).view(x.shape)


@dataclass(frozen=True)
class RowCodec(BlockCodec):
    """Blocks along the last axis."""

    @property
    def per_tensor(self) -> bool:
        """Whether there are no per-block numbers at all."""
        return not self.block_spec()

    def spec(self, shape: Shape) -> dict[str, TensorSpec]:
        lead, cols = _rows_of(shape)
        if self.code_bits == 8:
            codes = TensorSpec(tuple(shape), self.code_dtype)
        else:
            codes = TensorSpec((*lead, -(-cols // 2)), torch.uint8)
        stats = {
            name: TensorSpec((*lead, self._groups(cols)), dtype)
            for name, dtype in self.block_spec().items()
        }
        whole = {name: TensorSpec((), dtype) for name, dtype in self.whole_spec().items()}
        return {"codes": codes, **stats, **whole}

    def encode_granule(self, shape: Shape) -> int:
        if self.whole_spec():
            return max(math.prod(shape), 1)
        return self.decode_granule(shape)

    def decode_granule(self, shape: Shape) -> int:
        return max(_rows_of(shape)[1], 1)

    def encode(self, x: Tensor, *, generator: CounterGenerator | None = None) -> dict[str, Tensor]:
        check_input(x, self.name)
        shape = tuple(x.shape)
        cols = _rows_of(shape)[1]
        flat = x.detach().reshape(-1)
        whole = self._whole_parts(flat)
        parts = self.empty_parts(shape, x.device)
        cursors = dict.fromkeys(parts, 0)
        for start, stop in slabs(flat.numel(), max(cols, 1), target=slab_elements(x.device)):
            blocks = self._blocks(flat[start:stop].to(torch.float32).view(-1, cols))
            uniform = None
            if generator is not None:
                uniform = generator.uniform(start, stop - start, device=x.device)
                uniform = self._blocks(uniform.view(-1, cols))
            codes, numbers = self.encode_blocks(blocks, uniform, whole)
            rows = codes.view((stop - start) // cols, -1)[:, :cols]
            for name, value in {"codes": self._stored(rows), **numbers}.items():
                count = value.numel()
                parts[name].view(-1)[cursors[name] : cursors[name] + count] = value.reshape(-1)
                cursors[name] += count
        for name, value in whole.items():
            parts[name].copy_(value)
        return parts

    def decode_range(
        self, parts: Mapping[str, Tensor], shape: Shape, start: int, stop: int
    ) -> Tensor:
        self._check_range(shape, start, stop)
        if start == stop:
            return torch.empty(0, dtype=torch.float32, device=parts["codes"].device)
        cols = max(_rows_of(shape)[1], 1)
        first, last = start // cols, -(-stop // cols)
        count = stop - start
        groups, width = self._groups(cols), self._width(cols)
        stored_cols = cols if self.code_bits == 8 else -(-cols // 2)
        stored = parts["codes"].view(-1)[first * stored_cols : last * stored_cols]
        unit = self._unit(stored, stored.numel() * (1 if self.code_bits == 8 else 2))
        unit = unit.view(last - first, -1)[:, :cols]
        whole = {name: parts[name] for name in self.whole_spec()}
        stats = {
            name: parts[name].view(-1)[first * groups : last * groups].view(-1, 1)
            for name in self.block_spec()
        }
        if groups * width == cols:
            blocks = unit.reshape(-1, width)
            return self.expand(blocks, stats, whole).reshape(count)
        padded = self._blocks(unit)
        values = self.expand(padded, stats, whole)
        return values.view(last - first, -1)[:, :cols].reshape(count)

    def max_error(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        if x.numel() == 0:
            return torch.zeros(x.shape, device=x.device)
        flat = x.detach().reshape(-1).to(torch.float32)
        cols = _rows_of(tuple(x.shape))[1]
        bound = self.block_error(
            self._blocks(flat.view(-1, cols)), stochastic, self._whole_parts(flat)
        )
        return bound.reshape(flat.numel() // cols, -1)[:, :cols].reshape(x.shape)

    def _width(self, cols: int) -> int:
        return self.block_size if self.block_size else max(cols, 1)

    def _groups(self, cols: int) -> int:
        return -(-cols // self._width(cols))

    def _blocks(self, rows: Tensor) -> Tensor:
        """Cut (rows, cols) into (rows * groups, width); a short last group is zero-padded."""
        cols = rows.shape[1]
        missing = self._groups(cols) * self._width(cols) - cols
        if missing:
            rows = torch.nn.functional.pad(rows, (0, missing))
        return rows.reshape(-1, self._width(cols))


def _rows_of(shape: Shape) -> tuple[Shape, int]:
    """Return the leading axes and the row length; a scalar is one row of one element."""
    return (tuple(shape[:-1]), shape[-1]) if shape else ((), 1)
