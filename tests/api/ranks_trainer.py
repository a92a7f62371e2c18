"""The stock Trainer on one process or under torchrun.  ranks_trainer.py MODE FOLDER WORK [bf16].

Prints the history of losses and gradient norms as JSON.  The batch of a step is the same for any
number of ranks.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import headrace
from headrace.optim import adamw


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def main() -> None:
    mode, folder, work = sys.argv[1:4]
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        f"{work}/out",
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        logging_steps=1,
        use_cpu=True,
        bf16="bf16" in sys.argv,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model = headrace.load(
        folder,
        train="all" if mode == "full" else "adapters",
        store=f"{work}/store" if mode == "full" else None,
        device="cpu",
        device_budget="8MB",
        host_budget="16MB",
    )
    tuned: Any = model
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    optimizer = adamw(tuned, lr=1e-3, eps=1e-6)
    ids = torch.randint(3, 97, (32, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = InOrder(
        model=tuned,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        optimizers=(optimizer, None),
    )
    trainer.train()
    history = [(h["loss"], h["grad_norm"]) for h in trainer.state.log_history if "loss" in h]
    if arguments.process_index == 0:
        print("history", json.dumps(history))


if __name__ == "__main__":
    main()
