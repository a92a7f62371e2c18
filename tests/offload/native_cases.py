"""Tiny low-bit checkpoints in other people's layouts, and what their weights decode to.

Everything is packed here by hand, from the layouts' own rules, so that a mistake in the library's
reading of a layout cannot hide behind the same mistake in its writing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Encoding = tuple[dict[str, Tensor], Tensor]  # tensors by suffix of the weight's name, decoded fp32


def nearest(unit: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest table entry."""
    return (unit[..., None] - table).abs().argmin(-1)


def low_first(codes: Tensor) -> Tensor:
    """Pack pairs along the last axis, the even element in the low four bits."""
    pairs = codes.view(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def fp8(weight: Tensor, block: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Encoding:
    """One fp32 scale for block x block weights (0: for the whole matrix)."""
    rows, cols = weight.shape
    height, width = (block, block) if block else (rows, cols)
    grid = weight.abs().view(rows // height, height, cols // width, width).amax((1, 3)) / 448
    wide = grid.repeat_interleave(height, 0).repeat_interleave(width, 1)
    codes = (weight / wide).clamp(-448, 448).to(dtype)
    scale = grid if block else grid.reshape(1)
    name = "weight_scale_inv" if block else "weight_scale"
    return {"weight": codes, name: scale}, codes.float() * wide


def fp8_rows(weight: Tensor) -> Encoding:
    """One bf16 scale for each output, as compressed-tensors writes them."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def int8_rows(weight: Tensor) -> Encoding:
    """INT8 with one scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def llm_int8(weight: Tensor) -> Encoding:
    """The INT8 of bitsandbytes: row maxima, and 1 / 127 multiplied in last."""
    amax = weight.abs().amax(1)
    codes = (weight * (127 / amax[:, None])).round().to(torch.int8)
    decoded = (codes.float() * amax[:, None]) * 7.874015718698502e-3
    return {"weight": codes, "SCB": amax, "weight_format": torch.tensor(0).byte()}, decoded


def nvfp4(weight: Tensor, *, divides: bool = False) -> Encoding:
    """E2M1 in blocks of 16; the tensor's scale multiplies (modelopt) or divides."""
    blocks = weight.view(weight.shape[0], -1, 16)
    whole = weight.abs().max() / (448 * 6)
    scale = (blocks.abs().amax(-1) / 6 / whole).clamp(2**-6, 448).to(torch.float8_e4m3fn)
    # The library multiplies by what it holds, so the reciprocal is rounded once there and here.
    stated = 1 / whole
    factor = (1 / stated if divides else whole) * scale.float()
    codes = nearest(blocks / factor[..., None], E2M1)
    decoded = (E2M1[codes] * factor[..., None]).view(weight.shape)
    packed = low_first(codes.view(weight.shape))
    if divides:
        return {
            "weight_packed": packed,
            "weight_scale": scale,
            "weight_global_scale": stated.reshape(1),
        }, decoded
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole}, decoded


def gptq(weight: Tensor, group: int = 16) -> Encoding:
    """4-bit codes eight to a word, groups of the inputs in a shuffled order."""
    rows, cols = weight.shape
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(rows + cols))
    group_of = torch.empty(cols, dtype=torch.int64)
    group_of[order] = torch.arange(cols) // group
    groups = cols // group
    scale = torch.stack([weight[:, group_of == g].abs().amax(1) / 7 for g in range(groups)])
    scale = scale.half()
    codes = (weight / scale[group_of].t().float()).round().clamp(-7, 7).long() + 8
    decoded = (codes - 8).float() * scale[group_of].t().float()
    words = codes.t().reshape(cols // 8, 8, rows)
    zeros = torch.full((groups, rows // 8, 8), 7)
    shifts = torch.arange(0, 32, 4)

    def packed(values: Tensor) -> Tensor:
        summed = values.sum(-1)
        return torch.where(summed >= 2**31, summed - 2**32, summed).to(torch.int32)

    return {
        "qweight": packed((words << shifts[:, None]).transpose(1, 2)),
        "qzeros": packed(zeros << shifts),
        "scales": scale,
        "g_idx": group_of.to(torch.int32),
    }, decoded


def mxfp4(weight: Tensor) -> Encoding:
    """gpt-oss: (experts, out, in) in blocks of 32 with a power of two."""
    blocks = weight.view(*weight.shape[:-1], -1, 32)
    exponent = blocks.abs().amax(-1).log2().floor() - 2
    codes = nearest(blocks / torch.exp2(exponent)[..., None], E2M1)
    decoded = (E2M1[codes] * torch.exp2(exponent)[..., None]).view(weight.shape)
    return {"_blocks": low_first(codes), "_scales": (exponent + 127).to(torch.uint8)}, decoded


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Encoding]]] = {
    "fp8-blocks": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        lambda weight: fp8(weight, 16),
    ),
    "fp8-tensor": ({"quant_method": "modelopt"}, lambda weight: fp8(weight, 0)),
    "fp8-rows": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        fp8_rows,
    ),
    "int8-rows": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, int8_rows),
    "llm-int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        llm_int8,
    ),
    "nvfp4-modelopt": ({"quant_method": "modelopt"}, nvfp4),
    "nvfp4-packed": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        lambda weight: nvfp4(weight, divides=True),
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}, gptq),
}


def rewrite(
    plain: Path,
    settings: dict[str, Any],
    encode: Callable[[str, Tensor], Encoding | None],
) -> dict[str, Tensor]:
    """Encode the weights of a saved folder in place; return what each decodes to, in its dtype.

    ``encode`` gets each tensor's name and fp32 values, and returns None for one to be kept.
    """
    file = plain / "model.safetensors"
    with safe_open(file, "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for name, value in tensors.items():
        made = encode(name, value.float())
        if made is None:
            stored[name] = value
            continue
        parts, exact = made
        decoded[name] = exact.to(value.dtype)
        base = name.removesuffix("weight")
        stored |= {f"{base}{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(stored, file, {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = settings
    (plain / "config.json").write_text(json.dumps(config))
    return decoded


def linear(name: str) -> bool:
    """Whether a tensor's name is that of a decoder's matrix."""
    matrix = name.endswith("proj.weight") or "experts" in name
    return matrix and ".layers." in name
