"""TRL's DPOTrainer on a streamed model: the resident history, bit for bit.

Full fine-tuning compares with a reference model, which is streamed too: its base is frozen.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer


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
    folder = harness.folder()

    def make(model: Any, optimizer: Any, **options: Any) -> DPOTrainer:
        reference = None
        if method == "full":
            streamed = hasattr(model, "_runtime")
            reference = (
                harness.streamed("none", folder, train="none", store=None)
                if streamed
                else harness.resident("none", folder)
            )
        return DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(max_length=48, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=harness.tokenizer,
            optimizers=(optimizer, None),
        )

    harness.compare(make, method, folder=folder)
