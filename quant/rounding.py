"""Counter-based random numbers and stochastic rounding.

The random bits of an element are a pure function of (seed, element index).  Guarantees: any
tiling, any order and any thread count give the same bits; integer arithmetic only, so every
device gives the same bits; the global generators of torch are neither read nor moved.

The mixing function is the two-multiply 32-bit integer finaliser of C. Wellons ("lowbias32"),
applied twice with a 64-bit key that a splitmix64 step derives from the seed.  It is a rounding
dither, not a source of Gaussian directions and not a cryptographic generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_MASK32 = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def seed_key(seed: int) -> tuple[int, int]:
    """Return the two 32-bit key words (low, high) that a 64-bit seed stands for (splitmix64).

    >>> seed_key(0) != seed_key(1)
    True
    """
    z = (seed + 0x9E37_79B9_7F4A_7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK64
    z ^= z >> 31
    return z & _MASK32, z >> 32


def _mix32(x: Tensor) -> Tensor:
    # x holds 32-bit values in int64; products may wrap past 2^63, the mask keeps the right bits.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB_352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846C_A68B) & _MASK32
    return x ^ (x >> 16)


@final
@dataclass(frozen=True, slots=True)
class CounterGenerator:
    """A stream of random numbers addressed by element index.

    ``seed`` is any 64-bit integer; ``element_offset`` is the index, within the whole parameter,
    of the first element that will be asked for as index 0.  Memory: 8 bytes an element while
    numbers are made.

    >>> whole = CounterGenerator(seed=7).bits(0, 8)
    >>> tail = CounterGenerator(seed=7, element_offset=4).bits(1, 3)
    >>> torch.equal(whole[5:], tail)
    True
    """

    seed: int
    element_offset: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= _MASK64:
            raise ValueError(f"seed {self.seed} is outside 0 .. 2**64-1; reduce it modulo 2**64")
        if self.element_offset < 0:
            raise ValueError(f"element_offset {self.element_offset} is negative")

    def shifted(self, elements: int) -> CounterGenerator:
        """Return the same stream with index 0 moved ``elements`` further."""
        return CounterGenerator(self.seed, self.element_offset + elements)

    def bits(self, start: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
        """Return 32 random bits for each of ``count`` elements from ``start``, as int64."""
        low_key, high_key = seed_key(self.seed)
        first = self.element_offset + start
        index = torch.arange(first, first + count, dtype=torch.int64, device=device)
        inner = _mix32((index & _MASK32) ^ low_key)
        return _mix32(inner ^ (index >> 32) ^ high_key)

    def uniform(self, start: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
        """Return fp32 uniforms in [0, 1), multiples of 2^-24, for ``count`` elements."""
        return (self.bits(start, count, device=device) >> 8).to(torch.float32) * 2.0**-24


def round_half_even(x: Tensor) -> Tensor:
    """Round fp32 values to integers, ties to even."""
    return torch.round(x)


def round_stochastic(x: Tensor, uniform: Tensor) -> Tensor:
    """Round fp32 values to one of the two nearest integers, unbiased.

    The value x becomes floor(x) + 1 with probability x - floor(x); integers stay put.
    """
    low = torch.floor(x)
    return low + (uniform < (x - low)).to(x.dtype)


def bfloat16_stochastic(x: Tensor, generator: CounterGenerator) -> Tensor:
    """Round an fp32 tensor to bf16 stochastically: add 16 random bits, cut the low 16.

    Unbiased within a binade; NaN stays NaN, infinities stay, and a finite value near the top of
    the range may round to infinity as nearest rounding does.  Element i uses the low 16 random
    bits of index i.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"bfloat16_stochastic takes float32, got {x.dtype}; cast first")
    flat = x.detach().reshape(-1)
    out = torch.empty(flat.shape, dtype=torch.bfloat16, device=x.device)
    for start, stop in slabs(flat.numel(), 1):
        piece = flat[start:stop].contiguous()
        noise = generator.bits(start, stop - start, device=x.device) & 0xFFFF
        bits = (piece.view(torch.int32).to(torch.int64) & _MASK32) + noise
        high = ((bits >> 16) & 0xFFFF).to(torch.int32)
        high = torch.where(high >= 0x8000, high - 0x10000, high).to(torch.int16)
        rounded = high.view(torch.bfloat16)
        out[start:stop] = torch.where(torch.isfinite(piece), rounded, piece.to(torch.bfloat16))
    return out.view(x.shape)


def slab_elements(device: torch.device) -> int:
    """Return how many elements to work on at once: within a CPU's caches, or enough to fill an
    accelerator."""
    return 1 << 18 if device.type == "cpu" else 1 << 22


def slabs(count: int, granule: int, *, target: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Cut ``count`` elements into ranges that start at multiples of ``granule``.

    Ranges hold about ``target`` elements, so that scratch memory does not grow with the tensor.

    >>> list(slabs(10, 4, target=4))
    [(0, 4), (4, 8), (8, 10)]
    """
    step = max(target // max(granule, 1), 1) * max(granule, 1)
    for start in range(0, count, step):
        yield start, min(start + step, count)
