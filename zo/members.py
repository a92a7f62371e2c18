"""Runs a model for many members at once: one base matmul a layer, low-rank differences on top.

Inside ``MemberForward`` a model is called with the batch of every member, one member after the
other along the batch axis.  Calls of ``linear``, ``addmm`` (GPT-2's Conv1D) and ``embedding`` on
trained weights are recognised by the weight's identity and get each member's low-rank term; the
model's code is untouched, and modules nobody prepared for work as long as they use these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..quant.encoded import EncodedTensor
from .adapter import Adapter
from .estimate import Member
from .factored import Window


@dataclass(frozen=True, slots=True)
class TrainedMatrix:
    """A weight of the model, its name, and the window that holds its factors.

    ``adapter``: closed windows, for a weight that they cannot be merged into.
    """

    name: str
    weight: Tensor
    window: Window
    adapter: Adapter | None = None


def whole_table(name: str) -> Tensor | None:
    """Every table holds all of its rows."""
    return None


@final
class MemberForward(TorchFunctionMode):
    """Adds each member's low-rank difference wherever a trained weight is used.

    ``y_m = x_m W^T + (x_m R) (L + sign_m eps A_m)^T``; the difference is computed in the dtype of
    the activations.  Extra memory: ``members * (p + tokens) * k`` numbers, one layer at a time.
    """

    def __init__(
        self,
        matrices: Sequence[TrainedMatrix],
        members: Sequence[Member],
        *,
        seed: int,
        eps: float,
        rows_of: Callable[[str], Tensor | None] = whole_table,
    ) -> None:
        """``rows_of(name)``: which rows of a table its weight holds at present (None: all)."""
        super().__init__()
        self._matrices: Mapping[Hashable, TrainedMatrix] = {_key(m.weight): m for m in matrices}
        self._rows_of = rows_of
        self._members = tuple(members)
        self._seed = seed
        self._steps = torch.tensor([eps * member.sign for member in members])[:, None, None]
        self._order = [member.direction for member in members]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        output = func(*args, **named)
        if func is functional.linear:
            return self._after_linear(output, *_pick(args, named, "input", "weight"))
        if func is torch.addmm:
            return self._after_addmm(output, *_pick(args[1:], named, "mat1", "mat2"))
        if func is functional.embedding:
            return self._after_embedding(output, *_pick(args, named, "input", "weight"))
        return output

    def lefts(self, matrix: TrainedMatrix) -> Tensor | None:
        """``L + sign eps A`` of all members: fp32 [members, p, k]; None if all of them are zero."""
        pending = matrix.window.left
        if not any(member.sign for member in self._members):
            return None if pending is None else pending.expand(len(self._members), -1, -1)
        stack = matrix.window.directions(self._seed)
        if self._order != list(range(len(stack))):
            stack = stack[self._order]
        stack *= self._steps
        return stack if pending is None else stack.add_(pending)

    def _after_linear(self, output: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
        matrix = self._matrix(weight)
        if matrix is None:
            return output
        lefts = self.lefts(matrix)
        if lefts is not None:
            inner = self._split(inputs, matrix.name) @ matrix.window.right.to(inputs)
            # In place and fused: the output of the base matmul is read and written once.
            wide = output.view(len(self._members), -1, output.shape[-1])
            wide.baddbmm_(inner, lefts.to(inputs).transpose(1, 2))
        if matrix.adapter is not None and (kept := matrix.adapter.factors) is not None:
            left, right = kept
            inner = inputs.reshape(-1, inputs.shape[-1]) @ right.to(inputs)
            output.view(-1, output.shape[-1]).addmm_(inner, left.to(inputs).T)
        return output

    def _after_addmm(self, output: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
        matrix = self._matrix(weight)
        if matrix is None:
            return output
        lefts = self.lefts(matrix)
        if lefts is not None:
            rows = self._split(inputs, matrix.name)
            inner = torch.bmm(rows, lefts.to(inputs))
            difference = inner @ matrix.window.right.to(inputs).T
            output.add_(difference.view(output.shape))
        if matrix.adapter is not None and (kept := matrix.adapter.factors) is not None:
            left, right = kept
            output.addmm_(inputs @ left.to(inputs), right.to(inputs).T)
        return output

    def _after_embedding(self, output: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        matrix = self._matrix(weight)
        if matrix is None or matrix.adapter is not None:
            return output
        lefts = self.lefts(matrix)
        if lefts is None:
            return output
        rows = self._rows_of(matrix.name)
        if rows is not None:
            tokens = rows.to(tokens.device)[tokens]
        if tokens.shape[0] % len(self._members):
            raise self._misfit(matrix.name, tuple(tokens.shape))
        ids = tokens.reshape(len(self._members), -1).to(lefts.device)
        picked = torch.stack([left[index] for left, index in zip(lefts, ids, strict=True)])
        difference = picked.to(output) @ matrix.window.right.to(output).T
        return output + difference.view(output.shape)

    def _matrix(self, weight: Tensor) -> TrainedMatrix | None:
        matrix = self._matrices.get(_key(weight))
        # A part of an encoded weight (one expert of a stack) has the whole's key.
        return None if matrix is None or matrix.weight.shape != weight.shape else matrix

    def _split(self, tensor: Tensor, name: str) -> Tensor:
        """[batch, ..., width] as [members, rows, width]; a view if the tensor is contiguous."""
        if tensor.shape[0] % len(self._members):
            raise self._misfit(name, tuple(tensor.shape))
        return tensor.reshape(len(self._members), -1, tensor.shape[-1])

    def _misfit(self, name: str, shape: tuple[int, ...]) -> ValueError:
        return ValueError(
            f"{name} was called with {shape}, which does not split into {len(self._members)} "
            "members along the batch axis; leave this weight out of `select`"
        )


def _key(weight: Tensor) -> Hashable:
    """What all tensors that stand for one weight have in common."""
    if isinstance(weight, EncodedTensor):  # made anew at every use
        return weight.view_.owner.key()
    return id(weight)


def _pick(args: Sequence[Any], named: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(
        args[position] if position < len(args) else named[name]
        for position, name in enumerate(names)
    )
