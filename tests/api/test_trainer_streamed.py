"""The stock Trainer, unmodified, on a streamed model: the resident history, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import headrace
from headrace.optim import adamw

VOCABULARY = 97


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Forty rows of random tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, VOCABULARY, (40, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama on disk."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    target = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target


def train(model: Any, optimizer: Any, out: Path, **changes: Any) -> Trainer:
    """Five steps: accumulation 2, clipping 0.5, cosine schedule, one evaluation."""
    options: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "lr_scheduler_type": "cosine",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        **changes,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=Tokens(),
        eval_dataset=torch.utils.data.Subset(Tokens(), range(4)),
        optimizers=(optimizer, None),
    )
    trainer.train()
    return trainer


def history(trainer: Trainer) -> list[tuple[Any, ...]]:
    """Losses, gradient norms, rates and evaluation losses, in order."""
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return [tuple(entry.get(key) for key in keys) for entry in trainer.state.log_history]


def adapted(model: Any) -> Any:
    """The model under LoRA adapters with reproducible initial values."""
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_stock_trainer_gives_the_resident_history(
    folder: Path, tmp_path: Path, device: str, method: str
) -> None:
    if device != "cpu":
        pytest.skip("the comparison is made on the CPU")
    resident = AutoModelForCausalLM.from_pretrained(folder)
    streamed = headrace.load(
        folder,
        train="adapters" if method == "lora" else "all",
        device="cpu",
        device_budget="1MB",
        host_budget="3MB",
        store=tmp_path / "store",
    )
    models = [adapted(m) if method == "lora" else m for m in (resident, streamed)]
    expected, found = (
        train(model, adamw(model, lr=1e-2), tmp_path / f"out{i}") for i, model in enumerate(models)
    )
    assert history(found) == history(expected)
    assert any(entry[3] is not None for entry in history(found))
    # What the Trainer saves are real weights, not placeholders.
    found.save_model(str(tmp_path / "saved"))
    expected.save_model(str(tmp_path / "reference"))
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"

    saved, reference = (
        load_file(tmp_path / "saved" / name),
        load_file(tmp_path / "reference" / name),
    )
    assert saved.keys() == reference.keys()
    assert all(torch.equal(saved[k], reference[k]) for k in reference)
    streamed.close()


def test_clipping_is_refused_where_gradients_are_applied_at_once(
    folder: Path, tmp_path: Path
) -> None:
    model = headrace.load(
        folder,
        train="all",
        device="cpu",
        device_budget="1MB",
        host_budget="3MB",
        store=tmp_path / "store",
        update="backward",
    )
    with pytest.raises(ValueError, match="update='forward'"):
        train(model, adamw(model, lr=1e-2), tmp_path / "out", gradient_accumulation_steps=1)
    model.close()
