"""``headrace.tune``: the streamed run against the plain loop over the resident model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import headrace
from headrace.errors import InputError
from headrace.optim import adamw
from headrace.preparation import prepare
from headrace.progress import Silent, StepEvent, Watcher
from headrace.run_memory import recorded_options


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    words = "the quick brown fox jumps over the lazy dog and runs away".split()
    lines = [" ".join(words[n % 5 : n % 5 + 8] * (n + 4)) for n in range(10)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def make_options(folder: Path, model: Path, data: Path, **changed: Any) -> headrace.TuneOptions:
    given: dict[str, Any] = {
        "model": str(model),
        "data": data,
        "out": folder / "out",
        "device": "cpu",
        "device_budget": "6MB",
        "host_budget": "120MB",
        "steps": 4,
        "batch_size": 6,
        "micro_batch": 2,
        "seq_len": 48,
        "lr": 3e-3,
        "sample_tokens": 3,
        "lora_rank": 4,
    }
    return headrace.TuneOptions(**{**given, **changed})


def resident_run(options: headrace.TuneOptions) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same run in plain torch: micro-batches accumulate, then one clipped step."""
    material = prepare(options)
    torch.manual_seed(options.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model)
    if options.method == "lora":
        model = get_peft_model(
            model,
            LoraConfig(
                r=options.lora_rank,
                lora_alpha=options.lora_alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    optimizer = adamw(
        model,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        master=options.master,
        max_grad_norm=options.clip_norm,
        seed=options.seed,
    )
    losses = []
    for step in range(material.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * options.lr_factor(step, material.steps)
        batch = material.batch(material.train, material.order.rows(step), torch.device("cpu"))
        num_labels = int((batch["labels"][:, 1:] != -100).sum())
        loss = 0.0
        for first in range(0, options.batch_size, options.micro_batch):
            part = {k: v[first : first + options.micro_batch] for k, v in batch.items()}
            share = model(**part, num_items_in_batch=num_labels).loss
            share.backward()
            loss += float(share.detach())
        losses.append(loss)
        optimizer.step()
        model.zero_grad()
    return losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_run_is_the_plain_loop(
    tmp_path: Path, model_folder: Path, data: Path, method: str, schedule: str
) -> None:
    # In fp32: which bits a bf16 sum rounds to depends on its order, and Adam's first steps make
    # whole steps of rounding errors.  Equal bits are the streamed layers' own tests.
    exact = tmp_path / "fp32"
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).save_pretrained(exact)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(exact)
    options = make_options(tmp_path, exact, data, method=method, schedule=schedule, warmup=2)
    losses, expected = resident_run(options)
    result = headrace.tune(options, watcher=Silent())
    assert result.step_losses == pytest.approx(losses, rel=1e-5)
    tuned = AutoModelForCausalLM.from_pretrained(options.out)
    names = {n if method == "full" else f"base_model.model.{n}": n for n in tuned.state_dict()}
    state = tuned.state_dict()
    for name, tensor in expected.items():
        found = state[names[name]]
        assert (found - tensor).abs().max() <= 0.02 * options.learning_rate, name
    assert len(expected) == (4 * 9 + 2 if method == "full" else 4 * 7 * 2)


def test_the_caller_keeps_its_random_state(tmp_path: Path, model_folder: Path, data: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    headrace.tune(make_options(tmp_path, model_folder, data), watcher=Silent())
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(Watcher):
    """Keeps what it is told; may raise at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.told: list[str] = []
        self.events: list[StepEvent] = []
        self.begun = self.ended = 0
        self._stop_at = stop_at

    def say(self, text: str) -> None:
        self.told.append(text)

    def begin(self, steps: int) -> None:
        self.begun += 1

    def step(self, event: StepEvent) -> None:
        self.events.append(event)
        if event.step == self._stop_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


def test_the_watcher_learns_every_step(tmp_path: Path, model_folder: Path, data: Path) -> None:
    watcher = Recorder()
    options = make_options(tmp_path, model_folder, data, method="full", eval_every=2)
    result = headrace.tune(options, watcher=watcher)
    assert [event.step for event in watcher.events] == [1, 2, 3, 4]
    assert [event.loss for event in watcher.events] == list(result.step_losses)
    assert all(event.num_tokens == 6 * 48 for event in watcher.events)
    assert (watcher.begun, watcher.ended) == (1, 1)
    assert sum("held-out loss" in text for text in watcher.told) == 3
    # Weights, fp32 master and two moments of every parameter are written once a step.
    assert watcher.events[-1].write_bytes >= 14 * 140_000
    assert result.report.steps == 4 and result.report.skipped_steps == 0


def test_an_interrupt_leaves_no_result_and_frees_the_store(
    tmp_path: Path, model_folder: Path, data: Path
) -> None:
    watcher = Recorder(stop_at=2)
    options = make_options(tmp_path, model_folder, data, method="full")
    with pytest.raises(KeyboardInterrupt):
        headrace.tune(options, watcher=watcher)
    assert watcher.ended == 1
    assert not [
        path
        for path in tmp_path.iterdir()
        if path.name.lstrip(".").startswith("out") and path.name != "out.store"
    ]
    store = options.store_folder
    assert store is not None
    from headrace.verifying import verify

    assert all(check.ok for check in verify([store]))


@pytest.mark.parametrize("update", ["forward", "backward"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, model_folder: Path, data: Path, method: str, update: str
) -> None:
    changed = {"method": method, "update": update, "steps": 5, "lora_dropout": 0.1}
    whole = make_options(tmp_path, model_folder, data, **changed)
    expected = headrace.tune(whole, watcher=Silent())
    store = tmp_path / "store"
    stopped = make_options(
        tmp_path, model_folder, data, **changed, store=store, out=tmp_path / "later"
    )
    watcher = Recorder(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        headrace.tune(stopped, watcher=watcher)
    options = recorded_options(store, {"host_budget": "200MB"})
    assert options.resume and options.out == tmp_path / "later"
    later = Recorder()
    result = headrace.tune(options, watcher=later)
    assert [event.loss for event in watcher.events + later.events] == list(expected.step_losses)
    assert [event.lr for event in later.events] == [
        options.learning_rate * options.lr_factor(step, 5) for step in (3, 4)
    ]
    assert result.loss_before == expected.loss_before
    assert (result.loss_after, result.num_tokens) == (expected.loss_after, expected.num_tokens)
    once, twice = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (whole.out, options.out)
    )
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name


def test_what_cannot_be_resumed_is_refused(tmp_path: Path, model_folder: Path, data: Path) -> None:
    store = tmp_path / "store"
    options = make_options(tmp_path, model_folder, data, method="full", store=store)
    with pytest.raises(KeyboardInterrupt):
        headrace.tune(options, watcher=Recorder(stop_at=1))
    with pytest.raises(InputError, match="--lr cannot change"):
        recorded_options(store, {"lr": 1.0})
    with pytest.raises(InputError, match="no such folder"):
        recorded_options(tmp_path / "none", {})
    data.write_text(data.read_text().replace("fox", "cat"))
    with pytest.raises(InputError, match="the run had other training rows"):
        headrace.tune(recorded_options(store, {}), watcher=Silent())
    with pytest.raises(InputError, match="a run without a store"):
        headrace.tune(make_options(tmp_path, model_folder, data, resume=True))


def test_without_held_out_rows_there_are_no_losses(
    tmp_path: Path, model_folder: Path, data: Path
) -> None:
    options = make_options(tmp_path, model_folder, data, held_out=0, sample_tokens=0)
    result = headrace.tune(options, watcher=Silent())
    assert result.loss_before is None and result.loss_after is None
    assert result.sample_before is None and result.sample_after is None
    record = json.loads((options.out / "headrace.json").read_text())
    assert record["result"]["step_losses"] == list(result.step_losses)
    assert record["options"]["method"] == "lora"


def test_the_learning_rate_rises_then_falls() -> None:
    options = make_options(Path(), Path(), Path(), warmup=0.25, schedule="linear")
    factors = [options.lr_factor(step, 8) for step in range(8)]
    assert factors[:2] == pytest.approx([1 / 3, 2 / 3]) and factors[2] == 1.0
    assert factors[2:] == sorted(factors[2:], reverse=True) and factors[-1] > 0
    cosine = make_options(Path(), Path(), Path(), warmup=0, schedule="cosine")
    assert [round(cosine.lr_factor(step, 4), 4) for step in range(5)] == [
        1.0,
        0.8536,
        0.5,
        0.1464,
        0.0,
    ]
