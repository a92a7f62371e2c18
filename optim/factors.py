"""Pairs of low-rank factors kept well conditioned: refactorisation with a momentum reset.

The pre-training survey arXiv:2505.22922 finds that factors ``up @ down`` trained by Adam drift
apart in scale, and that splitting their product evenly again by an SVD from time to time, with
fresh moments, closes much of the gap to full-rank training.  The product, and so what the model
computes, is the same before and after (to the factors' rounding).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

Pair = tuple[nn.Parameter, nn.Parameter]


def rebalanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (m, r) and (r, n) of the same product with equal singular values.

    ``up @ down`` = U S V' becomes U sqrt(S) and sqrt(S) V'.  Costs two QR factorisations of the
    factors and an SVD of r x r; fp32 results.

    >>> up, down = rebalanced(torch.full((3, 1), 4.0), torch.full((1, 3), 0.25))
    >>> torch.allclose(up @ down, torch.ones(3, 3)), torch.allclose(up.norm(), down.norm())
    (True, True)
    """
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} have no product"
        )
    left, upper = torch.linalg.qr(up.float())
    right, lower = torch.linalg.qr(down.float().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    # Factors wider than the matrix: the product has fewer singular values than the pair has room.
    room = up.shape[1] - s.numel()
    root = s.sqrt()
    balanced_up = nn.functional.pad((left @ u) * root, (0, room))
    balanced_down = nn.functional.pad(root[:, None] * (vh @ right.T), (0, 0, 0, room))
    return balanced_up, balanced_down


def lora_pairs(model: nn.Module) -> list[Pair]:
    """Return the trainable (up, down) pairs of a PEFT model's LoRA layers.

    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("model-folder")
    >>> model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    >>> [(tuple(up.shape), tuple(down.shape)) for up, down in lora_pairs(model)][:2]
    [((32, 4), (4, 32)), ((32, 4), (4, 64))]
    """
    parameters = dict(model.named_parameters())
    pairs = []
    for name, down in parameters.items():
        up = parameters.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and up is not None and up.requires_grad and down.requires_grad:
            pairs.append((up, down))
    return pairs


@final
class Refactorization:
    """Rebalance pairs and forget their moments whenever they have done ``every`` steps.

    Works on any ``torch.optim.Optimizer`` that counts a parameter's steps in its state, from
    which it takes the time: nothing of its own has to be saved.  ``close()`` ends it.

    >>> from headrace.optim import adamw
    >>> up, down = nn.Parameter(torch.full((3, 1), 4.0)), nn.Parameter(torch.full((1, 3), 0.25))
    >>> optimizer = adamw([up, down], lr=0.0)
    >>> refactorization = Refactorization(optimizer, [(up, down)], every=1)
    >>> (up @ down).sum().backward()
    >>> optimizer.step()
    >>> round(up[0].abs().item(), 4)  # of both factors; it was 4 in one and a quarter in the other
    1.0
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, pairs: Iterable[Pair], *, every: int = 200
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self._pairs = list(pairs)
        if not self._pairs:
            raise ValueError("there are no pairs of factors to rebalance; see lora_pairs(model)")
        self._every = every
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def close(self) -> None:
        """Let the optimizer run as before."""
        self._handle.remove()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for up, down in self._pairs:
            if int(optimizer.state.get(up, {}).get("step", 0)) < self._every:
                continue
            for parameter, value in zip((up, down), rebalanced(up, down), strict=True):
                parameter.copy_(value)
                # Masters go with the moments: they would bring the old factors back.
                del optimizer.state[parameter]
