"""``StreamedParameter``: a parameter whose bytes are elsewhere most of the time, and says so.

Outside a visit a streamed parameter holds one NaN expanded to its shape.  Code that works on
``parameter.data`` by itself (PEFT's merge, a deep copy, an initialisation) would meet that NaN,
or torch's message about overlapping memory.  Here ``.data`` then gives an ``AbsentWeight``, which
has shape, dtype and device, and refuses every computation with what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from headrace.offload.errors import HeadraceError


@final
class AbsentWeight(torch.Tensor):
    """Shape, dtype and device of a weight that is not in memory; computing with it is refused."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        shape, dtype = tuple(args[0].shape), args[0].dtype
        raise HeadraceError(
            f"{func} was called on a weight of shape {shape} and dtype {dtype} that is streamed "
            f"and not in memory now. To merge adapters, use headrace.merge_and_unload(model, "
            f"folder) instead of model.merge_and_unload(); to copy weights, headrace.export; "
            f"initialisations of adapters that change the base need a base in memory."
        )


_plain_data: Any = torch.Tensor.data


@final
class StreamedParameter(nn.Parameter):
    """An ``nn.Parameter`` whose ``.data`` outside a visit is an ``AbsentWeight``."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The bytes during a visit; what stands for them outside of one."""
        held: Tensor = _plain_data.__get__(self)
        if held.numel() > 1 and not any(held.stride()):  # expanded: the placeholder
            return torch.Tensor._make_subclass(AbsentWeight, held)
        return held

    @data.setter
    def data(self, value: Tensor) -> None:
        _plain_data.__set__(self, value)


def streamed_parameter(placeholder: Tensor, *, requires_grad: bool) -> StreamedParameter:
    """Return the parameter of a model about to be streamed, on its placeholder."""
    make: Callable[..., Any] = StreamedParameter
    made = make(placeholder, requires_grad=requires_grad)
    assert isinstance(made, StreamedParameter)
    return made
