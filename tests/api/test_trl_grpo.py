"""TRL's GRPOTrainer on a streamed model: generates, scores and trains as the resident one."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def variety(completions: list[str], **rest: Any) -> list[float]:
    """More different characters are better."""
    return [float(len(set(completion))) for completion in completions]


@pytest.mark.parametrize(("method", "beta"), [("lora", 0.1), ("full", 0.0)])
def test_history_and_resume_are_those_of_the_resident_model(
    harness: Any, method: str, beta: float
) -> None:
    rows = Dataset.from_dict({"prompt": [f"ask {i} " for i in range(24)]})

    def make(model: Any, optimizer: Any, **options: Any) -> GRPOTrainer:
        options |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
        return GRPOTrainer(
            model=model,
            reward_funcs=variety,
            args=GRPOConfig(max_completion_length=8, num_generations=4, beta=beta, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=harness.tokenizer,
            optimizers=(optimizer, None),
        )

    harness.compare(make, method)
