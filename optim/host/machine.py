"""What this processor does fast."""

from __future__ import annotations

import functools

import llvmlite.binding as llvm


@functools.cache
def multiplies_bf16() -> bool:
    """Return whether the processor multiplies bf16 numbers, two or more for each fp32 product."""
    features = llvm.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))
