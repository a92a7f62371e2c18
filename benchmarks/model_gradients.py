"""Gradients of a real model, as large square matrices.

The model is the demo's, SmolLM2-135M-Instruct, on the text the demo trains on.  Its own matrices
are at most 1536 x 576, so a 2048 x 2048 case is laid out as a grid of them: the gradients of the
gate projections (1536 x 576) of eight consecutive layers, two layers below each other in each of
four columns, cut to 2048 rows and columns.  Every element is a gradient that the model has; no
block is repeated or scaled, and the spectrum is that of eight layers mixed, which is flatter than
one layer's and so harder for a projection.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.demo import demo_data, demo_model

LAYERS, LENGTH, BATCH = 8, 256, 8


class Silent:
    """A watcher that hears nothing."""

    def say(self, line: str) -> None:
        """Drop a line."""


def square_gradients(side: int, between: int) -> tuple[Tensor, Tensor]:
    """Return two (side, side) fp32 gradients of 2048 tokens each, ``between`` steps apart.

    The steps between are AdamW's at 1e-4 on other batches, on the weights of the grid.
    """
    torch.manual_seed(0)
    folder = demo_model(Silent())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = [layer.mlp.gate_proj.weight for layer in model.model.layers[-LAYERS:]]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    batches = iter(tokens(AutoTokenizer.from_pretrained(folder)))
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def gradient() -> Tensor:
        optimizer.zero_grad()
        batch = next(batches)
        model(input_ids=batch, labels=batch).loss.backward()
        return grid([weight.grad for weight in weights], side)

    first = gradient()
    optimizer.step()
    for _ in range(between - 1):
        gradient()
        optimizer.step()
    return first, gradient()


def tokens(tokenizer: Callable[[str], Any]) -> list[Tensor]:
    """Return batches of (BATCH, LENGTH) token ids of the shipped text, in order."""
    lines = demo_data().read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    size = BATCH * LENGTH
    return [piece.view(BATCH, LENGTH) for piece in ids[: ids.numel() // size * size].split(size)]


def grid(gradients: list[Tensor | None], side: int) -> Tensor:
    """Lay (rows, cols) gradients out two to a column and cut the result to (side, side)."""
    given = [one for one in gradients if one is not None]
    columns = [torch.cat(given[i : i + 2]) for i in range(0, len(given), 2)]
    whole = torch.cat(columns, dim=1)
    assert min(whole.shape) >= side, f"{tuple(whole.shape)} is too small for {side}"
    return whole[:side, :side].contiguous()
