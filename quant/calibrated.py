"""Encoding by what a layer does with its inputs: GPTQ, HQQ and EoRA for matrices and stacks.

``InputTap`` watches the products of a layer while calibration data runs through it and counts the
second moments of what meets each weight; ``encode_calibrated`` encodes by them.  The experts of a
stack share the moments of all tokens routed to any of them: a matrix of its own for each would
take experts x in x in numbers, and few tokens reach a single expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .blocks import BlockCodec, RowCodec
from .codec import Codec, Shape
from .eora import eora
from .gptq import InputMoments, gptq, output_error
from .gptq_refine import fitted_parts
from .hqq import hqq
from .int4_group import Int4GroupCodec
from .nf4 import Nf4Codec

#: Format words that name a way to encode rather than a codec, and those that need no data.
CALIBRATED_WORDS: Final = ("gptq", "hqq", "nf4-fitted")
WORDS_WITHOUT_DATA: Final = ("hqq", "nf4-fitted")


def calibrated_codec(word: str, shape: Shape) -> Codec:
    """Return the codec that one of ``CALIBRATED_WORDS`` stands for, for a weight of this shape.

    >>> calibrated_codec("hqq", (64, 96)).block_size
    32
    """
    if word == "gptq":
        return Int4GroupCodec()
    if word == "nf4-fitted":
        return Nf4Codec()
    if word == "hqq":
        width = next((width for width in (64, 32, 16) if shape[-1] % width == 0), 0)
        return Int4GroupCodec(block_size=width, mode="affine", scale_dtype="float16")
    raise ValueError(f"{word!r} is not one of {CALIBRATED_WORDS}")


@final
class InputTap(TorchFunctionMode):
    """Context manager: counts the inputs of products with the given weights.

    ``weights``: name -> a matrix (out, in), or a stack of them, each in a storage of its own; a
    matrix that ``addmm`` multiplies from the right is (in, out), as in GPT-2.  Weights that meet
    the very same input share one matrix of moments.  Memory: in x in fp32 numbers for each
    different input.

    >>> weight = torch.ones(2, 3)
    >>> with InputTap({"w": weight}) as tap:
    ...     _ = torch.nn.functional.linear(torch.eye(3), weight)
    >>> tap.moments("w").diagonal()
    tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {w.untyped_storage().data_ptr(): name for name, w in weights.items()}
        self._leaders: dict[str, str] = {}
        self._moments: dict[str, InputMoments] = {}
        self._seen: dict[int, tuple[Tensor, str]] = {}
        self._stacks = {name for name, weight in weights.items() if weight.ndim > 2}
        self._inputs_first: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count the input of a linear product; everything is computed as it would be."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self._names.get(weight.untyped_storage().data_ptr())
            if name is not None:
                self._count(name, args[0] if args else kwargs["input"])
        elif func is torch.addmm and len(args) == 3:  # bias + x W: the layers of GPT-2
            name = self._names.get(args[2].untyped_storage().data_ptr())
            if name is not None and args[2].ndim == 2:
                self._inputs_first.add(name)
                self._count(name, args[1])
        return func(*args, **kwargs)

    def next_batch(self) -> None:
        """Forget which inputs were seen; call between micro-batches."""
        self._seen.clear()

    def moments(self, name: str) -> Tensor | None:
        """Return the (in, in) fp32 moments of a weight's inputs; None if none came."""
        found = self._moments.get(self._leaders.get(name, ""))
        return None if found is None else found.matrix()

    def inputs_first(self, name: str) -> bool:
        """Whether a weight was multiplied as (in, out)."""
        return name in self._inputs_first

    def _count(self, name: str, x: Tensor) -> None:
        if not x.numel():
            return
        with torch._C.DisableTorchFunction():
            shared = self._seen.get(id(x))
            if name not in self._leaders:
                alone = shared is None or name in self._stacks
                self._leaders[name] = name if alone or shared is None else shared[1]
            leader = self._leaders[name]
            if shared is not None and shared[1] == leader and name not in self._stacks:
                return  # counted already, for its leader
            if leader not in self._moments:
                self._moments[leader] = InputMoments(x.shape[-1], device=x.device)
            self._moments[leader].add(x)
            self._seen[id(x)] = (x, leader)  # held, so that no other tensor gets its id


