"""Low-rank directions in windows: shared right factors, updates kept in fp32 and merged lazily.

For a window of ``steps`` consecutive steps a matrix W [p, d] has one right factor R [d, k].
Every direction of those steps is ``A R^T`` with a left factor A [p, k] of its own; a member gives

    y_m = x_m W^T + (x_m R) (L + sign_m eps A_m)^T

with one base matmul and one skinny matmul for all members.  L [p, k], fp32, collects the updates
of the window; at its end ``W <- round(W + L R^T)`` and L starts again from zero.  Nothing is
written to W in between (it may lie on disk, read-only, or quantised), and small updates are not
rounded away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import numpy as np
import torch
from torch import Tensor

from .directions import Directions, Place, Trace
from .host import merge_kernels
from .noise import step_seed
from .perturb import StepUpdate

_WINDOW_SALT = 0x6A09E667BB67AE85


class Window(ABC):
    """One parameter's factors during one window."""

    @property
    @abstractmethod
    def right(self) -> Tensor:
        """R: fp32 [d, k]."""

    @property
    @abstractmethod
    def left(self) -> Tensor | None:
        """L: fp32 [p, k], the updates since the window began; None before the first one."""

    @abstractmethod
    def directions(self, seed: int) -> Tensor:
        """A of every direction of the step with this seed: fp32 [directions, p, k]."""

    @abstractmethod
    def accumulate(self, update: StepUpdate) -> None:
        """Take one step's update into L."""


def check_sizes(directions: int, rank: int = 1) -> None:
    """Refuse numbers of directions or ranks below one."""
    if directions < 1 or rank < 1:
        raise ValueError(f"directions and rank must be positive, got {directions} and {rank}")


class Factored(Directions):
    """Directions that are ``A R^T`` with R fixed for a window of steps."""

    directions: int  # how many of them a step probes
    steps: int

    @property
    def window_steps(self) -> int:
        """Steps between merges."""
        return self.steps

    @abstractmethod
    def open_window(self, place: Place, seed: int) -> Window:
        """Factors of a window whose noise has this seed."""

    def open(self, place: Place) -> FactoredTrace:
        return FactoredTrace(self, place)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and min(shape) > 1

    def check(self, *, directions: int, weight_decay: float) -> None:
        if weight_decay:
            raise ValueError(
                f"low-rank directions keep the base as it is between merges and have no weight "
                f"decay, got weight_decay={weight_decay}; use 0 or dense directions"
            )
        if self.window_steps < 1:
            raise ValueError(f"window_steps must be positive, got {self.window_steps}")
        if directions != self.directions:
            raise ValueError(
                f"{type(self).__name__} has factors for {self.directions} directions, the "
                f"estimator probes {directions}; give both the same number"
            )


@final
class FactoredTrace(Trace):
    """A matrix under factored directions: the open window, and where the run stands in it."""

    def __init__(self, directions: Factored, place: Place) -> None:
        self._directions = directions
        self._place = place
        self._index = -1
        self._window: Window | None = None

    def window(self, step: int) -> Window:
        """The window of a step; the previous one must have been merged (``settle``)."""
        index = step // self._directions.window_steps
        if self._window is None or index != self._index:
            assert self._window is None or self._window.left is None, "unmerged window"
            seed = step_seed(self._place.run_seed ^ _WINDOW_SALT, index)
            self._window = self._directions.open_window(self._place, seed)
            self._index = index
        return self._window

    @property
    def window_end(self) -> int:
        """First step after the window that was opened last; 0 before the first one."""
        return (self._index + 1) * self._directions.window_steps

    def retire(self, step: int) -> tuple[Tensor, Tensor] | None:
        """``settle`` for weights that are not at hand: the factors (L, R) still to be merged."""
        if self._window is None or step // self._directions.window_steps == self._index:
            return None
        left, right = self._window.left, self._window.right
        self._window = None
        return None if left is None else (left, right)

    def settle(self, weight: Tensor, step: int) -> None:
        """Merge into ``weight`` if ``step`` begins a new window."""
        retired = self.retire(step)
        if retired is not None:
            merge(weight, *retired)

    def apply(self, weight: Tensor, updates: list[StepUpdate]) -> None:
        for update in updates:
            self.settle(weight, update.step)
            self.window(update.step).accumulate(update)

    def finish(self, weight: Tensor) -> None:
        if self._window is not None and self._window.left is not None:
            merge(weight, self._window.left, self._window.right)


def merge(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """``weight <- round(weight + left @ right^T)`` in place: fp32, summed over k in order.

    Not a library matmul, whose order of summation depends on shapes and threads: any range of rows
    may be merged alone and gives the same bits.
    """
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {weight.stride()}")
    target = weight.detach()
    rows = right.T.contiguous()
    if target.device.type == "cpu" and target.dtype in (torch.float32, torch.bfloat16):
        array = (target.view(torch.uint16) if target.dtype == torch.bfloat16 else target).numpy()
        merge_kernels.merge(
            array, np.ascontiguousarray(left.numpy()), np.ascontiguousarray(rows.numpy())
        )
        return
    left, rows = left.to(target.device), rows.to(target.device)
    total = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    for column in range(rows.shape[0]):
        total = total + left[:, column : column + 1] * rows[column]
    target.copy_(target.to(torch.promote_types(target.dtype, torch.float32)) + total)
