"""Working memory of the computation itself: graphs of one micro-batch, logits of one tile.

torch allocates these, not the engine, so they are *measured* once per kind of chunk and shape of
micro-batch, before activations fill the device, and lent from the device budget for good.  What
is lent is: everything that one micro-batch's graph saves, as much again for its gradients, one
more copy of the chunk's largest parameter (its gradient before it is added up, or a packed form
for the matrix product), and four times the hidden states that enter and leave the visit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .budget import Loan
from .engine import Engine
from .errors import BudgetError

# A logit is held as the head's output, as fp32, as its softmax, and as two gradients.
LOGIT_BYTES = 2 + 4 + 4 + 4 + 2


def measured_graph_bytes(run: Callable[[], object], known: set[int]) -> int:
    """Bytes of distinct storages that ``run``'s graph saves, but for those in ``known``."""
    seen: dict[int, int] = {}

    alive: list[Tensor] = []  # addresses are only distinct while their tensors live

    def pack(tensor: Tensor) -> None:
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return  # an encoded weight: it stands for bytes of the chunk and has none of its own
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        # The graph gets nothing to keep: a graph that holds its own output is never freed.
        alive.append(tensor.detach())

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda nothing: nothing):
        output = run()
    del output
    return sum(seen.values())


@final
class Workspace:
    """The loan for working memory; it only ever grows."""

    def __init__(self, engine: Engine, *, expected_bytes: int) -> None:
        """``expected_bytes``: what the loss, which comes last in a pass, will ask for at most."""
        self._engine = engine
        self._expected_bytes = expected_bytes
        self._loan: Loan | None = None
        self._measured: set[tuple[object, ...]] = set()

    @property
    def nbytes(self) -> int:
        """Bytes lent at present."""
        return 0 if self._loan is None else self._loan.nbytes

    @property
    def needed_bytes(self) -> int:
        """Bytes lent, or expected to be: what others leave alone."""
        return max(self.nbytes, self._expected_bytes)

    def expect_no_more(self) -> None:
        """The largest request has been made."""
        self._expected_bytes = 0

    def is_new(self, *key: object) -> bool:
        """Whether this kind and shape has not been measured yet; it counts as measured now."""
        if key in self._measured:
            return False
        self._measured.add(key)
        return True

    def reserve(self, nbytes: int, what: str) -> None:
        """Hold at least ``nbytes`` for the computation, giving up cached chunks if need be."""
        more = nbytes - self.nbytes
        if more <= 0:
            return
        budget = self._engine.device.budget
        if self._loan is not None:
            self._loan.repay()
            self._loan = None
        while (loan := budget.try_borrow("workspace", nbytes)) is None:
            if not self._engine.free_device(-1) and not self._engine.settle_one("device memory"):
                used = budget.limit_bytes - budget.free_bytes
                raise BudgetError(
                    f"{what} needs {nbytes:,} bytes of working memory on DEVICE, but "
                    f"{budget.free_bytes:,} of the {budget.limit_bytes:,}-byte budget are free. "
                    f"Raise device_budget to at least {used + nbytes:,} bytes, or lower "
                    f"micro_batch or the sequence length."
                )
        self._loan = loan

    def close(self) -> None:
        """Give the loan back."""
        if self._loan is not None:
            self._loan.repay()
            self._loan = None
