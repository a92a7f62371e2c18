"""transformers' own Trainer on a streamed model: history, checkpoints and resuming, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Forty rows of random tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 250, (40, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make_trainer(model: Any, optimizer: Any, **options: Any) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=Tokens(),
        eval_dataset=torch.utils.data.Subset(Tokens(), range(4)),
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_history_and_resume_are_those_of_the_resident_model(harness: Any, method: str) -> None:
    harness.compare(make_trainer, method)


def test_a_tied_head_too(harness: Any) -> None:
    harness.compare(make_trainer, "full", folder=harness.folder(tied=True))
