"""Encoded tensors in the layouts of other libraries, and back.

Nothing here imports those libraries: layouts are plain dicts of tensors.

* bitsandbytes: what ``QuantState.as_dict(packed=True)`` holds, beside the packed weight; the
  form in which transformers saves 4-bit models to safetensors.
* torchao: the tensors of its NF4 subclass.  Its code bytes equal ours; its table is ours rounded
  to four digits, and its block magnitudes are int8 times a factor plus a mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .codec import Shape
from .four_bit import NESTED_BLOCK, FourBitTableCodec, decode_magnitudes, encode_magnitudes
from .fp4 import Fp4Codec
from .nf4 import Nf4Codec
from .tables import dynamic_map

_STATE_PREFIX = "quant_state.bitsandbytes__"
_DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_bitsandbytes(
    codec: FourBitTableCodec, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors that bitsandbytes saves for this weight, by their suffixes.

    ``""`` is the packed weight (bytes, 1); the others are ``absmax``, ``quant_map``, ... as in
    ``model.layers.0.q_proj.weight.absmax``.  ``dtype`` is what bitsandbytes will decode to.
    """
    codec.check_parts(parts, shape)
    names = {value: key for key, value in _DTYPE_NAMES.items()}
    if dtype not in names:
        raise ValueError(f"bitsandbytes decodes to {list(_DTYPE_NAMES)}, not to {dtype}")
    state: dict[str, object] = {
        "quant_type": codec.name,
        "blocksize": codec.block_size,
        "dtype": names[dtype],
        "shape": list(shape),
    }
    tensors = {
        "": parts["codes"].view(-1, 1),
        "absmax": parts["absmax"],
        "quant_map": torch.tensor(codec.code_values(), dtype=torch.float32),
    }
    if codec.double_quantized:
        tensors["nested_absmax"] = parts["nested_absmax"]
        tensors["nested_quant_map"] = torch.tensor(dynamic_map(), dtype=torch.float32)
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": parts["nested_offset"].item(),
        }
    packed = bytearray(json.dumps(state).encode())
    tensors[f"{_STATE_PREFIX}{codec.name}"] = torch.frombuffer(packed, dtype=torch.uint8)
    return tensors


def from_bitsandbytes(
    tensors: Mapping[str, Tensor],
) -> tuple[FourBitTableCodec, dict[str, Tensor], Shape, torch.dtype]:
    """Return codec, parts, shape and dtype of a 4-bit weight that bitsandbytes saved.

    ``tensors`` is keyed as ``to_bitsandbytes`` returns it.  Bytes are taken as they are.
    """
    states = [name for name in tensors if name.startswith(_STATE_PREFIX)]
    if len(states) != 1:
        raise ValueError(f"expected one {_STATE_PREFIX}* tensor, got {states}")
    try:
        state = json.loads(bytes(tensors[states[0]].tolist()))
        shape = tuple(int(extent) for extent in state["shape"])
        block_size, dtype_name = int(state["blocksize"]), state["dtype"]
        quant_type = state["quant_type"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the quantisation state {states[0]!r} is damaged: {error}") from error
    classes: dict[str, type[FourBitTableCodec]] = {"nf4": Nf4Codec, "fp4": Fp4Codec}
    if quant_type not in classes or dtype_name not in _DTYPE_NAMES:
        raise ValueError(
            f"quantisation state says quant_type {quant_type!r} and dtype {dtype_name!r}; "
            f"understood are {sorted(classes)} and {sorted(_DTYPE_NAMES)}"
        )
    double = "nested_blocksize" in state
    if double and state["nested_blocksize"] != NESTED_BLOCK:
        raise ValueError(
            f"nested_blocksize {state['nested_blocksize']} is not {NESTED_BLOCK}, the only one used"
        )
    codec = classes[quant_type](block_size=block_size, double_quantized=double)
    parts = {"codes": tensors[""].reshape(-1), "absmax": tensors["absmax"]}
    expected_map = torch.tensor(codec.code_values(), dtype=torch.float32)
    if not torch.equal(tensors["quant_map"].cpu(), expected_map):
        raise ValueError(f"quant_map differs from the table of {quant_type!r}: foreign codes")
    if double:
        parts["nested_absmax"] = tensors["nested_absmax"]
        parts["nested_offset"] = torch.tensor(
            float(state["nested_offset"]), dtype=torch.float32, device=parts["codes"].device
        )
    codec.check_parts(parts, shape)
    return codec, parts, shape, _DTYPE_NAMES[dtype_name]


def nf4_from_torchao(
    *,
    quantized_data: Tensor,
    quantized_scalers: Tensor,
    quantization_factor: Tensor,
    scaler_mean: Tensor,
    block_size: int,
) -> tuple[Nf4Codec, dict[str, Tensor]]:
    """Take the tensors of a torchao NF4 weight: same codes, fp32 magnitudes (4.5 bits).

    Decoded values differ from torchao's by its table's rounding, at most 5e-5 of a block's
    magnitude (and by the bf16 arithmetic it uses for bf16 weights).
    """
    scale = quantized_scalers.view(quantization_factor.numel(), -1).to(torch.float32)
    absmax = scale / quantization_factor.to(torch.float32)[:, None] + scaler_mean.to(torch.float32)
    codec = Nf4Codec(block_size=block_size, double_quantized=False)
    return codec, {"codes": quantized_data.reshape(-1), "absmax": absmax.reshape(-1)}


def nf4_to_torchao(
    codec: Nf4Codec, parts: Mapping[str, Tensor], shape: Shape, *, scaler_block_size: int = 256
) -> dict[str, Tensor]:
    """Return the tensors of a torchao NF4 weight; block magnitudes are rounded to its int8.

    The number of blocks must be a multiple of ``scaler_block_size``, as torchao demands.
    """
    codec.check_parts(parts, shape)
    blocks = parts["absmax"].numel()
    if blocks % scaler_block_size:
        raise ValueError(
            f"{blocks} blocks of shape {shape} are not a multiple of scaler_block_size "
            f"{scaler_block_size}"
        )
    if codec.double_quantized:
        absmax = decode_magnitudes(parts, 0, blocks)
    else:
        absmax = parts["absmax"]
    mean = absmax.mean()
    shifted = (absmax - mean).view(-1, scaler_block_size)
    factor = 256 / (2 * shifted.abs().amax(dim=1))
    scalers = (shifted * factor[:, None]).round().clamp(-128, 127).to(torch.int8)
    return {
        "quantized_data": parts["codes"],
        "quantized_scalers": scalers.reshape(-1),
        "quantization_factor": factor,
        "scaler_mean": mean,
    }


def requantise_magnitudes(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn parts with fp32 magnitudes into double-quantised ones, leaving the codes alone."""
    return {"codes": parts["codes"], **encode_magnitudes(parts["absmax"])}
