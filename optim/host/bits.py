"""Bit-level conversions for the host kernels: bf16 and fp16 as 16-bit integers, counter noise.

numba knows neither bf16 nor (on CPUs) fp16, so 16-bit floats travel as integer views whose
*signedness is the tag*: ``int16`` arrays hold bf16, ``uint16`` arrays hold fp16, ``float32``
arrays hold fp32.  ``load`` and ``store`` pick the conversion from the array's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

F32 = np.float32
U32 = np.uint32
I32 = np.int32
U16 = np.uint16
I16 = np.int16

#: The options of every host kernel.  ``error_model="numpy"``: division checks would stop SIMD.
KERNEL_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": False,
    "error_model": "numpy",
    "boundscheck": False,
}


def host_view(tensor: Tensor) -> np.ndarray:
    """View a contiguous CPU tensor as the flat numpy array that kernels take, without a copy."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() and flat.data_ptr() != tensor.data_ptr():
        raise ValueError(
            f"host kernels take contiguous tensors, got strides {tuple(tensor.stride())} for shape "
            f"{tuple(tensor.shape)}; pass tensor.contiguous() and copy the result back"
        )
    if tensor.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy()
    if tensor.dtype == torch.float16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def _float_bits(typing_context: Any, value: Any) -> Any:
    """Reinterpret a float32 as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _bits_float(typing_context: Any, value: Any) -> Any:
    """Reinterpret a uint32 as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


#: Compiled code calls these with one argument, a float32 and a uint32.
float_bits: Any = intrinsic(_float_bits)
bits_float: Any = intrinsic(_bits_float)


@njit(**KERNEL_OPTIONS)
def bf16_nearest(bits: Any) -> Any:
    """Round fp32 bits to bf16 bits, ties to even; every NaN stays a NaN."""
    rounded = U32(bits + U32(0x7FFF) + (U32(bits >> U32(16)) & U32(1))) >> U32(16)
    return U32(rounded) if bits_float(bits) == bits_float(bits) else U32(0x7FC0)


@njit(**KERNEL_OPTIONS)
def bf16_untied(bits: Any) -> Any:
    """Round ``untie``'s fp32 bits to bf16 bits: the only ties left are those that round up."""
    rounded = U32(bits + U32(0x8000)) >> U32(16)
    return U32(rounded) if bits_float(bits) == bits_float(bits) else U32(0x7FC0)


@njit(**KERNEL_OPTIONS)
def untie(bits: Any) -> Any:
    """Move a master that lies half way beyond an even bf16 number towards it by one fp32 unit.

    65537 fp32 numbers round to one even bf16 number, one more than 16 bits can tell apart.  All
    master formats leave out this one, so that the split master equals the fp32 master exactly.
    """
    return U32(bits - U32(1)) if U32(bits & U32(0x1FFFF)) == U32(0x8000) else U32(bits)


@njit(**KERNEL_OPTIONS)
def mix32(x: Any) -> Any:
    """The two-multiply 32-bit finaliser that ``quant.rounding`` uses, bit for bit."""
    x = U32(x ^ U32(x >> U32(16)))
    x = U32(x * U32(0x7FEB352D))
    x = U32(x ^ U32(x >> U32(15)))
    x = U32(x * U32(0x846CA68B))
    return U32(x ^ U32(x >> U32(16)))


@njit(**KERNEL_OPTIONS)
def bf16_stochastic(bits: Any, index_low: Any, low_key: Any, high_word: Any) -> Any:
    """Round fp32 bits to bf16 bits by adding 16 random bits of the element's own counter."""
    noise = mix32(U32(mix32(U32(index_low ^ low_key)) ^ high_word))
    # Infinities have 16 zero bits below, so that no noise moves them.
    rounded = U32(bits + U32(noise & U32(0xFFFF))) >> U32(16)
    return U32(rounded) if bits_float(bits) == bits_float(bits) else U32(0x7FC0)


