"""A tensor that is its encoding: it has shape, dtype and device, and decodes whenever it is used.

``EncodedTensor`` is a torch wrapper subclass.  Every operation below autograd that meets one
decodes it, computes with the ordinary tensor, and drops that; what autograd saves for the
backward pass is the wrapper, so backward decodes again and nothing decoded survives in between.
The operations themselves are torch's, on equal operands: results have the bits of the same
computation with the decoded weight resident.

Transposes, detaching, casts between floating types, and slices along the first axis (one expert
of a stack) stay encoded; they decode only what they cover.  Writing is refused: an encoded weight
is frozen.

The parts are asked of their owner at every decoding, never kept: an owner may move them between
decodings (as a streaming engine does), as long as they are there when a use comes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .codec import Codec, Shape


class PartsOwner(ABC):
    """Whoever holds the parts of an encoded tensor at the moment."""

    @abstractmethod
    def parts(self) -> Mapping[str, Tensor]:
        """Return the current parts, on the device where the decoded tensor is wanted."""

    @abstractmethod
    def describe(self) -> str:
        """Return what error messages call this tensor."""

    @abstractmethod
    def key(self) -> Hashable:
        """Return what two owners of the same parts, and no others, have in common."""


@final
@dataclass(frozen=True, slots=True)
class EncodedView:
    """Which elements of an encoded tensor a wrapper stands for, and how they are arranged."""

    owner: PartsOwner
    codec: Codec
    whole_shape: Shape
    dtypes: tuple[torch.dtype, ...]  # rounded to these in turn; the last one is the view's
    start: int  # first element
    shape: Shape  # contiguous from ``start``, before the transpose
    transposed: bool  # last two axes exchanged

    def decode(self) -> Tensor:
        """Return the values as an ordinary tensor."""
        parts = self.owner.parts()
        stop = self.start + math.prod(self.shape)
        flat = self.codec.decode_slice(
            parts, self.whole_shape, self.start, stop, dtype=self.dtypes[0]
        )
        value = flat.view(self.shape)
        for dtype in self.dtypes[1:]:
            value = value.to(dtype)
        return value.transpose(-2, -1) if self.transposed else value

    def visible_shape(self) -> Shape:
        """Return the shape after the transpose."""
        if not self.transposed:
            return self.shape
        return (*self.shape[:-2], self.shape[-1], self.shape[-2])


@final
class EncodedTensor(torch.Tensor):
    """A frozen tensor kept as the parts of a codec; see the module's page.

    Made by ``encoded_tensor``.  ``decode()`` gives the ordinary tensor.
    """

    view_: EncodedView
    #: transformers' initialisers ask tensors for this, and leave alone what has its values.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, view: EncodedView, device: torch.device) -> EncodedTensor:
        shape = view.visible_shape()
        strides = list(torch.empty(view.shape, device="meta").stride())
        if view.transposed:
            strides[-1], strides[-2] = strides[-2], strides[-1]
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=tuple(strides), dtype=view.dtypes[-1], device=device
        )
        made.view_ = view
        return made

    def decode(self) -> Tensor:
        """Return the values as an ordinary tensor of this dtype."""
        return self.view_.decode()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        view = self.view_
        return (
            f"EncodedTensor({view.owner.describe()}, codec={view.codec.name}, "
            f"shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # ``.data`` must not slip past the refusal of writes below.
        # (Method wrappers are made anew at each look-up, so they are compared by value.)
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise _frozen(args[0], "assigning to .data")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], EncodedTensor):
            kept = _stays_encoded(func, args, kwargs)
            if kept is not None:
                return EncodedTensor(kept, args[0].device)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, EncodedTensor):
                raise _frozen(value, str(func))
        for value in (kwargs.get("out"),):
            if isinstance(value, EncodedTensor):
                raise _frozen(value, str(func))
        decoded_args, decoded_kwargs = tree_map(
            lambda leaf: leaf.decode() if isinstance(leaf, EncodedTensor) else leaf,
            (args, kwargs),
        )
        return func(*decoded_args, **decoded_kwargs)


def encoded_tensor(
    owner: PartsOwner, codec: Codec, shape: Shape, dtype: torch.dtype
) -> EncodedTensor:
    """Return the frozen tensor of ``shape`` and ``dtype`` that the owner's parts encode."""
    if not dtype.is_floating_point:
        raise ValueError(f"{owner.describe()} cannot decode to {dtype}; choose a float dtype")
    shape = tuple(shape)
    view = EncodedView(owner, codec, shape, (dtype,), 0, shape, transposed=False)
    (*_, any_part) = owner.parts().values()
    return EncodedTensor(view, any_part.device)


def _frozen(tensor: EncodedTensor, what: str) -> ValueError:
    view = tensor.view_
    return ValueError(
        f"{what} would write to {view.owner.describe()}, which is kept encoded as "
        f"{view.codec.name!r} and frozen; decode it, change the copy, and encode that (to merge "
        f"adapters into a streamed base: headrace.merge_and_unload(model, folder))"
    )


def _stays_encoded(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> EncodedView | None:
    """Return the view that an operation on a wrapper yields without decoding, if it can."""
    aten = torch.ops.aten
    view = args[0].view_
    rank = len(view.shape)
    # A copy of what cannot change is the same; writing to it is refused as for the original.
    if func in (aten.detach.default, aten.alias.default, aten.clone.default):
        return view
    if func is aten.t.default and rank == 2:
        return replace(view, transposed=not view.transposed)
    if func is aten.transpose.int and rank >= 2:
        axes = {args[1] % rank, args[2] % rank}
        return (
            replace(view, transposed=not view.transposed) if axes == {rank - 2, rank - 1} else None
        )
    if func is aten._to_copy.default:
        dtype = kwargs.get("dtype")
        others = {key for key, value in kwargs.items() if value is not None} - {"dtype"}
        if dtype is not None and dtype.is_floating_point and not others:
            return replace(view, dtypes=(*view.dtypes, dtype))
        return None
    first_axis_free = rank > 2 or not view.transposed
    if func is aten.select.int and args[1] == 0 and rank >= 2 and first_axis_free:
        if not -view.shape[0] <= args[2] < view.shape[0]:
            raise IndexError(
                f"index {args[2]} is out of range of {view.owner.describe()}, whose first axis "
                f"holds {view.shape[0]}"
            )
        index = args[2] % view.shape[0]
        row = math.prod(view.shape[1:])
        return replace(view, start=view.start + index * row, shape=view.shape[1:])
    if func is aten.slice.Tensor and first_axis_free and rank >= 1:
        given: tuple[Any, ...] = args[1:]
        defaults: tuple[Any, ...] = (0, None, None, 1)
        dim, start, stop, step = given + defaults[len(given) :]
        if dim == 0 and step == 1:
            begin, end, _ = slice(start, stop).indices(view.shape[0])
            row = math.prod(view.shape[1:])
            shape = (max(end - begin, 0), *view.shape[1:])
            return replace(view, start=view.start + begin * row, shape=shape)
    return None
