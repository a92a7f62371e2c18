"""Products of FP8 matrices with fp32 scales: on the device's own units, or emulated.

Both take the same operands and say which they are (``emulated``), so that a report never passes
an emulation off as low-precision compute.  The emulation multiplies the decoded values in fp32:
the same products, accumulated in fp32 in the order of the library's matrix product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from .minifloat import MiniFloat
from .scales import block_amax, divide, poison, quotient
from .tables import code_table


@final
class Fp8Matrix:
    """A matrix of E4M3 or E5M2 values and the factor that decodes it.

    ``codes`` (rows, columns) uint8; ``scale`` fp32, shape () for the whole tensor or (rows, 1).
    """

    __slots__ = ("codes", "float_format", "scale")

    def __init__(self, codes: Tensor, scale: Tensor, float_format: MiniFloat) -> None:
        self.codes = codes
        self.scale = scale
        self.float_format = float_format

    @classmethod
    def from_values(cls, x: Tensor, float_format: MiniFloat, *, by_row: bool) -> Fp8Matrix:
        """Round a matrix with scales amax / largest, per row or for the tensor."""
        values = x.detach().to(torch.float32)
        if by_row:
            scale = quotient(block_amax(values), float_format.largest)
        else:
            amax = values.abs().amax() if values.numel() else values.new_zeros(())
            scale = quotient(poison(amax), float_format.largest).expand(values.shape[0])
        codes = float_format.encode(divide(values, scale))
        kept = scale[:, None] if by_row else scale[0] if values.shape[0] else scale.new_zeros(())
        return cls(codes, kept, float_format)

    def unit(self) -> Tensor:
        """Return the fp32 values before scaling."""
        return code_table(self.float_format.values(), self.codes.device).lookup(self.codes)

    def typed(self) -> Tensor:
        """Return the codes as torch's 8-bit float type."""
        e4m3 = self.float_format.mantissa_bits == 3
        return self.codes.view(torch.float8_e4m3fn if e4m3 else torch.float8_e5m2)


class ScaledMatmul(ABC):
    """Multiplies FP8 matrices: ``a`` (m, k) times the transpose of ``b`` (n, k)."""

    @property
    @abstractmethod
    def emulated(self) -> bool:
        """Whether the arithmetic units of the device are *not* used."""

    @abstractmethod
    def multiply(
        self, a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype, *, fast_accumulation: bool
    ) -> Tensor:
        """Return a bᵀ (m, n) in ``dtype``."""


@final
class EmulatedScaledMatmul(ScaledMatmul):
    """fp32 products of the decoded values; runs anywhere, saves no time."""

    @property
    def emulated(self) -> bool:
        return True

    def multiply(
        self, a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype, *, fast_accumulation: bool
    ) -> Tensor:
        product = a.unit() @ b.unit().t()
        return (product * a.scale * b.scale.reshape(1, -1)).to(dtype)


@final
class DeviceScaledMatmul(ScaledMatmul):
    """torch's scaled matrix product; k and n must be multiples of 16."""

    @property
    def emulated(self) -> bool:
        return False

    def multiply(
        self, a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype, *, fast_accumulation: bool
    ) -> Tensor:
        by_row = a.scale.ndim == 2
        if by_row != (b.scale.ndim == 2):
            raise ValueError("both matrices need scales by row, or both one scale")
        return torch._scaled_mm(
            a.typed(),
            b.typed().t(),
            scale_a=a.scale,
            scale_b=b.scale.reshape(1, -1) if by_row else b.scale,
            out_dtype=dtype,
            use_fast_accum=fast_accumulation,
        )


def scaled_matmul_for(device: torch.device) -> ScaledMatmul:
    """Return the device's own product where it has FP8 units (compute capability 8.9), else
    the emulation; look at ``emulated``."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return DeviceScaledMatmul()
    return EmulatedScaledMatmul()
