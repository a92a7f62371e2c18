"""Runs one streamed module for all dense members of a step while its weights are there.

Every member's part of the batch meets the member's own weights; the parts join again along the
batch axis, so that the module's caller sees one bigger batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..offload.layer import Call, Outputs
from ..offload.runtime import Pass
from .estimate import Member


def run_members(
    weights_of: Callable[[Member], AbstractContextManager[None]],
    members: Sequence[Member],
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    current: Pass,
    label: str,
    same_rows: bool = False,
) -> Any:
    """``plain(*args, **kwargs)`` a member at a time, inside ``weights_of(member)``.

    Tensors of two axes or more whose first is the whole batch are split.  ``same_rows``: inputs of
    one row serve every sequence (position tables), and members' outputs are repeated for theirs.
    """
    each, rest = divmod(current.batch_size, len(members))
    if rest:
        raise ValueError(
            f"a batch of {current.batch_size} sequences does not split into {len(members)} members"
        )
    leaves, spec = tree_flatten((args, kwargs))
    if len(members) > 1:
        rows = {t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim() >= 2}
        if same_rows and rows == {1}:
            leaves = [
                leaf.expand(current.batch_size, *leaf.shape[1:])
                if isinstance(leaf, Tensor) and leaf.dim() >= 2
                else leaf
                for leaf in leaves
            ]
            rows = {current.batch_size}
        if current.batch_size not in rows:
            raise ValueError(
                f"{label!r} was called with no input of {current.batch_size} sequences, so its "
                f"{len(members)} members cannot be told apart; leave it out of `select`"
            )
    slices = tuple(slice(m * each, (m + 1) * each) for m in range(len(members)))
    call = Call(plain, label, tuple(leaves), spec, (), slices, current.batch_size, current.masks)
    outputs = Outputs(label)
    for member, part in zip(members, slices, strict=True):
        with weights_of(member):
            outputs.add(call.run(part, ()))
    return outputs.rebuild(outputs.join())
