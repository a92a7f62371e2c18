"""Mixed precision, generation, early stopping, the best model and the last: as if resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DefaultDataCollator,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from headrace.optim import adamw


class Generation(TrainerCallback):
    """Lets the model write after every evaluation, with a KV cache, greedily and by beams."""

    def __init__(self) -> None:
        self.written: list[list[list[int]]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        training, model.config.use_cache = model.training, True
        model.eval()
        prompt = torch.tensor([[1, 1, 5, 9], [1, 7, 11, 13]])
        mask = (prompt != 1).long()
        for beams in (1, 2):
            ids = model.generate(
                input_ids=prompt,
                attention_mask=mask,
                max_new_tokens=6,
                do_sample=False,
                num_beams=beams,
                use_cache=True,
            )
            self.written.append(ids.tolist())
        model.train(training)


def run(
    harness: Any, model: Any, *callbacks: TrainerCallback, lr: float = 1e-2, **changes: Any
) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (24, 10), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    torch.manual_seed(11)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**harness.options(**changes)),
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=DefaultDataCollator(),
        optimizers=(adamw(model, lr=lr), None),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def logged(trainer: Trainer) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [tuple(entry.get(key) for key in keys) for entry in trainer.state.log_history]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_autocast(harness: Any, method: str) -> None:
    folder = harness.folder()
    expected = run(harness, harness.resident(method, folder), bf16=True)
    found = run(harness, harness.streamed(method, folder), bf16=True)
    assert logged(found) == logged(expected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_generation_in_a_callback(harness: Any, method: str) -> None:
    folder, changes = harness.folder(), {"eval_steps": 2}
    expected, found = Generation(), Generation()
    first = run(harness, harness.resident(method, folder), expected, **changes)
    second = run(harness, harness.streamed(method, folder), found, **changes)
    assert found.written and found.written == expected.written
    assert logged(second) == logged(first)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_early_stopping_and_the_best_model(harness: Any, method: str) -> None:
    folder = harness.folder()
    changes = {
        "lr": 1.0 if method == "lora" else 0.2,  # too much: evaluation soon gets worse
        "max_steps": 12,
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "save_total_limit": 2,
        "lr_scheduler_type": "constant",
    }
    trainers = [
        run(harness, model, EarlyStoppingCallback(early_stopping_patience=2), **changes)
        for model in (harness.resident(method, folder), harness.streamed(method, folder))
    ]
    expected, found = trainers
    assert logged(found) == logged(expected)
    assert found.state.global_step == expected.state.global_step < 12
    assert found.state.best_metric == expected.state.best_metric
    best = found.evaluate()["eval_loss"]
    assert best == expected.evaluate()["eval_loss"]
    # The model is that of the best step, not of the last.
    assert best == found.state.best_metric < [e[4] for e in logged(found) if e[4]][-2]
    root = Path(found.args.output_dir)
    assert len(list(root.glob("checkpoint-*"))) <= 2


def test_the_last_model_is_saved_whole_and_opens(harness: Any, tmp_path: Path) -> None:
    trainer = run(harness, harness.streamed("full", harness.folder()))
    trainer.save_model(str(tmp_path / "final"))
    tensors = load_file(tmp_path / "final" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert not list((tmp_path / "final").glob("headrace_optimizer*"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.arange(3, 19).view(2, 8)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, trainer.model(ids).logits)


def test_saving_the_model_only(harness: Any) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer = run(harness, harness.streamed("full", harness.folder()), **changes)
    folder = Path(trainer.args.output_dir) / "checkpoint-4"
    assert (folder / "model.safetensors").exists()
    assert not (folder / "headrace_optimizer.safetensors").exists()
