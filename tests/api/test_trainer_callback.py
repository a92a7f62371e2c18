"""HeadraceCallback: figures in the Trainer's logs, bar and reporters, and a report at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DefaultDataCollator,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import headrace
from headrace.optim import adamw

LANES = ("disk_read", "disk_write", "h2d", "d2h", "compute", "update")


class Reporter(TrainerCallback):
    """Stands for TensorBoard: takes the scalars of every log."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        assert all(isinstance(value, (int, float)) for value in logs.values())
        self.seen.append(dict(logs))


def trainer_of(harness: Any, model: Any, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    ids = torch.arange(160).view(20, 8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(
        model=model,
        args=TrainingArguments(**harness.options(max_steps=3, eval_strategy="no", **changes)),
        train_dataset=rows,
        data_collator=DefaultDataCollator(),
        optimizers=(adamw(model, lr=1e-2), None),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_logs_reporters_and_report_have_the_figures(
    harness: Any, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = harness.streamed(method, harness.folder())
    reporter = Reporter()
    trainer = trainer_of(harness, model, reporter)
    watcher = headrace.HeadraceCallback(page=tmp_path / "report.html").attach(trainer)
    with caplog.at_level(logging.INFO, logger="headrace"):
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    for entry in (*steps, *(logs for logs in reporter.seen if "loss" in logs)):
        assert all(0 <= entry[f"headrace/{lane}_busy"] <= 1 for lane in LANES)
        assert entry["headrace/compute_busy"] > 0
        assert entry["headrace/step_seconds"] > 0
        assert 0 < entry["headrace/host_peak_bytes"] <= 6_000_000
        assert 0 < entry["headrace/device_peak_bytes"] <= 2_000_000
    if method == "full":
        assert steps[-1]["headrace/written_bytes"] > 0
    assert watcher.report is not None and watcher.report.steps == 3
    assert "bottleneck" in caplog.text
    assert "bottleneck" in (tmp_path / "report.html").read_text()


def test_the_bar_names_the_bottleneck(harness: Any, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(harness, harness.streamed("lora", harness.folder()), disable_tqdm=False)
    assert any(isinstance(c, ProgressCallback) for c in trainer.callback_handler.callbacks)
    headrace.HeadraceCallback().attach(trainer)
    trainer.train()
    shown = capfd.readouterr()
    assert " busy " in shown.out + shown.err


def test_as_a_constructor_argument_the_history_has_the_figures(harness: Any) -> None:
    model = harness.streamed("lora", harness.folder())
    trainer = trainer_of(harness, model, headrace.HeadraceCallback())
    trainer.train()
    assert "headrace/compute_busy" in trainer.state.log_history[0]


def test_a_model_that_is_not_streamed_is_named(harness: Any) -> None:
    model = harness.resident("lora", harness.folder())
    trainer = trainer_of(harness, model, headrace.HeadraceCallback())
    with pytest.raises(ValueError, match=r"is a PeftModelForCausalLM"):
        trainer.train()
