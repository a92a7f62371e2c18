"""The fp32 residual stream: less finite-difference noise, the same bits resident and streamed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

import headrace
from headrace.zo.lowrank import LowRank
from headrace.zo.objective import causal_lm_losses
from headrace.zo.residual import Fp32Residual
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.streamed import StreamedWeights
from headrace.zo.two_point import TwoPoint

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        initializer_range=0.1,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=64, n_layer=4, n_head=4, n_positions=32),
}
IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(3))
BATCH = {"input_ids": IDS, "labels": IDS}


def settings(residual: bool, eps: float = 1e-3) -> ZOSettings:
    return ZOSettings(
        lr=1e-3,
        eps=eps,
        estimator=TwoPoint(8),
        directions=LowRank(8),
        fp32_residual=residual,
    )


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.bfloat16).eval()


def grads(model: nn.Module, residual: bool) -> torch.Tensor:
    zo = ZOStep(model, settings(residual))
    record = zo.step_together(lambda m, n: causal_lm_losses(m, BATCH, n)).record
    return torch.tensor(record.grads, dtype=torch.float64)


def test_differences_of_losses_are_truer() -> None:
    model = make("llama")
    truth = grads(copy.deepcopy(model).double(), residual=False)
    error = {r: float((grads(model, r) - truth).norm() / truth.norm()) for r in (False, True)}
    assert error[True] < 0.7 * error[False], error


def test_models_in_fp32_are_not_touched() -> None:
    model = make("llama").float()
    assert torch.equal(grads(model, residual=False), grads(model, residual=True))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_activations_are_fp32_and_streaming_keeps_the_bits(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path / "model")
    with Fp32Residual(), torch.no_grad():
        assert model(input_ids=IDS).logits.dtype is torch.float32
    zo = ZOStep(model, settings(residual=True))
    steps = [zo.step_together(lambda m, n: causal_lm_losses(m, BATCH, n)) for _ in range(3)]
    expected = [step.record.losses for step in steps]
    streamed = headrace.load(
        tmp_path / "model", train="none", device="cpu", device_budget="64MB", host_budget="64MB"
    )
    runtime = headrace.runtime_of(streamed)
    weights = StreamedWeights(streamed, runtime, zo.settings.directions)
    other = ZOStep(streamed, zo.settings, weights=weights)
    for losses in expected:
        step = other.step_together(lambda m, n: causal_lm_losses(m, BATCH, n))
        assert step.record.losses == losses
    streamed.close()


def test_the_choice_is_part_of_the_log() -> None:
    chosen = settings(residual=True)
    assert ZOSettings.from_json(chosen.to_json()) == chosen
