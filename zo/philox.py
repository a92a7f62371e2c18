"""Philox4x32-10 and the maps from its words to noise, in device-independent torch arithmetic.

This is the specification of Headrace's noise and the oracle of the host kernels.  Integers live in
int64 tensors (products wrap modulo 2^64, which keeps all the bits that are used); floating point is
fp32 and uses only conversion, addition, multiplication and square root, one operation at a time,
each correctly rounded by IEEE 754.  No library logarithm or cosine is called, so CPU, CUDA and the
numba kernels give the same bits for every kind, Gaussian included.

Generator: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF

# ln(1 + t) = t + t^2 * Q(t) for t in [sqrt(1/2) - 1, sqrt(2) - 1]: Chebyshev fit of degree 7,
# absolute error 2.4e-8.  Lowest power first.
LOG_COEFFICIENTS = (
    -0.4999999403953552,
    0.33333659172058105,
    -0.25001609325408936,
    0.19973105192184448,
    -0.16575047373771667,
    0.14806459844112396,
    -0.14257794618606567,
    0.09004202485084534,
)
# sin(2 pi t) = t * S(t^2) and cos(2 pi t) = C(t^2) for t in [-1/8, 1/8] turns, error 6e-8.
SIN_COEFFICIENTS = (6.2831854820251465, -41.3416633605957, 81.59254455566406, -75.40184020996094)
COS_COEFFICIENTS = (1.0, -19.739152908325195, 64.9212417602539, -83.59221649169922)
SQRT_HALF_BITS = 0x3F3504F3
LN2 = 0.6931471824645996  # fp32
INV_2_32 = 2.0**-32
# A byte has variance (256^2 - 1) / 12; the sum of four of them has standard deviation 147.80.
BYTE_SUM_MEAN = 510
BYTE_SUM_SCALE = float(torch.tensor(1.0 / math.sqrt(4 * (256**2 - 1) / 12), dtype=torch.float32))


def philox_words(
    counters: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encrypt four int64 tensors of 32-bit counter words under a key of two 32-bit words.

    Returns four int64 tensors of the same shape that hold values in [0, 2^32).

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(int(word)) for word in philox_words((zero, zero, zero, zero), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        high_0, low_0 = (product_0 >> 32) & MASK, product_0 & MASK
        high_1, low_1 = (product_1 >> 32) & MASK, product_1 & MASK
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def block_words(
    first_block: int,
    blocks: int,
    *,
    seed: int,
    stream: int,
    direction: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Words of consecutive counter blocks: int64 [blocks, 4], values in [0, 2^32)."""
    index = torch.arange(first_block, first_block + blocks, dtype=torch.int64, device=device)
    counters = (
        index & MASK,
        index >> 32,
        torch.full_like(index, stream),
        torch.full_like(index, direction),
    )
    return torch.stack(philox_words(counters, (seed & MASK, seed >> 32)), dim=1)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x
        value = value + coefficient
    return value


def gaussian_from_words(words: Tensor) -> Tensor:
    """Box-Muller on lane pairs: int64 [blocks, 4] -> fp32 [blocks * 4] of standard normals.

    ``u = (word + 0.5) 2^-32`` in fp32, so that |z| is at most 6.77.
    """
    magnitude, angle = words[:, 0::2], words[:, 1::2]
    bits = (magnitude.to(torch.float32) + 0.5).view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0
    log_mantissa = _polynomial(t, LOG_COEFFICIENTS) * t
    log_mantissa = log_mantissa * t
    log_mantissa = log_mantissa + t
    log_u = (exponent - 32).to(torch.float32) * LN2
    log_u = log_u + log_mantissa
    # torch's own fp32 root on the host is off by one ulp now and then; the fp64 root, rounded, is
    # the correctly rounded fp32 root.
    radius = torch.sqrt(torch.clamp_min(log_u * -2.0, 0.0).to(torch.float64)).to(torch.float32)

    quarter = (angle + (1 << 29)) >> 30
    turns = (angle - (quarter << 30)).to(torch.float32) + 0.5
    turns = turns * INV_2_32
    square = turns * turns
    sine = _polynomial(square, SIN_COEFFICIENTS) * turns
    cosine = _polynomial(square, COS_COEFFICIENTS)
    odd = (quarter & 1) == 1
    sine, cosine = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    sine = torch.where((quarter & 2) == 2, -sine, sine)
    cosine = torch.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    return torch.stack((radius * cosine, radius * sine), dim=2).reshape(-1)


def irwin_hall_from_words(words: Tensor) -> Tensor:
    """Sum of a word's four bytes, centred and scaled: int64 [blocks, 4] -> fp32 [blocks * 4].

    Mean 0, variance 1 (to fp32), kurtosis 2.70, largest magnitude 3.45.
    """
    total = (words & 255) + ((words >> 8) & 255) + ((words >> 16) & 255) + (words >> 24)
    return ((total - BYTE_SUM_MEAN).to(torch.float32) * BYTE_SUM_SCALE).reshape(-1)


def rademacher_from_words(words: Tensor) -> Tensor:
    """Every bit a sign, lowest bit first, 1 -> -1: int64 [blocks, 4] -> fp32 [blocks * 128]."""
    shifts = torch.arange(32, dtype=torch.int64, device=words.device)
    bits = (words.unsqueeze(2) >> shifts) & 1
    return (1 - 2 * bits).to(torch.float32).reshape(-1)


def halves_from_words(words: Tensor) -> Tensor:
    """16-bit halves, low half first: int64 [blocks, 4] -> int32 [blocks * 8], for rounding."""
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).to(torch.int32).reshape(-1)
