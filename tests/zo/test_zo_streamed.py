"""Streamed zeroth-order steps against the resident ones: the same bits for every placement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import headrace
from headrace.offload.budget import Tier
from headrace.zo.common_right import CommonRight
from headrace.zo.dense import Dense
from headrace.zo.lowrank import LowRank
from headrace.zo.noise import Kind
from headrace.zo.objective import causal_lm_losses
from headrace.zo.one_sided import OneSided
from headrace.zo.per_example import PerExample
from headrace.zo.random_subspace import RandomSubspace
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.streamed import StreamedWeights
from headrace.zo.two_point import TwoPoint

METHODS = {
    "mezo": ZOSettings(lr=1e-3, weight_decay=0.1),
    "mezo 3": ZOSettings(lr=1e-3, estimator=TwoPoint(3), directions=Dense(Kind.IRWIN_HALL)),
    "low rank": ZOSettings(lr=1e-2, estimator=OneSided(4), directions=LowRank(4, steps=2)),
    "per example": ZOSettings(
        lr=1e-2, estimator=PerExample(2, 2), directions=CommonRight(4, steps=2)
    ),
    "subspace": ZOSettings(lr=1e-3, estimator=OneSided(4), directions=RandomSubspace(4, 6, 2)),
}
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=32),
}
STEPS = 5


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": part, "labels": part} for part in ids]


def objective(batch: dict[str, Tensor], parts: int = 1) -> Callable[[nn.Module, int], list[float]]:
    return lambda model, copies: causal_lm_losses(model, batch, copies, parts=parts)


def one(batch: dict[str, Tensor]) -> Callable[[nn.Module], Any]:
    return lambda model: causal_lm_losses(model, batch, 1)[0]


def resident_run(
    folder: Path, settings: ZOSettings, names: tuple[str, ...], *, together: bool
) -> tuple[list[tuple[float, ...]], dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    zo = ZOStep(model, settings, select=lambda name, _: name in names)
    losses = []
    for batch in batches(STEPS):
        parts = settings.estimator.parts
        step = zo.step_together(objective(batch, parts)) if together else zo.step(one(batch))
        losses.append(step.record.losses)
    return losses, dict(zo.export())


@pytest.fixture
def opened() -> Iterator[Callable[..., nn.Module]]:
    models = []

    def load(folder: Path, room: str) -> nn.Module:
        model = headrace.load(
            folder, train="none", device="cpu", device_budget="1GB", host_budget="1GB"
        )
        models.append(model)
        if room == "disk":
            least = headrace.runtime_of(model).engine.least_budgets()
            model.close()
            model = headrace.load(
                folder,
                train="none",
                device="cpu",
                device_budget=least[Tier.DEVICE] + (1 << 20),
                host_budget=least[Tier.HOST] + (1 << 20),
            )
            models.append(model)
        return model

    yield load
    for model in models:
        model.close()


@pytest.mark.parametrize("room", ["resident", "disk"])
@pytest.mark.parametrize("method", list(METHODS))
def test_streamed_step_has_the_resident_bits(
    method: str, room: str, folder: Path, opened: Callable[..., nn.Module], tmp_path: Path
) -> None:
    settings = METHODS[method]
    dense = isinstance(settings.directions, Dense)
    model = opened(folder, room)
    weights = StreamedWeights(model, headrace.runtime_of(model), settings.directions)
    zo = ZOStep(model, settings, weights=weights, log=tmp_path / "log")
    parts = settings.estimator.parts
    losses = [zo.step_together(objective(b, parts)).record.losses for b in batches(STEPS)]
    exported = dict(zo.export())
    zo.close()
    # A resident dense member runs alone, as it does inside a streamed visit.
    expected, final = resident_run(folder, settings, zo.trained_names, together=not dense)
    assert losses == expected
    assert exported.keys() == final.keys()
    for name, tensor in final.items():
        assert torch.equal(exported[name], tensor), name
    assert len(zo.trained_names) >= 16

    again = opened(folder, room)
    resumed = ZOStep.resume(
        again,
        tmp_path / "log",
        weights=lambda select: StreamedWeights(
            again, headrace.runtime_of(again), settings.directions, select=select
        ),
    )
    for name, tensor in resumed.export():
        assert torch.equal(final[name], tensor), name
    resumed.close()


def test_the_base_is_read_only_and_evaluation_sees_the_run(
    folder: Path, opened: Callable[..., nn.Module]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    settings = METHODS["low rank"]
    model = opened(folder, "disk")
    batch = batches(1)[0]
    weights = StreamedWeights(model, headrace.runtime_of(model), LowRank(4))
    zo = ZOStep(model, settings, weights=weights)
    with zo.current():
        start = causal_lm_losses(model, batch, 1)[0]
    for _ in range(STEPS):
        zo.step_together(objective(batch))
    with zo.current():
        end = causal_lm_losses(model, batch, 1)[0]
    zo.close()
    with torch.no_grad():
        assert causal_lm_losses(opened(folder, "disk"), batch, 1)[0] == start
    assert end != start
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
