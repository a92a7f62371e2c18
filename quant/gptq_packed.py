"""The storage layout of GPTQ checkpoints: 4-bit codes packed down the input axis in int32.

So that such a checkpoint is streamed as it is: decoding reads its own tensors.  ``qweight`` holds
eight codes of one output column in an int32, lowest bits first; ``qzeros`` packs the zero points
of eight outputs, stored minus one; ``scales`` are fp16; ``g_idx`` names each input's group (any
order: that is how activation order is stored).  w[o, i] = scales[g, o] * (q - zero), g = g_idx[i].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from .codec import Codec, Shape, check_input
from .int4_group import Int4GroupCodec
from .rounding import CounterGenerator, round_half_even, round_stochastic
from .scales import block_amax, divide, poison, quotient, to_codes
from .spec import TensorSpec

_PER_WORD = 8  # 4-bit codes in an int32


@final
@dataclass(frozen=True)
class GptqPackedCodec(Codec):
    """INT4 groups of a matrix (out, in) in the layout of GPTQ checkpoints.

    Parts: ``qweight`` (in / 8, out) int32, ``qzeros`` (groups, out / 8) int32, ``scales``
    (groups, out) fp16, ``g_idx`` (in,) int32.  Both axes must be multiples of 8 and the input
    axis one of ``block_size``.  Encoding is symmetric, zero point 8, scale amax / 7, groups in
    order; worst error half a scale.  Cost: 4 + 20 / block_size bits, and 32 / out.

    >>> codec = GptqPackedCodec(block_size=8)
    >>> sorted(codec.spec((16, 8)))
    ['g_idx', 'qweight', 'qzeros', 'scales']
    """

    name: ClassVar[str] = "gptq_packed"

    block_size: int = 128

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} of codec {self.name!r} is below 1")

    def spec(self, shape: Shape) -> dict[str, TensorSpec]:
        rows, cols = self._check_shape(shape)
        groups = cols // self.block_size
        return {
            "qweight": TensorSpec((cols // _PER_WORD, rows), torch.int32),
            "qzeros": TensorSpec((groups, rows // _PER_WORD), torch.int32),
            "scales": TensorSpec((groups, rows), torch.float16),
            "g_idx": TensorSpec((cols,), torch.int32),
        }

    def encode_granule(self, shape: Shape) -> int:
        rows, cols = self._check_shape(shape)
        return max(rows * cols, 1)

    def decode_granule(self, shape: Shape) -> int:
        return max(self._check_shape(shape)[1] * _PER_WORD, 1)

    def encode(self, x: Tensor, *, generator: CounterGenerator | None = None) -> dict[str, Tensor]:
        check_input(x, self.name)
        rows, cols = self._check_shape(tuple(x.shape))
        groups = cols // self.block_size
        blocks = x.detach().to(torch.float32).reshape(-1, self.block_size)
        scale = self._scale(blocks)
        scaled = divide(blocks, scale.to(torch.float32))
        if generator is None:
            rounded = round_half_even(scaled)
        else:
            uniform = generator.uniform(0, x.numel(), device=x.device)
            rounded = round_stochastic(scaled, uniform.view(scaled.shape))
        codes = (to_codes(rounded.clamp(-7.0, 7.0)) + 8).view(rows, cols)
        zeros = torch.full((groups, rows), 7, dtype=torch.int32, device=x.device)
        group_of = torch.arange(cols, device=x.device) // self.block_size
        return {
            "qweight": _pack(codes.t().contiguous()),
            "qzeros": _pack(zeros.t().contiguous()).t().contiguous(),
            "scales": scale.view(rows, groups).t().contiguous(),
            "g_idx": group_of.to(torch.int32),
        }

    def decode_range(
        self, parts: Mapping[str, Tensor], shape: Shape, start: int, stop: int
    ) -> Tensor:
        self._check_range(shape, start, stop)
        cols = max(shape[1], 1)
        first, last = start // cols, stop // cols
        group_of = parts["g_idx"].long()
        codes = _unpack(parts["qweight"][:, first:last])
        zeros = _unpack(parts["qzeros"][:, first // _PER_WORD : last // _PER_WORD].t()).t() + 1
        scales = parts["scales"][:, first:last].to(torch.float32)
        values = (codes - zeros[group_of]).to(torch.float32) * scales[group_of]
        return values.t().reshape(-1)

    def max_error(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        blocks = x.detach().to(torch.float32).reshape(-1, self.block_size)
        scale = self._scale(blocks).to(torch.float32)[:, None]
        amax = block_amax(blocks)[:, None]
        bound = scale * (1.0 if stochastic else 0.5) + amax * 2.0**-10 + 32 * 2.0**-24
        return bound.expand(blocks.shape).reshape(x.shape)

    @staticmethod
    def _scale(blocks: Tensor) -> Tensor:
        return poison(quotient(block_amax(blocks), 7.0).to(torch.float16))

    def _check_shape(self, shape: Shape) -> tuple[int, int]:
        fits = len(shape) == 2 and not shape[0] % _PER_WORD and not shape[1] % _PER_WORD
        if not fits or shape[1] % self.block_size:
            raise ValueError(
                f"codec {self.name!r} holds matrices (out, in) with both axes multiples of "
                f"{_PER_WORD} and in a multiple of {self.block_size}, got shape {tuple(shape)}"
            )
        return shape[0], shape[1]


def packed_from_groups(
    codec: Int4GroupCodec, parts: Mapping[str, Tensor], shape: Shape
) -> tuple[GptqPackedCodec, dict[str, Tensor]]:
    """Repack signed INT4 groups with fp16 scales (as GPTQ chose them) in this layout.

    Both decode to the same numbers.
    """
    if codec.mode != "signed" or codec.scale_dtype != "float16":
        raise ValueError(
            f"only signed groups with float16 scales can be repacked, got {codec.parameters()}"
        )
    packed = GptqPackedCodec(block_size=codec.block_size)
    packed.spec(shape)
    codec.check_parts(parts, shape)
    rows, cols = shape
    pairs = parts["codes"].to(torch.int32)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).reshape(rows, cols)
    zeros = torch.full((rows, cols // codec.block_size), 7, dtype=torch.int32, device=codes.device)
    group_of = torch.arange(cols, device=codes.device) // codec.block_size
    return packed, {
        "qweight": _pack(codes.t().contiguous()),
        "qzeros": _pack(zeros).t().contiguous(),
        "scales": parts["scale"].t().contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def _pack(codes: Tensor) -> Tensor:
    """Pack int32 codes (n, m) eight to a word down the first axis: (n / 8, m) int32."""
    rows = codes.view(codes.shape[0] // _PER_WORD, _PER_WORD, codes.shape[1])
    words = torch.zeros_like(rows[:, 0])
    for place in range(_PER_WORD):
        words |= rows[:, place] << (4 * place)
    return words


def _unpack(words: Tensor) -> Tensor:
    """Undo ``_pack``: (n / 8, m) int32 to (n, m) int32 codes."""
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = (words[:, None, :] >> places[None, :, None]) & 15
    return codes.reshape(-1, words.shape[1])
