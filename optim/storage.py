"""How states are kept: in fp32, or encoded by a codec between steps.

An encoding names one codec for first moments (signed) and one for second moments (positive).
Plain states (projectors, counters) are never encoded.  The parts of an encoded state ``exp_avg``
are called ``exp_avg.codes``, ``exp_avg.absmax`` and so on.

| encoding    | first moment          | second moment         | bytes a parameter (Adam) |
|-------------|-----------------------|-----------------------|--------------------------|
| `fp32`      | fp32                  | fp32                  | 8                        |
| `bf16`      | bf16, stochastic      | bf16, stochastic      | 4                        |
| `int8`      | companded 8-bit       | companded 8-bit       | 2.0625                   |
| `int8_dynamic` | dynamic map        | dynamic map           | 2.031                    |
| `fp8`       | E4M3                  | E4M3                  | 2.031                    |
| `coat`      | range-expanded E4M3   | range-expanded E4M3   | 2.078                    |
| `fp8_lm`    | E4M3, one scale       | fp16, one scale       | 3                        |
| `int4`      | companded 4-bit       | companded 4-bit       | 1.125                    |
| `int4_torchao` | dynamic 4-bit      | linear 4-bit          | 1.0625                   |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..quant.casts import Bfloat16Codec, ScaledFloat16Codec
from ..quant.coat import CoatCodec
from ..quant.codec import Codec
from ..quant.companded import Companded4Codec, Companded8Codec
from ..quant.int8_blockwise import Int8BlockwiseCodec
from ..quant.rounding import CounterGenerator
from ..quant.state_tables import Fp8BlockwiseCodec, State4BitCodec
from .base import Kind, Slot
from .seeds import fold_in
from .spec import Shape, StateSpec


@final
@dataclass(frozen=True)
class Encoding:
    """Codecs for the two kinds of moments; None keeps fp32.

    ``stochastic`` rounds to the codec's grid by counter noise, for formats so coarse that a slow
    average would otherwise stand still.  ``lift_zeros`` gives second moments that are not zero
    the smallest code that is not: a second moment lost to underflow makes the update explode.
    """

    name: str
    signed: Codec | None
    positive: Codec | None
    stochastic: bool = False
    lift_zeros: bool = False

    def codec(self, kind: Kind) -> Codec | None:
        """Return the codec of a kind of state."""
        if kind is Kind.SIGNED:
            return self.signed
        return self.positive if kind is Kind.POSITIVE else None

    @property
    def granule(self) -> int | None:
        """Elements at whose multiples states may be cut; None if they may not be cut at all."""
        granules = [1]
        for codec in (self.signed, self.positive):
            if codec is None:
                continue
            # A codec that looks at the whole tensor has a granule that grows with the shape.
            granule = codec.encode_granule((1 << 20,))
            if codec.encode_granule((1 << 21,)) != granule:
                return None
            granules.append(granule)
        return math.lcm(*granules)

    def state_spec(self, slots: Mapping[str, Slot]) -> StateSpec:
        """Return name -> spec of the tensors that keep the given slots."""
        spec: StateSpec = {}
        for name, slot in slots.items():
            codec = self.codec(slot.kind)
            if codec is None:
                spec[name] = slot.spec
            else:
                parts = codec.spec(slot.spec.shape)
                spec |= {f"{name}.{part}": one for part, one in parts.items()}
        return spec

    def decode(self, slots: Mapping[str, Slot], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the states as bricks want them; states that are not encoded are not copied."""
        return {name: self._decode_one(name, slot, kept) for name, slot in slots.items()}

    def encode(
        self,
        slots: Mapping[str, Slot],
        states: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        noise: CounterGenerator,
    ) -> None:
        """Write the bricks' states back into the kept tensors."""
        for index, (name, slot) in enumerate(slots.items()):
            codec = self.codec(slot.kind)
            if codec is None:
                continue
            generator = None
            if self.stochastic:
                generator = CounterGenerator(fold_in(noise.seed, index + 1), noise.element_offset)
            parts = codec.encode(states[name], generator=generator)
            if self.lift_zeros and slot.kind is Kind.POSITIVE:
                lost = (states[name] > 0) & (parts["codes"] == 0)
                parts["codes"] = parts["codes"] + lost.to(parts["codes"].dtype)
            for part, value in parts.items():
                kept[f"{name}.{part}"].copy_(value.view(kept[f"{name}.{part}"].shape))

    def _decode_one(self, name: str, slot: Slot, kept: Mapping[str, Tensor]) -> Tensor:
        codec = self.codec(slot.kind)
        if codec is None:
            return kept[name]
        shape: Shape = slot.spec.shape
        parts = {part: kept[f"{name}.{part}"] for part in codec.spec(shape)}
        return codec.decode(parts, shape, torch.float32)


def encodings() -> dict[str, Encoding]:
    """Return every encoding by its name.

    >>> encodings()["int8"].granule
    128
    """
    return {
        one.name: one
        for one in (
            Encoding("fp32", None, None),
            Encoding("bf16", Bfloat16Codec(), Bfloat16Codec(), stochastic=True),
            Encoding("int8", Companded8Codec(), Companded8Codec(signed=False)),
            Encoding(
                "int8_dynamic",
                Int8BlockwiseCodec(),
                Int8BlockwiseCodec(signed=False),
                lift_zeros=True,
            ),
            Encoding(
                "fp8", Fp8BlockwiseCodec(), Fp8BlockwiseCodec(), stochastic=True, lift_zeros=True
            ),
            Encoding("coat", CoatCodec(), CoatCodec()),
            Encoding("fp8_lm", Fp8BlockwiseCodec(block_size=1 << 40), ScaledFloat16Codec()),
            Encoding(
                "int4", Companded4Codec(64), Companded4Codec(64, signed=False), stochastic=True
            ),
            Encoding("int4_torchao", State4BitCodec(), State4BitCodec(signed=False)),
        )
    }


def encoding_of(name: str) -> Encoding:
    """Return the encoding of this name, else raise."""
    known = encodings()
    if name not in known:
        raise ValueError(f"states={name!r} is unknown; choose one of {sorted(known)}")
    return known[name]
