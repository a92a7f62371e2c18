"""Encoded weights in the layouts that transformers opens by itself.

What is written here, transformers reads without this library: NF4, FP4 and INT8 through
bitsandbytes, FP8 and gpt-oss' MXFP4 by its own code (on a CPU it decodes those two to bf16 when it
loads), GPTQ through gptqmodel.  ``native_layouts`` is the way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .codec import Codec, Shape
from .four_bit import FourBitTableCodec
from .fp4 import Fp4Codec
from .fp8_grid import Fp8GridCodec
from .gptq_packed import GptqPackedCodec
from .int8_rowwise import Int8RowwiseCodec
from .interop import to_bitsandbytes
from .mxfp4 import Mxfp4Codec
from .nf4 import Nf4Codec


def foreign_codec(word: str, shapes: Iterable[Shape]) -> Codec:
    """Return the codec of a format word as transformers' layout of it has it.

    ``shapes`` are those of all weights to encode, outputs before inputs: the square blocks of
    FP8 and the groups of GPTQ must divide them.
    """
    sizes = [size for shape in shapes for size in shape[-2:]]
    columns = [shape[-1] for shape in shapes]
    if word == "fp8":
        block = _common(sizes)
        return Fp8GridCodec(block_rows=block, block_columns=block)
    if word == "gptq":
        return GptqPackedCodec(block_size=_common(columns))
    codecs: dict[str, Codec] = {
        "fp4": Fp4Codec(),
        "int8": Int8RowwiseCodec(scale_is_amax=True),
        "mxfp4": Mxfp4Codec(),
        "nf4": Nf4Codec(),
        "nf4-fitted": Nf4Codec(),
    }
    if word not in codecs:
        raise ValueError(
            f"transformers has no layout for format {word!r}; it has one for "
            f"{sorted([*codecs, 'fp8', 'gptq'])}. Keep this library's own layout."
        )
    return codecs[word]


def _common(sizes: Sequence[int]) -> int:
    """Return the largest usual block width that divides all sizes."""
    for width in (128, 64, 32, 16, 8):
        if all(size % width == 0 for size in sizes):
            return width
    raise ValueError(
        f"sizes {sorted(set(sizes))[:6]} have no common block of 8 or more; keep this library's "
        f"own layout"
    )


def foreign_tensors(
    name: str,
    codec: Codec,
    parts: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the tensors that transformers reads for the weight ``name``, by their names.

    Bytes are the parts' own.  ``dtype`` is what transformers will decode to.
    """
    codec.check_parts(parts, shape)
    if isinstance(codec, FourBitTableCodec):
        made = to_bitsandbytes(codec, parts, shape, dtype)
        return {f"{name}.{suffix}" if suffix else name: value for suffix, value in made.items()}
    base = name.removesuffix("weight")
    if isinstance(codec, Int8RowwiseCodec) and codec.scale_is_amax and not codec.block_size:
        return {
            name: parts["codes"],
            f"{base}SCB": parts["scale"].reshape(-1),
            f"{base}weight_format": torch.zeros((), dtype=torch.uint8),
        }
    if isinstance(codec, Fp8GridCodec) and codec.element == "e4m3":
        codes = parts["codes"].view(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": parts["scale"]}
    if isinstance(codec, Mxfp4Codec):
        groups = parts["scale"].shape
        return {
            f"{name}_blocks": parts["codes"].reshape(*groups, 16),
            f"{name}_scales": parts["scale"],
        }
    if isinstance(codec, GptqPackedCodec):
        return {f"{base}{part}": value for part, value in parts.items()}
    raise ValueError(f"{name}: transformers has no layout for {codec.parameters()}")


def foreign_settings(codec: Codec, kept: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint whose weights have this codec.

    ``kept`` names the linear modules that are not encoded.
    """
    if isinstance(codec, FourBitTableCodec):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": codec.name,
            "bnb_4bit_use_double_quant": codec.double_quantized,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(kept),
        }
    if isinstance(codec, Int8RowwiseCodec):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_skip_modules": list(kept),
        }
    if isinstance(codec, Fp8GridCodec):
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [codec.block_rows, codec.block_columns],
            "modules_to_not_convert": list(kept),
        }
    if isinstance(codec, Mxfp4Codec):
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(kept)}
    if isinstance(codec, GptqPackedCodec):
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": codec.block_size,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "modules_to_not_convert": list(kept),
        }
    raise ValueError(f"transformers has no layout for {codec.parameters()}")


def encoded_bits(codec: Codec, shape: Shape) -> float:
    """Return the bits a weight of this shape costs, scales counted.

    >>> round(encoded_bits(Nf4Codec(), (4096, 4096)), 3)
    4.127
    """
    return 8 * codec.nbytes(shape) / max(math.prod(shape), 1)
