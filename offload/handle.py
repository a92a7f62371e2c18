"""``GradientHandle``: what a streamed parameter's ``.grad`` is while its bytes wait elsewhere.

It has the parameter's shape, dtype and device and no memory.  Code that clips or logs gradient
norms (``clip_grad_norm_``, the Trainer) works on it as on any gradient: norms were computed when
the gradient was complete, and a multiplication is noted and applied, in the gradient's own
dtype, right before the update.  Anything that would read the bytes is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from .errors import UnsupportedModelError
from .stand_in import METADATA


@final
class GradientHandle(Tensor):
    """The gradient of one streamed parameter, by reference."""

    _name: str
    _norm: Tensor
    _may_scale: bool
    _factor: Tensor | float | None

    @staticmethod
    def make(name: str, like: Tensor, norm: Tensor, *, may_scale: bool) -> GradientHandle:
        """A handle for the gradient of parameter ``like``, whose 2-norm is ``norm``.

        ``may_scale``: whether the update still waits; if not, scaling is refused.
        """
        handle = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            GradientHandle, like.shape, dtype=like.dtype, device=like.device
        )
        handle._name, handle._norm, handle._may_scale = name, norm, may_scale
        handle._factor = None
        return handle

    @property
    def factor(self) -> Tensor | float | None:
        """What the gradient is to be multiplied by; None: nothing asked for it."""
        return self._factor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GradientHandle({self._name!r}, shape={tuple(self.shape)})"

    def _scaled_norm(self, order: float) -> Tensor:
        if order != 2.0:
            raise UnsupportedModelError(
                f"the gradient of streamed parameter {self._name!r} only has a 2-norm, not one of "
                f"order {order:g}. Clip with norm_type=2."
            )
        return self._norm if self._factor is None else self._norm * self._factor

    def _scale(self, factor: Tensor | float) -> GradientHandle:
        if not self._may_scale:
            if float(factor) == 1.0:
                return self
            raise UnsupportedModelError(
                f"the gradient of streamed parameter {self._name!r} has been applied already "
                f"(update='backward'), so it cannot be scaled by {float(factor):g}. Load with "
                f"update='forward' to clip, or set max_grad_norm to 0."
            )
        self._factor = factor if self._factor is None else self._factor * factor
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        raise _unreadable(func, args)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.linalg.vector_norm, torch.norm, Tensor.norm):
            order = args[1] if len(args) > 1 else kwargs.get("ord", kwargs.get("p", 2.0))
            return args[0]._scaled_norm(float(order))
        if func is torch._foreach_norm:
            order = float(args[1] if len(args) > 1 else kwargs.get("ord", 2.0))
            return tuple(
                g._scaled_norm(order)
                if isinstance(g, GradientHandle)
                else torch.linalg.vector_norm(g, order)
                for g in args[0]
            )
        if func in (Tensor.mul_, Tensor.__imul__):
            return args[0]._scale(args[1])
        if func is torch._foreach_mul_:
            for g in args[0]:
                g._scale(args[1]) if isinstance(g, GradientHandle) else g.mul_(args[1])
            return None
        if func in (Tensor.detach, Tensor.detach_):
            return args[0]
        if func in _FREE:
            return super().__torch_function__(func, types, args, kwargs)
        raise _unreadable(func, args)


def _unreadable(func: Callable[..., Any], args: tuple[Any, ...]) -> UnsupportedModelError:
    name = next((a._name for a in args if isinstance(a, GradientHandle)), "?")
    return UnsupportedModelError(
        f"{getattr(func, '__name__', func)} needs the bytes of the gradient of streamed parameter "
        f"{name!r}, which wait in host memory or on disk. Only 2-norms and scaling work here."
    )


_FREE = METADATA | {
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[attr-defined,union-attr]
}
