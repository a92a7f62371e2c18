"""Objectives over a whole population in one forward, for Hugging Face causal language models.

Any function ``(model, members) -> losses`` will do; these are the two that most runs need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED_LABEL = -100


def repeat_batch(batch: Mapping[str, Any], members: int) -> dict[str, Any]:
    """The batch once per member, member after member along the first axis.

    >>> repeat_batch({"x": torch.tensor([1, 2])}, 2)["x"]
    tensor([1, 2, 1, 2])
    """
    return {
        name: value.repeat(members, *([1] * (value.dim() - 1)))
        if isinstance(value, Tensor) and value.dim() > 0
        else value
        for name, value in batch.items()
    }


def causal_lm_losses(
    model: nn.Module, batch: Mapping[str, Any], copies: int, *, parts: int = 1
) -> list[float]:
    """Mean next-token cross-entropy of every copy of the batch, from one forward over all copies.

    ``parts``: of every copy, that of each of so many equal parts of its rows (one after the other),
    for estimators that have members for each (``estimator.parts``).  A part without a label has
    loss 0 in every copy, which says nothing about any direction.

    ``batch`` holds ``labels`` (int64 [batch, tokens], -100 ignored) and the model's own inputs.
    Logits are made only at positions that some label of the batch needs: ``copies * batch *
    positions * vocabulary`` numbers of the model's dtype.  Losses are taken in fp32, one sequence
    at a time, and summed in fp64.

    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> from headrace.zo import causal_lm_losses
    >>> model = AutoModelForCausalLM.from_pretrained("model-folder")
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> losses = causal_lm_losses(model, {"input_ids": tokens, "labels": tokens}, copies=1)
    >>> len(losses)
    1
    """
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORED_LABEL).any(dim=0).nonzero().flatten()
    if not positions.numel():
        raise ValueError(f"the batch of {len(labels)} sequences has no label to learn from")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    rows = _rows_of_a_part(len(labels), parts)
    logits = model(**repeat_batch(inputs, copies), use_cache=False, logits_to_keep=positions).logits
    targets = labels[:, positions].view(parts, rows, -1)
    return [
        _mean_loss(logits_of_part, targets_of_part)
        for copy in logits.view(copies, *targets.shape, logits.shape[-1])
        for logits_of_part, targets_of_part in zip(copy, targets, strict=True)
    ]


def label_word_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    copies: int,
    *,
    words: Sequence[int],
    parts: int = 1,
) -> list[float]:
    """Cross-entropy among candidate label words at the last position (prompted classification).

    ``batch`` holds left-padded inputs and ``classes`` (int64 [batch], indices into ``words``, the
    token ids of the candidates).  ``copies`` and ``parts``: see ``causal_lm_losses``.

    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> from headrace.zo import label_word_losses
    >>> model = AutoModelForCausalLM.from_pretrained("model-folder")
    >>> batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "classes": torch.tensor([0, 1])}
    >>> losses = label_word_losses(model, batch, copies=1, words=(7, 8))
    >>> len(losses)
    1
    """
    classes = batch["classes"]
    rows = _rows_of_a_part(len(classes), parts)
    inputs = {name: value for name, value in batch.items() if name != "classes"}
    output = model(**repeat_batch(inputs, copies), use_cache=False, logits_to_keep=1)
    scores = output.logits[:, -1, list(words)].float().view(copies, parts, rows, len(words))
    return [
        float(functional.cross_entropy(part, right).double())
        for copy in scores
        for part, right in zip(copy, classes.view(parts, rows), strict=True)
    ]


def _rows_of_a_part(rows: int, parts: int) -> int:
    each, rest = divmod(rows, parts)
    if rest or not each:
        raise ValueError(
            f"a batch of {rows} rows does not split into {parts} equal parts; use a batch size "
            "that the estimator's parts divide"
        )
    return each


def _mean_loss(logits: Tensor, targets: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, target in zip(logits, targets, strict=True):
        loss = functional.cross_entropy(
            row.float(), target, ignore_index=IGNORED_LABEL, reduction="sum"
        )
        total += loss.double()
    return float(total / (targets != IGNORED_LABEL).sum().clamp(min=1))
