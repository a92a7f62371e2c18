"""Attention masks of a batch, as each micro-batch would have had them by itself."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor


@final
class CausalMasks:
    """Finds micro-batches whose part of a batch's mask is nothing but causal.

    A model leaves such a mask out (None: the attention kernel is causal by itself), but makes one
    for the whole batch as soon as one sequence is padded.  A micro-batch without padding must
    take the kernel that it would take alone, or its last bits differ.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], bool] = {}

    def implied(self, mask: Tensor, part: slice) -> bool:
        """Whether ``mask[part]`` is a boolean (rows, 1, T, T) lower triangle."""
        square = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3] > 1
        if mask.dtype is not torch.bool or not square:
            return False
        # Calls keep the mask alive until backward is done, so its id is not taken again.
        key = (id(mask), part.start, part.stop)
        if key not in self._known:
            causal = torch.ones_like(mask[0, 0]).tril()
            self._known[key] = bool((mask[part] == causal).all())
        return self._known[key]
