"""TRL's RewardTrainer on a streamed sequence classifier: the resident history, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from datasets import Dataset
from trl import RewardConfig, RewardTrainer


@pytest.mark.parametrize("method", ["lora", "full"])
def test_history_and_resume_are_those_of_the_resident_model(harness: Any, method: str) -> None:
    texts = harness.texts()
    rows = Dataset.from_dict(
        {
            "prompt": [f"ask {i} " for i in range(len(texts))],
            "chosen": [text[:20] for text in texts],
            "rejected": [text[5:25] for text in texts],
        }
    )

    def make(model: Any, optimizer: Any, **options: Any) -> RewardTrainer:
        return RewardTrainer(
            model=model,
            args=RewardConfig(max_length=48, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=harness.tokenizer,
            optimizers=(optimizer, None),
        )

    harness.compare(make, method, rewards=True)
