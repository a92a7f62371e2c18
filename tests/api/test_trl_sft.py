"""TRL's SFTTrainer on a streamed model, with its fused head: the resident history, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from datasets import Dataset
from trl import SFTConfig, SFTTrainer


@pytest.mark.parametrize(
    ("method", "tied", "loss_type"),
    [("lora", False, "nll"), ("full", False, "nll"), ("full", True, "nll"), ("full", False, "dft")],
)
def test_history_and_resume_are_those_of_the_resident_model(
    harness: Any, method: str, tied: bool, loss_type: str
) -> None:
    rows = Dataset.from_dict({"text": harness.texts()})

    def make(model: Any, optimizer: Any, **options: Any) -> SFTTrainer:
        return SFTTrainer(
            model=model,
            args=SFTConfig(max_length=32, loss_type=loss_type, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=harness.tokenizer,
            optimizers=(optimizer, None),
        )

    harness.compare(make, method, folder=harness.folder(tied=tied))
