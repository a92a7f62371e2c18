"""transformers' own Trainer on a streamed model: history, checkpoints and resuming, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments


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


def test_experts_return_from_the_checkpoints_own_names(harness: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mixtral"
    torch.manual_seed(7)
    config = MixtralConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    harness.compare(make_trainer, "full", folder=folder)
