"""Which tensors of a low-bit checkpoint are which parts of which codec, from its headers alone.

Checkpoints that others have quantised are streamed as they lie: nothing is read here but headers
and numbers of a few bytes.  Every claim is checked: a tensor that is missing, of another shape or
type than its layout demands, or codes that no layout explains, is a ``ValueError`` that names the
tensor and the file.

Understood, by ``quant_method`` of the checkpoint's ``quantization_config``:

* ``fp8``, ``fbgemm_fp8``: an FP8 weight beside ``weight_scale_inv`` or ``weight_scale``, one
  number for the whole, for each output, or for each rectangle;
* ``mxfp4``: ``*_blocks`` and ``*_scales``, as gpt-oss ships its experts;
* ``compressed-tensors``: FP8 as above, INT8 with a scale for each output, and NVFP4;
* ``modelopt``: NVFP4 and FP8;
* ``gptq``: 4-bit codes in the usual form (zero points minus one);
* ``bitsandbytes``: NF4, FP4 and LLM.int8.

Activations are computed with in the model's own type, whatever the checkpoint says of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor

from .codec import Codec, Shape
from .four_bit import NESTED_BLOCK, FourBitTableCodec
from .fp4 import Fp4Codec
from .fp8_grid import Fp8GridCodec
from .gptq_packed import GptqPackedCodec
from .int8_rowwise import Int8RowwiseCodec
from .mxfp4 import Mxfp4Codec
from .mxfp8 import Mxfp8Codec
from .nf4 import Nf4Codec
from .nvfp4 import Nvfp4Codec
from .scales import SCALE_DTYPES
from .spec import TensorSpec

_FP8: Final = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_STATE: Final = "quant_state.bitsandbytes__"
_FOUR_BIT: Final[dict[str, type[FourBitTableCodec]]] = {"nf4": Nf4Codec, "fp4": Fp4Codec}


@final
@dataclass(frozen=True)
class NativeWeight:
    """One encoded weight of a checkpoint.

    ``stored`` names the tensor that holds each part's bytes; ``literals`` are the few parts that
    the file holds in another form.  The weight is what decodes, or, ``transposed``, that with
    its last two axes exchanged.
    """

    name: str
    codec: Codec
    shape: Shape
    stored: dict[str, str]
    literals: dict[str, Tensor] = field(default_factory=dict)
    transposed: bool = False


@final
@dataclass(frozen=True)
class StoredTensors:
    """The headers of a checkpoint, and how to read a tensor of a few bytes."""

    specs: Mapping[str, TensorSpec]
    read: Callable[[str], Tensor]
    where: str

    def spec(self, name: str, needed_by: str) -> TensorSpec:
        """Return the spec of a tensor that must be there."""
        if name not in self.specs:
            raise ValueError(f"{self.where}: {name!r} is missing; {needed_by!r} needs it to decode")
        return self.specs[name]

    def refuse(self, name: str, why: str) -> ValueError:
        """Return the error that names a tensor of this checkpoint."""
        return ValueError(f"{self.where}: tensor {name!r} {why}")


def native_weights(settings: Mapping[str, Any], tensors: StoredTensors) -> list[NativeWeight]:
    """Return every encoded weight of a checkpoint; ``settings`` is its ``quantization_config``."""
    method = settings.get("quant_method")
    readers: dict[str, tuple[Callable[..., Iterator[NativeWeight]], ...]] = {
        "bitsandbytes": (_bitsandbytes_4bit, _bitsandbytes_8bit),
        "compressed-tensors": (_fp8, _nvfp4_packed, _int8_rows),
        "fbgemm_fp8": (_fp8,),
        "fp8": (_fp8,),
        "gptq": (_gptq,),
        "modelopt": (_fp8, _nvfp4),
        "mxfp4": (_mxfp4,),
        "mxfp8": (_fp8,),
    }
    if method not in readers:
        raise ValueError(
            f"{tensors.where}: checkpoints of quant_method {method!r} are not understood; "
            f"understood are {sorted(readers)}. Quantise the original with headrace quantize."
        )
    found = [weight for read in readers[method] for weight in read(tensors, settings)]
    for weight in found:
        _check(weight, tensors)
    if not found:
        raise ValueError(
            f"{tensors.where}: its configuration says quant_method {method!r}, but no tensor of "
            f"that layout is there"
        )
    return found


def _check(weight: NativeWeight, tensors: StoredTensors) -> None:
    """Refuse parts whose bytes cannot be those that the codec asks for."""
    try:
        expected = weight.codec.spec(weight.shape)
    except ValueError as error:
        raise tensors.refuse(weight.name, f"cannot be decoded: {error}") from error
    for part, spec in expected.items():
        if part in weight.literals:
            held = weight.literals[part]
            if held.numel() != spec.numel or held.dtype is not spec.dtype:
                raise tensors.refuse(
                    weight.name, f"has a {part} of {held.numel()} numbers; {spec.numel} are needed"
                )
            continue
        name = weight.stored[part]
        found = tensors.spec(name, weight.name)
        if found.numel != spec.numel or not _same_bytes(found.dtype, spec.dtype):
            raise tensors.refuse(
                name,
                f"has shape {found.shape} and dtype {found.dtype}; {weight.name!r} of shape "
                f"{weight.shape} needs {spec.numel} numbers of {spec.dtype} (shape {spec.shape})",
            )


def _same_bytes(stored: torch.dtype, wanted: torch.dtype) -> bool:
    if stored is wanted:
        return True
    # Bit patterns of formats that torch cannot compute with are uint8 in codecs.
    return wanted in (torch.uint8, torch.int8) and stored.itemsize == 1


def _fp8(tensors: StoredTensors, settings: Mapping[str, Any]) -> Iterator[NativeWeight]:
    for name, spec in tensors.specs.items():
        if spec.dtype not in _FP8 or not name.endswith(".weight"):
            continue
        scales = [f"{name}{end}" for end in ("_scale_inv", "_scale")]
        present = [scale for scale in scales if scale in tensors.specs]
        if len(present) != 1:
            raise tensors.refuse(name, f"is FP8 and must have one of {scales}, found {present}")
        if len(spec.shape) != 2:
            raise tensors.refuse(name, f"of shape {spec.shape} is no matrix")
        codec = _fp8_codec(tensors, name, spec, present[0], settings)
        yield NativeWeight(name, codec, spec.shape, {"codes": name, "scale": present[0]})


def _fp8_codec(
    tensors: StoredTensors,
    name: str,
    spec: TensorSpec,
    scale_name: str,
    settings: Mapping[str, Any],
) -> Codec:
    rows, cols = spec.shape
    scale = tensors.specs[scale_name]
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        if scale.shape != (rows, -(-cols // 32)):
            raise tensors.refuse(
                scale_name, f"of shape {scale.shape} does not hold one exponent for 32 of {name!r}"
            )
        return Mxfp8Codec(element=_FP8[spec.dtype])
    words = {dtype: word for word, dtype in SCALE_DTYPES.items()}
    if scale.dtype not in words:
        raise tensors.refuse(scale_name, f"has dtype {scale.dtype}, which is no scale")
    height, width = _rectangle(tensors, name, (rows, cols), scale_name, scale.shape, settings)
    return Fp8GridCodec(_FP8[spec.dtype], height, width, words[scale.dtype])


def _rectangle(
    tensors: StoredTensors,
    name: str,
    shape: tuple[int, int],
    scale_name: str,
    grid: Shape,
    settings: Mapping[str, Any],
) -> tuple[int, int]:
    """Return the extents of the rectangles that share a scale; 0 means a whole axis."""
    if grid in ((), (1,), (1, 1)):
        return 0, 0
    if grid in ((shape[0],), (shape[0], 1)):
        return 1, 0
    stated = settings.get("weight_block_size")
    candidates = [(size, size) for size in (128, 64, 32, 256, 16)]
    if isinstance(stated, list) and len(stated) == 2 and all(type(n) is int for n in stated):
        candidates.insert(0, (stated[0], stated[1]))
    for height, width in candidates:
        if height > 0 < width and grid == (-(-shape[0] // height), -(-shape[1] // width)):
            return height, width
    raise tensors.refuse(
        scale_name, f"of shape {grid} is no grid of scales for {name!r} of shape {shape}"
    )


def _mxfp4(tensors: StoredTensors, settings: Mapping[str, Any]) -> Iterator[NativeWeight]:
    for name, spec in tensors.specs.items():
        if not name.endswith("_blocks"):
            continue
        base = name.removesuffix("_blocks")
        scales = f"{base}_scales"
        found = tensors.spec(scales, name)
        if spec.shape[-1:] != (16,) or spec.shape[:-1] != found.shape or len(found.shape) < 2:
            raise tensors.refuse(
                name,
                f"of shape {spec.shape} does not fit {scales!r} of shape {found.shape}: "
                f"(..., groups, 16) and (..., groups) are needed",
            )
        shape = (*found.shape[:-1], found.shape[-1] * 32)
        stored = {"codes": name, "scale": scales}
        # The layers of transformers hold experts with inputs before outputs.
        yield NativeWeight(base, Mxfp4Codec(), shape, stored, transposed=True)


def _nvfp4(tensors: StoredTensors, settings: Mapping[str, Any]) -> Iterator[NativeWeight]:
    for name, spec in tensors.specs.items():
        packed = name.endswith(".weight") and spec.dtype is torch.uint8
        if not packed:
            continue
        parts = {"codes": name, "scale": f"{name}_scale", "global_scale": f"{name}_scale_2"}
        shape = (*spec.shape[:-1], spec.shape[-1] * 2) if spec.shape else ()
        yield NativeWeight(name, Nvfp4Codec(), shape, parts)


def _nvfp4_packed(tensors: StoredTensors, settings: Mapping[str, Any]) -> Iterator[NativeWeight]:
    for name, spec in tensors.specs.items():
        if (
            not name.endswith(".weight_packed")
            or f"{_base(name)}_global_scale" not in tensors.specs
        ):
            continue
        base = _base(name)
        if not spec.shape:
            raise tensors.refuse(name, "is a single number")
        shape = (*spec.shape[:-1], spec.shape[-1] * 2)
        # This layout divides by the tensor's scale; ours multiplies.
        whole = tensors.specs[f"{base}_global_scale"]
        if whole.numel != 1 or not whole.dtype.is_floating_point:
            raise tensors.refuse(
                f"{base}_global_scale", f"of shape {whole.shape} and {whole.dtype} is no number"
            )
        factor = 1.0 / tensors.read(f"{base}_global_scale").to(torch.float32).reshape(())
        yield NativeWeight(
            base,
            Nvfp4Codec(),
            shape,
            {"codes": name, "scale": f"{base}_scale"},
            {"global_scale": factor},
        )


def _base(name: str) -> str:
    return name.removesuffix("_packed")


def _int8_rows(tensors: StoredTensors, settings: Mapping[str, Any]) -> Iterator[NativeWeight]:
    for name, spec in tensors.specs.items():
        if spec.dtype is not torch.int8 or not name.endswith(".weight"):
            continue
        scale = f"{name}_scale"
        literals = {}
        if tensors.spec(scale, name).dtype is not torch.float32:
            literals["scale"] = tensors.read(scale).to(torch.float32).reshape(-1, 1)
        yield NativeWeight(
            name, Int8RowwiseCodec(), spec.shape, {"codes": name, "scale": scale}, literals
        )


def _gptq(tensors: StoredTensors, settings: Mapping[str, Any]) -> Iterator[NativeWeight]:
    bits, form = settings.get("bits", 4), settings.get("checkpoint_format", "gptq")
    if bits != 4 or form not in ("gptq", None):
        raise ValueError(
            f"{tensors.where}: GPTQ of {bits} bits in the form {form!r} is not understood; 4 bits "
            f"in the form 'gptq' is"
        )
    for name, spec in tensors.specs.items():
        if not name.endswith(".qweight"):
            continue
        base = name.removesuffix("qweight")
        stored = {part: f"{base}{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
        scales = tensors.spec(stored["scales"], name)
        if len(spec.shape) != 2 or len(scales.shape) != 2 or not scales.shape[0]:
            raise tensors.refuse(name, f"of shape {spec.shape} has scales of shape {scales.shape}")
        shape = (spec.shape[1], spec.shape[0] * 8)
        group = shape[1] // scales.shape[0]
        if not group:
            raise tensors.refuse(stored["scales"], f"has {scales.shape[0]} groups of {shape[1]}")
        _check_groups(tensors, stored["g_idx"], scales.shape[0], f"{base}weight")
        yield NativeWeight(f"{base}weight", GptqPackedCodec(block_size=group), shape, stored)


def _check_groups(tensors: StoredTensors, name: str, groups: int, weight: str) -> None:
    """Refuse group numbers that would be read beyond the scales (on a GPU, silently)."""
    if tensors.spec(name, weight).dtype is not torch.int32:
        raise tensors.refuse(name, f"has dtype {tensors.specs[name].dtype}, not int32")
    numbers = tensors.read(name)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < groups:
        raise tensors.refuse(name, f"names groups outside 0 .. {groups - 1}")


def _bitsandbytes_4bit(
    tensors: StoredTensors, settings: Mapping[str, Any]
) -> Iterator[NativeWeight]:
    for name in tensors.specs:
        base, dot, kind = name.rpartition(f".{_STATE}")
        if not dot:
            continue
        state = _bitsandbytes_state(tensors, name, kind)
        double = "nested_blocksize" in state
        codec = _FOUR_BIT[kind](block_size=state["blocksize"], double_quantized=double)
        table = f"{base}.quant_map"
        tensors.spec(table, base)
        if not torch.equal(tensors.read(table), torch.tensor(codec.code_values())):
            raise tensors.refuse(table, f"is not the table of {kind!r}: its codes are foreign")
        stored = {"codes": base, "absmax": f"{base}.absmax"}
        literals = {}
        if double:
            stored["nested_absmax"] = f"{base}.nested_absmax"
            literals["nested_offset"] = torch.tensor(float(state["nested_offset"]))
        yield NativeWeight(base, codec, tuple(state["shape"]), stored, literals)


def _bitsandbytes_state(tensors: StoredTensors, name: str, kind: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensors.read(name).tolist()))
        shape, width = state["shape"], state["blocksize"]
        double = "nested_blocksize" in state
        offset = state["nested_offset"] if double else 0.0
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise tensors.refuse(name, f"is no quantisation state ({error!r})") from error
    sane = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not sane or type(width) is not int or width < 1 or not isinstance(offset, (int, float)):
        raise tensors.refuse(name, f"says shape {shape!r:.80} and blocksize {width!r:.40}")
    if kind not in _FOUR_BIT or state.get("quant_type", kind) != kind:
        raise tensors.refuse(name, f"is of an unknown kind; known are {sorted(_FOUR_BIT)}")
    if double and state["nested_blocksize"] != NESTED_BLOCK:
        raise tensors.refuse(name, f"has nested blocks of {state['nested_blocksize']!r:.40}")
    assert isinstance(state, dict)
    return state


def _bitsandbytes_8bit(
    tensors: StoredTensors, settings: Mapping[str, Any]
) -> Iterator[NativeWeight]:
    for name in tensors.specs:
        if not name.endswith(".SCB"):
            continue
        weight = f"{name.removesuffix('SCB')}weight"
        codes = tensors.spec(weight, name)
        if codes.dtype is not torch.int8 or len(codes.shape) != 2:
            raise tensors.refuse(weight, f"of shape {codes.shape} and {codes.dtype} is not INT8")
        yield NativeWeight(
            weight,
            Int8RowwiseCodec(scale_is_amax=True),
            codes.shape,
            {"codes": weight, "scale": name},
        )
