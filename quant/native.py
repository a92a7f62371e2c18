"""Checkpoints that are already low-bit, taken as they are: their bytes as a codec's parts.

Codes are views of the tensors in the file, so nothing is copied or rounded again; scales are
re-shaped, and repeated where a format shares one among rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import Shape
from .fp8 import Fp8Codec
from .gptq_packed import GptqPackedCodec
from .mxfp4 import Mxfp4Codec
from .nvfp4 import Nvfp4Codec

_FP8_ELEMENTS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def mxfp4_from_blocks(
    blocks: Tensor, scales: Tensor
) -> tuple[Mxfp4Codec, dict[str, Tensor], Shape]:
    """Take ``*_blocks`` (..., groups, 16) uint8 and ``*_scales`` (..., groups) uint8 of gpt-oss.

    The encoded tensor is (..., groups * 32), outputs before inputs; the layers of transformers
    want it with the last two axes exchanged.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales must be uint8, got {blocks.dtype} and {scales.dtype}")
    if blocks.shape[-1:] != (16,) or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"blocks of shape {tuple(blocks.shape)} and scales of shape {tuple(scales.shape)} do "
            f"not fit: (..., groups, 16) and (..., groups) are needed"
        )
    codec = Mxfp4Codec()
    shape = (*scales.shape[:-1], scales.shape[-1] * 32)
    parts = {"codes": blocks.reshape(*scales.shape[:-1], -1), "scale": scales}
    codec.check_parts(parts, shape)
    return codec, parts, shape


def nvfp4_from_checkpoint(
    weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor
) -> tuple[Nvfp4Codec, dict[str, Tensor], Shape]:
    """Take ``weight`` (..., in / 2) uint8, ``weight_scale`` (..., in / 16) E4M3, and the fp32
    ``weight_scale_2`` that block scales are multiplied by."""
    codec = Nvfp4Codec()
    shape = (*weight.shape[:-1], weight.shape[-1] * 2)
    parts = {
        "codes": weight,
        "scale": weight_scale.view(torch.uint8),
        "global_scale": weight_scale_2.to(torch.float32).reshape(()),
    }
    codec.check_parts(parts, shape)
    return codec, parts, shape


def fp8_from_checkpoint(weight: Tensor, scale: Tensor) -> tuple[Fp8Codec, dict[str, Tensor], Shape]:
    """Take an FP8 ``weight`` (out, in) and the factors that decode it.

    ``scale`` is one number, one per output ((out,) or (out, 1)), or one per square block of both
    axes ((out / b, in / b), as DeepSeek ships them): then it is repeated for the b rows, which
    costs 32 / b bits a weight.
    """
    if weight.dtype not in _FP8_ELEMENTS or weight.ndim != 2:
        raise ValueError(
            f"weight must be a matrix of {[str(dtype) for dtype in _FP8_ELEMENTS]}, got "
            f"{weight.dtype} of shape {tuple(weight.shape)}"
        )
    element = _FP8_ELEMENTS[weight.dtype]
    shape = (weight.shape[0], weight.shape[1])
    factors = scale.to(torch.float32)
    if scale.numel() == 1:
        codec = Fp8Codec(element, "tensor")
        factors = factors.reshape(())
    elif scale.numel() == shape[0] and scale.shape[0] == shape[0]:
        codec = Fp8Codec(element, "row")
        factors = factors.reshape(-1, 1)
    else:
        width = _square_block(shape, tuple(scale.shape))
        codec = Fp8Codec(element, "group", width)
        factors = factors.repeat_interleave(width, dim=0)[: shape[0]]
    parts = {"codes": weight.view(torch.uint8), "scale": factors.contiguous()}
    codec.check_parts(parts, shape)
    return codec, parts, shape


def gptq_from_checkpoint(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor
) -> tuple[GptqPackedCodec, dict[str, Tensor], Shape]:
    """Take the four tensors of a 4-bit GPTQ layer (the usual form, zero points minus one)."""
    if qweight.ndim != 2 or scales.ndim != 2 or not scales.shape[0]:
        raise ValueError(
            f"qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} are not matrices"
        )
    shape = (qweight.shape[1], qweight.shape[0] * 8)
    codec = GptqPackedCodec(block_size=shape[1] // scales.shape[0])
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}
    codec.check_parts(parts, shape)
    if g_idx.numel() and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < scales.shape[0]:
        raise ValueError(f"g_idx names groups outside 0 .. {scales.shape[0] - 1}")
    return codec, parts, shape


def _square_block(shape: tuple[int, int], blocks: tuple[int, ...]) -> int:
    """Return the block width b with blocks == ceil(shape / b) on both axes."""
    for width in (128, 64, 32, 256, 16):
        if blocks == (-(-shape[0] // width), -(-shape[1] // width)):
            return width
    raise ValueError(f"scales of shape {blocks} fit no square blocks of a weight of shape {shape}")
