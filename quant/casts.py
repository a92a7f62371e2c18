"""Plain casts as codecs: bf16, and fp16 with one scale for the tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from .codec import Codec, Shape, check_input
from .rounding import CounterGenerator, bfloat16_stochastic
from .scales import poison, quotient
from .spec import TensorSpec


@final
@dataclass(frozen=True)
class Bfloat16Codec(Codec):
    """Values rounded to bf16: part ``codes`` (bf16, shape); relative error at most 2^-8.

    >>> Bfloat16Codec().nbytes((3,))
    6
    """

    name: ClassVar[str] = "bfloat16"

    @property
    def block_size(self) -> int:
        return 1

    def spec(self, shape: Shape) -> dict[str, TensorSpec]:
        return {"codes": TensorSpec(tuple(shape), torch.bfloat16)}

    def encode_granule(self, shape: Shape) -> int:
        return 1

    def decode_granule(self, shape: Shape) -> int:
        return 1

    def encode(self, x: Tensor, *, generator: CounterGenerator | None = None) -> dict[str, Tensor]:
        check_input(x, self.name)
        x = x.detach().to(torch.float32).contiguous()
        return {"codes": x.bfloat16() if generator is None else bfloat16_stochastic(x, generator)}

    def decode_range(
        self, parts: Mapping[str, Tensor], shape: Shape, start: int, stop: int
    ) -> Tensor:
        self._check_range(shape, start, stop)
        return parts["codes"].reshape(-1)[start:stop].to(torch.float32)

    def max_error(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        return x.detach().to(torch.float32).abs() * 2.0 ** (-7 if stochastic else -8) + 2.0**-133


_FP16_LARGEST: Final = 65504.0


@final
@dataclass(frozen=True)
class ScaledFloat16Codec(Codec):
    """Values as fp16 times one fp32 scale, as FP8-LM keeps second moments (arXiv:2310.18313).

    Parts: ``codes`` (fp16, shape) and ``scale`` (fp32, ``()``): the largest magnitude becomes
    65504.  The scale is a power of two, so that only the cast rounds.  Values are always rounded
    to nearest: fp16 is finer than any step an optimizer could lose here.

    >>> codec = ScaledFloat16Codec()
    >>> codec.decode(codec.encode(torch.tensor([1e-12, 3e-10])), (2,)).gt(0).all()
    tensor(True)
    """

    name: ClassVar[str] = "scaled_float16"

    @property
    def block_size(self) -> int:
        return 0

    def spec(self, shape: Shape) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec(tuple(shape), torch.float16),
            "scale": TensorSpec((), torch.float32),
        }

    def encode_granule(self, shape: Shape) -> int:
        return max(math.prod(shape), 1)

    def decode_granule(self, shape: Shape) -> int:
        return 1

    def encode(self, x: Tensor, *, generator: CounterGenerator | None = None) -> dict[str, Tensor]:
        check_input(x, self.name)
        values = x.detach().to(torch.float32)
        scale = self._scale(values)
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        return {"codes": (values / safe).to(torch.float16).contiguous(), "scale": scale}

    def decode_range(
        self, parts: Mapping[str, Tensor], shape: Shape, start: int, stop: int
    ) -> Tensor:
        self._check_range(shape, start, stop)
        return parts["codes"].reshape(-1)[start:stop].to(torch.float32) * parts["scale"]

    def max_error(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        values = x.detach().to(torch.float32)
        return values.abs() * 2.0**-11 + self._scale(values) * 2.0**-25 + 2.0**-149

    @staticmethod
    def _scale(values: Tensor) -> Tensor:
        if values.numel() == 0:
            return torch.zeros((), device=values.device)
        amax = poison(values.abs().amax())
        _, exponent = torch.frexp(quotient(amax, _FP16_LARGEST))
        power = torch.ldexp(torch.ones_like(amax), exponent.clamp(-120, 127))
        return torch.where(amax == 0, amax, torch.where(torch.isnan(amax), amax, power))
