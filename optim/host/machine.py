"""What this processor does fast."""

from __future__ import annotations

import functools

import llvmlite.binding as llvm
from numba import config


@functools.cache
def multiplies_bf16() -> bool:
    """Return whether the processor multiplies bf16 numbers, two or more for each fp32 product."""
    features = llvm.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))


@functools.cache
def permutes_bytes() -> bool:
    """Return whether compiled kernels may permute bytes of 512-bit vectors (AVX-512 VBMI).

    Not where the environment has numba compile for another processor than this one.
    """
    if config.CPU_NAME is not None or config.CPU_FEATURES is not None:
        return False
    features = llvm.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vbmi"))
