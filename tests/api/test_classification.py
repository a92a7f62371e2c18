"""A streamed classifier with labels: the resident loss and adapters' gradients, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

import headrace


def test_a_classifier_gives_the_resident_loss_and_gradients(tmp_path: Path, device: str) -> None:
    if device != "cpu":
        pytest.skip("the comparison is made on the CPU")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        num_labels=3,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    batch = {
        "input_ids": torch.randint(1, 97, (4, 10)),
        "labels": torch.tensor([0, 2, 1, 1]),
    }
    found = []
    for model in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        headrace.load(
            tmp_path,
            train="adapters",
            auto_class=AutoModelForSequenceClassification,
            device="cpu",
            device_budget="1MB",
            host_budget="1MB",
        ),
    ):
        torch.manual_seed(1)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        loss = tuned(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in tuned.parameters() if p.requires_grad)])
    expected, streamed = found
    assert len(expected) == len(streamed) == 1 + 3 * 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(expected, streamed, strict=True))
