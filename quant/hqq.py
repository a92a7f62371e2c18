"""HQQ: affine INT4 whose zero points minimise a robust error; needs no data.

Badri and Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models".  Scales stay
those of the group's range; the minimum of each group is moved by half-quadratic steps on the
l_0.7 norm of the error, which ignores a few outliers for the sake of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import RowCodec
from .int4_group import Int4GroupCodec
from .scales import SCALE_DTYPES, divide
from .tables import pack_nibbles

_NORM = 0.7
_FIRST_BETA, _BETA_GROWTH = 10.0, 1.01


def hqq(weight: Tensor, codec: Int4GroupCodec, *, iterations: int = 20) -> dict[str, Tensor]:
    """Return the parts of ``weight`` (..., columns) under an affine codec, minima optimised.

    Stops when the mean error stops falling.  Memory: a few fp32 copies of the weight.
    """
    if codec.mode != "affine":
        raise ValueError(f"hqq needs Int4GroupCodec(mode='affine'), got mode {codec.mode!r}")
    width = codec.block_size or weight.shape[-1]
    if weight.ndim < 1 or weight.shape[-1] % width:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} has rows that are not whole groups of {width}"
        )
    parts = codec.encode(weight)
    blocks = weight.detach().to(torch.float32).reshape(-1, width)
    scale = parts["scale"].to(torch.float32).reshape(-1)
    stored_dtype = SCALE_DTYPES[codec.scale_dtype]
    best = parts["minimum"].reshape(-1)
    best_codes = _codes(blocks, scale, best)
    best_error = _residual(blocks, best_codes, scale, best).abs().mean()
    minimum, beta = best, _FIRST_BETA
    for _ in range(iterations):
        codes = _codes(blocks, scale, minimum)
        residual = _residual(blocks, codes, scale, minimum)
        # In units of the scale the shrinkage means the same for every group.
        unit = divide(residual, scale)
        size = unit.abs()
        shrunk = (size - size.clamp(min=1e-8) ** (_NORM - 1.0) / beta).clamp(min=0.0)
        outlier = torch.copysign(shrunk, unit) * scale[:, None]
        target = blocks - outlier - codes * scale[:, None]
        minimum = target.mean(dim=1).to(stored_dtype)
        beta *= _BETA_GROWTH
        codes = _codes(blocks, scale, minimum)
        error = _residual(blocks, codes, scale, minimum).abs().mean()
        if not bool(error < best_error):
            break
        best, best_codes, best_error = minimum, codes, error
    rows = best_codes.to(torch.uint8).view(weight.shape)
    return parts | {
        "codes": pack_nibbles(rows, high_first=RowCodec.high_first),
        "minimum": best.view(parts["minimum"].shape),
    }


def _codes(blocks: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    shifted = blocks - minimum.to(torch.float32)[:, None]
    return divide(shifted, scale).round().clamp(0.0, 15.0)


def _residual(blocks: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return blocks - (codes * scale[:, None] + minimum.to(torch.float32)[:, None])