@njit(**KERNEL_OPTIONS)
def half_to_float(half: Any) -> Any:
    """Widen fp16 bits exactly, subnormals, infinities and NaN included."""
    magnitude = U32(U32(half & U32(0x7FFF)) << U32(13))
    # 2**112 moves the exponent bias from 15 to 127; exact for subnormals too.
    widened = float_bits(F32(bits_float(magnitude) * F32(5.192296858534828e33)))
    widened = (
        U32(widened | U32(0x7F800000)) if U32(half & U32(0x7C00)) == U32(0x7C00) else U32(widened)
    )
    return bits_float(U32(widened | U32(U32(half & U32(0x8000)) << U32(16))))


@njit(**KERNEL_OPTIONS)
def float_to_half(value: Any) -> Any:
    """Round fp32 to fp16 bits, ties to even; overflow gives infinity, NaN stays NaN."""
    bits = float_bits(value)
    sign = U32(U32(bits >> U32(16)) & U32(0x8000))
    magnitude = U32(bits & U32(0x7FFFFFFF))
    odd = U32(U32(magnitude >> U32(13)) & U32(1))
    normal = U32(U32(magnitude + U32(0xFFF) + odd - U32(112 << 23)) >> U32(13))
    # Adding 0.5 lines the fp16 subnormal grid up with the last bit of an fp32 number in [0.5, 1).
    small = U32(float_bits(F32(bits_float(magnitude) + F32(0.5))) - U32(0x3F000000))
    half = small if magnitude < U32(0x38800000) else normal
    half = U32(0x7C00) if magnitude >= U32(0x477FF000) else half
    half = U32(0x7E00) if magnitude > U32(0x7F800000) else half
    return U32(half | sign)


def load(values: Any, i: Any) -> Any:
    """Return element ``i`` of a tagged array as fp32 (compiled code only)."""
    raise TypeError("load() exists in compiled kernels only")


def store(values: Any, i: Any, value: Any) -> None:
    """Round an fp32 value to nearest into element ``i`` of a tagged array (compiled code only)."""
    raise TypeError("store() exists in compiled kernels only")


def settle(values: Any, i: Any, master: Any) -> Any:
    """Round a master into weight ``i``; return the master as kept (compiled code only)."""
    raise TypeError("settle() exists in compiled kernels only")


@overload(load, strict=False)
def _load(values: Any, i: Any) -> Callable[..., Any] | None:
    if values.dtype == types.int16:
        return lambda values, i: bits_float(U32(U32(U16(values[i])) << U32(16)))
    if values.dtype == types.uint16:
        return lambda values, i: half_to_float(U32(values[i]))
    if values.dtype == types.float32:
        return lambda values, i: values[i]
    return None


@overload(store, strict=False)
def _store(values: Any, i: Any, value: Any) -> Callable[..., Any] | None:
    if values.dtype == types.int16:

        def store_bf16(values: Any, i: Any, value: Any) -> None:
            values[i] = I16(bf16_nearest(float_bits(value)))

        return store_bf16
    if values.dtype == types.uint16:

        def store_fp16(values: Any, i: Any, value: Any) -> None:
            values[i] = U16(float_to_half(value))

        return store_fp16
    if values.dtype == types.float32:

        def store_fp32(values: Any, i: Any, value: Any) -> None:
            values[i] = value

        return store_fp32
    return None


@overload(settle, strict=False)
def _settle(values: Any, i: Any, master: Any) -> Callable[..., Any] | None:
    if values.dtype == types.int16:

        def settle_bf16(values: Any, i: Any, master: Any) -> Any:
            bits = untie(float_bits(master))
            values[i] = I16(bf16_untied(bits))
            return bits_float(bits)

        return settle_bf16
    if values.dtype == types.uint16:

        def settle_fp16(values: Any, i: Any, master: Any) -> Any:
            values[i] = U16(float_to_half(master))
            return master

        return settle_fp16
    return None
