"""Seeds that depend on names, never on order, device or process.

A parameter's noise (stochastic rounding, random projections) is a pure function of the run's
seed, the parameter's name, the step and the element index, so that resuming, streaming, tiling
and reordering leave the bits alone.
"""

from __future__ import annotations

import hashlib

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def parameter_seed(seed: int, name: str) -> int:
    """Return the 64-bit noise seed of a parameter: a stable hash of the run's seed and its name.

    >>> parameter_seed(0, "layer.weight") == parameter_seed(0, "layer.weight")
    True
    >>> parameter_seed(0, "layer.weight") != parameter_seed(1, "layer.weight")
    True
    """
    text = f"{seed}\x00{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def fold_in(seed: int, number: int) -> int:
    """Return another 64-bit seed that depends on a seed and a number (a step, a refresh count).

    The number is spread by an odd constant and the sum goes through a splitmix64 finaliser.
    """
    z = (seed + (number + 1) * 0x9E37_79B9_7F4A_7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK64
    return z ^ (z >> 31)
