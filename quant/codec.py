"""The contract every codec obeys: a tensor in, a few named plain tensors ("parts") out, and back.

Guarantees that each codec gives, and that one conformance table tests:

* **Sizes in advance.**  ``spec(shape)`` names every part with its shape and dtype before any data
  exists; ``nbytes(shape)`` is their sum.
* **Ranges.**  Elements are numbered row-major.  A range that starts at a multiple of
  ``encode_granule(shape)`` (and ends at one, or at the end) can be encoded apart from the rest:
  the parts of the pieces, flattened and joined, are the flattened parts of the whole.  A range at
  ``decode_granule(shape)`` can be decoded apart from the rest.  Same bits, always.
* **Same bits on every call**: encoding is a pure function of the values and, for stochastic
  rounding, of (seed, element index).
* **Error bound.**  ``max_error(x)`` bounds |decode(encode(x)) - x| element by element, for
  magnitudes up to 2^127 (above it, rounding up may overflow fp32).
* **Not-a-number is never hidden.**  If the values that share a scale hold a NaN or an infinity,
  all of them decode to NaN.  (A tensor-wide statistic poisons the whole tensor.)
* Zeros decode to zeros; an all-zero block decodes to zeros; empty tensors are legal.

Parts are ordinary contiguous tensors; bit patterns of formats without full torch support (FP8,
FP4, E8M0) are uint8.  Arithmetic is fp32; fp64 input is rounded to fp32 first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Final

import torch
from torch import Tensor

from .rounding import CounterGenerator, slab_elements, slabs
from .spec import TensorSpec

Shape = tuple[int, ...]

#: Bytes of scratch that decoding an element may take, the greediest codec's (range expansion).
_SCRATCH_BYTES_PER_ELEMENT: Final = 64


@dataclass(frozen=True)
class Codec(ABC):
    """Quantise and dequantise tensors; subclasses are frozen dataclasses of JSON-able fields.

    >>> import torch
    >>> from headrace.quant import codec_for_format
    >>> codec = codec_for_format("nf4")
    >>> weight = torch.linspace(-1, 1, 128).reshape(2, 64)
    >>> parts = codec.encode(weight)
    >>> decoded = codec.decode(parts, (2, 64), torch.float32)
    >>> codec.nbytes((2, 64)), tuple(decoded.shape)
    (74, (2, 64))
    """

    #: The word that names the format in file headers; unique among codecs.
    name: ClassVar[str]

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Consecutive elements that share a scale; 0 if a whole row or the whole tensor does."""

    @abstractmethod
    def spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return name -> spec of every part of an encoded tensor of this shape."""

    @abstractmethod
    def encode_granule(self, shape: Shape) -> int:
        """Ranges that start at multiples of this many elements may be encoded separately."""

    @abstractmethod
    def decode_granule(self, shape: Shape) -> int:
        """Ranges that start at multiples of this many elements may be decoded separately."""

    @abstractmethod
    def encode(self, x: Tensor, *, generator: CounterGenerator | None = None) -> dict[str, Tensor]:
        """Encode a floating-point tensor of any shape on its own device.

        Rounds to nearest, or stochastically (unbiased inside the representable range) if a
        ``generator`` is given.  Scratch memory is bounded, apart from the parts themselves.
        """

    @abstractmethod
    def decode_range(
        self, parts: Mapping[str, Tensor], shape: Shape, start: int, stop: int
    ) -> Tensor:
        """Decode elements ``start .. stop`` to a flat fp32 tensor.

        ``start`` is a multiple of ``decode_granule(shape)``; ``stop`` is one too, or the number
        of elements.  ``parts`` are those of the *whole* tensor.  Scratch grows with the range.
        """

    @abstractmethod
    def max_error(self, x: Tensor, *, stochastic: bool = False) -> Tensor:
        """Bound |decode(encode(x)) - x| for every element; fp32, shape of ``x``, finite input."""

    # -- common to all ------------------------------------------------------------------------

    def nbytes(self, shape: Shape) -> int:
        """Return the bytes of all parts of an encoded tensor of this shape."""
        return sum(spec.nbytes for spec in self.spec(shape).values())

    def decode(
        self,
        parts: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Decode the parts to a tensor of ``shape`` and ``dtype`` on the parts' device.

        ``out``, if given, is a contiguous tensor of that shape and dtype which is filled and
        returned.  Values are computed in fp32 and rounded once to ``dtype``.  Scratch is at most
        ``decode_scratch_bytes``, whatever the shape.
        """
        shape = tuple(shape)
        device = self.check_parts(parts, shape)
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=device)
        elif tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
            raise ValueError(
                f"out has shape {tuple(out.shape)} and dtype {out.dtype}; decoding needs a "
                f"contiguous tensor of shape {shape} and dtype {dtype}"
            )
        self._fill(parts, shape, out.view(-1), 0)
        return out

    def decode_slice(
        self,
        parts: Mapping[str, Tensor],
        shape: Shape,
        start: int,
        stop: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Decode any elements ``start .. stop`` of the whole tensor to a flat tensor.

        Decodes only the granules they lie in; scratch as for ``decode``.
        """
        shape = tuple(shape)
        device = self.check_parts(parts, shape)
        if not 0 <= start <= stop <= math.prod(shape):
            raise ValueError(
                f"elements {start}..{stop} are outside a tensor of shape {shape} "
                f"(codec {self.name!r})"
            )
        out = torch.empty(stop - start, dtype=dtype, device=device)
        self._fill(parts, shape, out, start)
        return out

    def _fill(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor, start: int) -> None:
        """Decode the elements from ``start`` on into flat ``out``, slab by slab."""
        stop, granule = start + out.numel(), self.decode_granule(shape)
        begin = start // granule * granule
        target = slab_elements(out.device)
        for low, high in slabs(stop - begin, granule, target=target):
            first, last = begin + low, min(begin + -(-high // granule) * granule, math.prod(shape))
            piece = self.decode_range(parts, shape, first, last)
            left, right = max(first, start), min(last, stop)
            out[left - start : right - start].copy_(piece[left - first : right - first])

    def decode_scratch_bytes(self, shape: Shape, device: torch.device) -> int:
        """Bound the bytes that ``decode`` allocates beside its result and frees again."""
        elements = max(slab_elements(device), self.decode_granule(tuple(shape)))
        return min(elements, math.prod(shape)) * _SCRATCH_BYTES_PER_ELEMENT + (1 << 16)

    def check_parts(self, parts: Mapping[str, Tensor], shape: Shape) -> torch.device:
        """Refuse parts that are not those of a tensor of ``shape``; return their device."""
        expected = self.spec(tuple(shape))
        if set(parts) != set(expected):
            raise ValueError(
                f"codec {self.name!r} needs the parts {sorted(expected)}, got {sorted(parts)}"
            )
        device: torch.device | None = None
        for part_name, spec in expected.items():
            part = parts[part_name]
            if tuple(part.shape) != spec.shape or part.dtype != spec.dtype:
                raise ValueError(
                    f"part {part_name!r} of codec {self.name!r} has shape {tuple(part.shape)} and "
                    f"dtype {part.dtype}; a tensor of shape {tuple(shape)} needs {spec.shape} and "
                    f"{spec.dtype}"
                )
            if device is not None and part.device != device:
                raise ValueError(
                    f"part {part_name!r} of codec {self.name!r} is on {part.device}, the others "
                    f"are on {device}; move them to one device"
                )
            device = part.device
        assert device is not None, "a codec has at least one part"
        return device

    def parameters(self) -> dict[str, str | int | float | bool | None]:
        """Return what a file header must say to rebuild this codec: its name and its fields."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"codec": self.name, **own}

    def empty_parts(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        """Return uninitialised parts for a tensor of this shape."""
        return {
            part_name: torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for part_name, spec in self.spec(shape).items()
        }

    def _check_range(self, shape: Shape, start: int, stop: int) -> None:
        numel, granule = math.prod(shape), self.decode_granule(shape)
        legal_stop = stop == numel or stop % granule == 0
        if not 0 <= start <= stop <= numel or start % granule or not legal_stop:
            raise ValueError(
                f"codec {self.name!r} cannot decode elements {start}..{stop} of shape {shape}: "
                f"ranges lie within 0..{numel} at multiples of {granule}"
            )


def check_input(x: Tensor, codec_name: str) -> None:
    """Refuse tensors that no codec can encode (integers, complex numbers, 8-bit floats)."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            f"codec {codec_name!r} encodes float32, bfloat16, float16 and float64 tensors, got "
            f"{x.dtype} of shape {tuple(x.shape)}; cast it first"
        )
