"""``StoredTensor``: an entry of a streamed model's state dict whose bytes are read when asked for.

Shape, dtype and device are known without memory.  Any operation reads the weight, as it is now,
and works on an ordinary tensor; nothing keeps that tensor, so code that takes entries one by one
(or only some of them, as PEFT does) never holds the model.  Where an address or storage is asked
for, the entry keeps its bytes from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from headrace.offload.stand_in import METADATA


@final
class StoredTensor(Tensor):
    """One weight by reference, in host memory as far as anyone can tell."""

    _read: Callable[[], Tensor]
    _kept: Tensor | None

    @staticmethod
    def make(like: Tensor, read: Callable[[], Tensor]) -> StoredTensor:
        """An entry with the shape and dtype of ``like``; ``read`` makes its bytes."""
        entry = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            StoredTensor, like.shape, dtype=like.dtype, device=torch.device("cpu")
        )
        entry._read, entry._kept = read, None
        return entry

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def value(self) -> Tensor:
        """The weight as an ordinary tensor."""
        return self._read() if self._kept is None else self._kept

    def keep(self) -> Tensor:
        """As ``value``, and hold it for as long as this entry lives."""
        if self._kept is None:
            self._kept = self._read()
        return self._kept

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Below __torch_function__: reached by code that disables it, with no bytes to give it.
        return func(*tree_map(_value, args), **tree_map(_value, kwargs or {}))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FREE:
            return super().__torch_function__(func, types, args, kwargs)
        if func in (Tensor.detach, Tensor.cpu):
            return args[0]
        take = _kept if func in _ADDRESSES else _value
        return func(*tree_map(take, args), **tree_map(take, kwargs))


def _value(entry: Any) -> Any:
    return entry.value() if isinstance(entry, StoredTensor) else entry


def _kept(entry: Any) -> Any:
    return entry.keep() if isinstance(entry, StoredTensor) else entry


_ADDRESSES = frozenset(
    {
        Tensor.data_ptr,
        Tensor.untyped_storage,
        Tensor.storage,
        Tensor.numpy,
        Tensor.__array__,
        Tensor.view,
        Tensor.data.__get__,  # type: ignore[attr-defined]
    }
)

_FREE = METADATA | {
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    Tensor.is_quantized.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[attr-defined,union-attr]
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.nbytes.__get__,  # type: ignore[attr-defined]
    Tensor.itemsize.__get__,  # type: ignore[attr-defined]
    Tensor.is_complex,
    Tensor.is_contiguous,
    Tensor.stride,
    Tensor.nelement,
    Tensor.__len__,
    Tensor.__hash__,
}