@final
@dataclass(frozen=True)
class CalibratedWeight:
    """Parts, and relative errors of the output: rounded to nearest, as encoded, as corrected."""

    parts: dict[str, Tensor]
    errors: dict[str, float] = field(default_factory=dict)
    correction: tuple[Tensor, Tensor] | None = None  # A (rank, in), B (out, rank)


def encode_calibrated(
    weight: Tensor,
    moments: Tensor | None,
    codec: Codec,
    *,
    eora_rank: int = 0,
    inputs_first: bool = False,
) -> CalibratedWeight:
    """Encode a matrix (out, in), or (in, out) with ``inputs_first``, or a stack of them.

    Affine INT4 codes are chosen by HQQ, those of other block codecs by GPTQ if there are moments;
    without moments the scales are fitted to the weight (``fitted_parts``).  ``eora_rank`` above 0
    adds the correction of a matrix.  Stacks get none: PEFT adapts a stack by adding to the whole of
    it, which an encoded one that is read expert by expert does not allow.
    """
    if weight.ndim < 2 or not isinstance(codec, BlockCodec):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} in codec {codec.name!r} cannot be "
            f"calibrated: matrices in block codecs can"
        )
    if inputs_first and weight.ndim > 2:
        raise ValueError(f"a stack of shape {tuple(weight.shape)} has its outputs first")
    shape = tuple(weight.shape)
    if isinstance(codec, Int4GroupCodec) and codec.mode == "affine":
        parts = hqq(weight, codec)
    elif moments is None:
        parts = fitted_parts(weight, codec)
    else:
        parts = _gptq(weight, moments, codec, inputs_first=inputs_first)
    if moments is None:
        return CalibratedWeight(parts)
    errors = {
        "output_nearest": _error(
            weight, codec, codec.encode(weight), moments, inputs_first=inputs_first
        ),
        "output": _error(weight, codec, parts, moments, inputs_first=inputs_first),
    }
    if eora_rank < 1 or weight.ndim > 2:
        return CalibratedWeight(parts, errors)
    decoded = codec.decode(parts, shape)
    if inputs_first:
        weight, decoded = weight.t(), decoded.t()
    rank = min(eora_rank, *shape)
    a, b = eora(weight, decoded, moments, rank=rank)
    errors["output_corrected"] = output_error(weight, decoded + b @ a, moments)
    return CalibratedWeight(parts, errors, (a, b))


def _gptq(
    weight: Tensor, moments: Tensor, codec: BlockCodec, *, inputs_first: bool
) -> dict[str, Tensor]:
    shape, cols = tuple(weight.shape), weight.shape[-1]
    if weight.ndim == 2:
        parts = gptq(weight, moments, codec, inputs_first=inputs_first).parts
    elif isinstance(codec, RowCodec) and not codec.whole_spec():
        matrices = [gptq(matrix, moments, codec).parts for matrix in weight.view(-1, *shape[-2:])]
        parts = {name: torch.cat([m[name].reshape(-1) for m in matrices]) for name in matrices[0]}
    else:  # a number of the whole tensor: its matrices are one, all with the same inputs
        parts = gptq(weight.reshape(-1, cols), moments, codec).parts
    return {name: parts[name].reshape(spec.shape) for name, spec in codec.spec(shape).items()}


def _error(
    weight: Tensor,
    codec: Codec,
    parts: Mapping[str, Tensor],
    moments: Tensor,
    *,
    inputs_first: bool,
) -> float:
    """Relative rms error of the outputs, one matrix of a stack at a time."""
    shape = tuple(weight.shape)
    if weight.ndim == 2:
        decoded = codec.decode(parts, shape)
        if inputs_first:
            weight, decoded = weight.t(), decoded.t()
        return output_error(weight, decoded, moments)
    size = shape[-2] * shape[-1]
    squares = []
    for number, matrix in enumerate(weight.view(-1, *shape[-2:])):
        decoded = codec.decode_slice(parts, shape, number * size, (number + 1) * size)
        squares.append(output_error(matrix, decoded.view(shape[-2:]), moments) ** 2)
    return float((sum(squares) / len(squares)) ** 0.5)
