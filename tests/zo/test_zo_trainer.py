"""``ZOTrainer`` against a loop of ``ZOStep``, with scheduler, evaluation and saving."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from headrace.zo.common_right import CommonRight
from headrace.zo.log import read_log
from headrace.zo.lowrank import LowRank
from headrace.zo.objective import causal_lm_losses
from headrace.zo.one_sided import OneSided
from headrace.zo.per_example import PerExample
from headrace.zo.replay import replay
from headrace.zo.settings import ZOSettings, recommended
from headrace.zo.trainer import ZOTrainer

METHODS = {
    "mezo": ZOSettings(),
    "low rank": ZOSettings(estimator=OneSided(4), directions=LowRank(4, steps=3)),
    "per example": recommended(copies=2, examples=4),
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=0.5,
        )
    )


def rows(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | changes,
    )


@pytest.mark.parametrize("method", list(METHODS))
def test_trains_logs_schedules_evaluates_and_saves(method: str, tmp_path: Path) -> None:
    model = llama()
    trainer = ZOTrainer(
        model=model,
        args=arguments(tmp_path / "out"),
        train_dataset=rows(),
        eval_dataset=rows(4),
        settings=METHODS[method],
        log=tmp_path / "zolog",
    )
    trainer.train()
    _, records = read_log(tmp_path / "zolog")
    assert [record.step for record in records] == list(range(8))
    assert [record.lr for record in records] == pytest.approx(
        [1e-3 * (1 - step / 8) for step in range(8)]
    )
    assert all(p.grad is None for p in model.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    means = [sum(record.losses) / len(record.losses) for record in records]
    assert losses == pytest.approx(means, abs=1e-3)

    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for name, tensor in trainer.zo.export():
        assert torch.equal(dict(saved.named_parameters())[name], tensor), name
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        assert float(saved(**batch).loss) == pytest.approx(evaluated, abs=1e-4)


def test_part_losses_and_objectives_go_with_their_estimators(tmp_path: Path) -> None:
    def twice(*args: Any, **kwargs: Any) -> list[float]:
        return [2 * loss for loss in causal_lm_losses(*args, **kwargs)]

    given = {"model": llama(), "args": arguments(tmp_path, max_steps=1), "train_dataset": rows()}
    parts = recommended(copies=2, examples=4)
    plain = ZOTrainer(**given, settings=parts)
    plain.train()
    doubled = ZOTrainer(**{**given, "model": llama()}, settings=parts, part_losses=twice)
    doubled.train()
    single, double = (t.state.log_history[0]["loss"] for t in (plain, doubled))
    assert double == pytest.approx(2 * single, rel=1e-4)
    with pytest.raises(ValueError, match="cannot use objective"):
        ZOTrainer(**given, settings=parts, objective=lambda m, i: 0.0)
    with pytest.raises(ValueError, match="cannot use part_losses"):
        ZOTrainer(**given, settings=ZOSettings(), part_losses=twice)


def test_any_objective(tmp_path: Path) -> None:
    def errors(model: nn.Module, inputs: dict[str, Any]) -> float:
        logits = model(input_ids=inputs["input_ids"]).logits
        return float((logits[:, :-1].argmax(-1) != inputs["labels"][:, 1:]).sum())

    trainer = ZOTrainer(
        model=llama(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=rows(),
        settings=METHODS["mezo"],
        objective=errors,
        log=tmp_path / "zolog",
    )
    trainer.train()
    _, records = read_log(tmp_path / "zolog")
    assert all(loss == int(loss) for record in records for loss in record.losses)


def test_what_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1"):
        ZOTrainer(
            model=llama(),
            args=arguments(tmp_path, gradient_accumulation_steps=2),
            train_dataset=rows(),
            settings=METHODS["mezo"],
        )
    trainer = ZOTrainer(
        model=llama(), args=arguments(tmp_path), train_dataset=rows(), settings=METHODS["mezo"]
    )
    with pytest.raises(ValueError, match=r"ZOStep\.resume"):
        trainer.train(resume_from_checkpoint=True)


def f1_of(predicted: torch.Tensor, wanted: torch.Tensor) -> float:
    hits = float((predicted & wanted).sum())
    return 2 * hits / max(1.0, float(predicted.sum() + wanted.sum()))


def accuracy(model: nn.Module, inputs: dict[str, Any]) -> float:
    """1 - top-16 accuracy of the next token."""
    best = model(input_ids=inputs["input_ids"]).logits[:, :-1].topk(16).indices
    return 1 - float((best == inputs["labels"][:, 1:, None]).any(-1).float().mean())


def f1(model: nn.Module, inputs: dict[str, Any]) -> float:
    """1 - F1 of "the next token is in the upper half of the vocabulary"."""
    predicted = model(input_ids=inputs["input_ids"]).logits[:, :-1].argmax(-1) >= 32
    return 1 - f1_of(predicted, inputs["labels"][:, 1:] >= 32)


def generations(model: Any, inputs: dict[str, Any]) -> float:
    """How many of the generated tokens are odd."""
    made = model.generate(
        input_ids=inputs["input_ids"][:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    return float((made[:, 4:] % 2).float().mean())


@pytest.mark.parametrize("objective", [accuracy, f1, generations])
@pytest.mark.parametrize("method", ["mezo", "low rank"])
def test_objectives_without_gradients(objective: Any, method: str, tmp_path: Path) -> None:
    """The trainer minimises what it is given, and its log rebuilds what it made."""
    trainer = ZOTrainer(
        model=llama(),
        args=arguments(tmp_path, max_steps=12, learning_rate=3e-2, lr_scheduler_type="constant"),
        train_dataset=rows(4),
        settings=dataclasses.replace(METHODS[method], eps=0.1),
        objective=objective,
        log=tmp_path / "zolog",
    )
    trainer.train()
    header, records = read_log(tmp_path / "zolog")
    assert any(len(set(record.losses)) > 1 for record in records), "the objective never moved"
    assert any(any(record.grads) for record in records)
    rebuilt = dict(
        replay(((n, p.detach()) for n, p in llama().named_parameters()), header, records)
    )
    for name, tensor in trainer.zo.export():
        assert torch.equal(rebuilt[name], tensor), name


def test_without_settings_it_measures_directions_and_takes_the_recommended_method(
    tmp_path: Path,
) -> None:
    trainer = ZOTrainer(
        model=llama(),
        args=arguments(tmp_path / "out", max_steps=2),
        train_dataset=rows(),
        log=tmp_path / "zolog",
    )
    settings = trainer.zo.settings
    assert settings.estimator == PerExample(copies=4, examples=4)
    assert isinstance(settings.directions, CommonRight)
    assert settings.directions.basis is not None
    assert set(trainer.zo.trained_names) == {
        n for ns in settings.directions.basis.names for n in ns
    }
    trainer.train()
    header, records = read_log(tmp_path / "zolog")
    assert ZOSettings.from_json(header.settings["method"]) == settings
    assert len(records) == 2 and all(any(record.grads) for record in records)

    def score(model: nn.Module, inputs: dict[str, Any]) -> float:
        return float(model(**inputs).logits.float().argmax(-1).float().mean())

    alone = ZOTrainer(
        model=llama(), args=arguments(tmp_path), train_dataset=rows(), objective=score
    )
    assert alone.zo.settings.estimator == OneSided(15)


def test_a_model_without_linear_layers_of_torch_draws_directions_and_says_so(
    tmp_path: Path,
) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    with pytest.warns(UserWarning, match="GPT2LMHeadModel has no linear layers"):
        trainer = ZOTrainer(
            model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows()
        )
    assert isinstance(trainer.zo.settings.directions, CommonRight)
    assert trainer.zo.settings.directions.basis is None
    trainer.train()
