"""Written streamed weights: resident bits for every placement, and a store that knows its log."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import headrace
from headrace.offload.budget import Tier
from headrace.offload.errors import StoreError
from headrace.zo.dense import Dense
from headrace.zo.log import read_log
from headrace.zo.lowrank import LowRank
from headrace.zo.noise import Kind
from headrace.zo.objective import causal_lm_losses
from headrace.zo.one_sided import OneSided
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.streamed import StreamedWeights
from headrace.zo.two_point import TwoPoint

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32),
}
STEPS = 5


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(made[name])
    return made


def batch(step: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def take(zo: ZOStep, steps: int) -> list[tuple[float, ...]]:
    def objective(model: nn.Module, members: int) -> list[float]:
        return causal_lm_losses(model, batch(zo.next_step), members)

    return [zo.step_together(objective, batch=i).record.losses for i in range(steps)]


def resident(folder: Path, settings: ZOSettings) -> tuple[list[tuple[float, ...]], dict]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    zo = ZOStep(model, settings)
    if isinstance(settings.directions, LowRank):
        return take(zo, STEPS), dict(zo.export())
    losses = []
    for step in range(STEPS):
        one = batch(step)
        losses.append(zo.step(lambda m, b=one: causal_lm_losses(m, b, 1)[0]).record.losses)
    return losses, dict(zo.export())


Opener = Callable[..., nn.Module]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens a model with room on both tiers, on one of them, or for hardly more than a chunk."""
    models = []

    def load(folder: Path, room: str) -> nn.Module:
        large, small = "1GB", {Tier.DEVICE: 0, Tier.HOST: 0}
        if room != "both":
            with_room = headrace.load(
                folder, train="none", device="cpu", device_budget=large, host_budget=large
            )
            small = headrace.runtime_of(with_room).engine.least_budgets()
            with_room.close()
        model = headrace.load(
            folder,
            train="none",
            device="cpu",
            # A chunk, scratch of its size, and a page or two.
            device_budget=large if room in ("both", "device") else 2 * small[Tier.DEVICE] + 8192,
            host_budget=large if room in ("both", "host") else 2 * small[Tier.HOST],
        )
        models.append(model)
        return model

    yield load
    for model in models:
        model.close()


def streamed(model: nn.Module, settings: ZOSettings, **options: object) -> StreamedWeights:
    runtime = headrace.runtime_of(model)
    return StreamedWeights(model, runtime, settings.directions, **options)  # type: ignore[arg-type]


MEZO = {
    count: ZOSettings(
        lr=1e-3, weight_decay=0.1, estimator=TwoPoint(count), directions=Dense(Kind.IRWIN_HALL)
    )
    for count in (1, 2, 3, 4)
}
LOW_RANK = ZOSettings(lr=1e-2, estimator=OneSided(4), directions=LowRank(4, steps=2))
CASES = [
    ("untied", "disk", MEZO[1], 1),
    ("untied", "host", MEZO[2], 1),
    ("untied", "both", MEZO[3], 1),
    ("untied", "device", MEZO[4], 1),
    ("tied", "disk", MEZO[4], 1),
    ("tied", "both", MEZO[1], 2),
    ("gpt2", "disk", MEZO[2], 3),
    ("gpt2", "host", ZOSettings(lr=1e-3), 1),
    ("untied", "disk", LOW_RANK, 1),
    ("tied", "device", LOW_RANK, 1),
]


@pytest.mark.parametrize(("kind", "room", "settings", "every"), CASES)
def test_written_weights_have_the_resident_bits(
    kind: str,
    room: str,
    settings: ZOSettings,
    every: int,
    folders: dict[str, Path],
    opened: Opener,
    tmp_path: Path,
) -> None:
    """The first steps, then a stop, and the last steps from store and log."""
    expected, final = resident(folders[kind], settings)
    losses = []
    for steps in (3, STEPS - 3):
        model = opened(folders[kind], room)
        if not losses:
            weights = streamed(model, settings, store=tmp_path / "run", write_every=every)
            zo = ZOStep(model, settings, weights=weights, log=tmp_path / "log")
        else:
            zo = ZOStep.resume(
                model,
                tmp_path / "log",
                weights=lambda select, model=model: streamed(
                    model, settings, select=select, store=tmp_path / "run", write_every=every
                ),
            )
        losses += take(zo, steps)
        exported = dict(zo.export())
        zo.close()
    assert losses == expected
    assert exported.keys() == final.keys()
    for name, tensor in final.items():
        assert torch.equal(exported[name], tensor), name


def test_a_store_knows_its_log(folders: dict[str, Path], opened: Opener, tmp_path: Path) -> None:
    settings, folder = MEZO[1], folders["untied"]

    def run(name: str, first: int) -> None:
        model = opened(folder, "device")
        weights = streamed(model, settings, store=tmp_path / name)
        zo = ZOStep(model, settings, weights=weights, log=tmp_path / f"{name}.log")
        zo.step(lambda model: causal_lm_losses(model, batch(first), 1)[0])
        take(zo, 3)
        zo.close()

    run("one", 0)
    run("other", 50)

    def resume(log: Path) -> ZOStep:
        model = opened(folder, "device")
        return ZOStep.resume(
            model,
            log,
            weights=lambda select: streamed(model, settings, select=select, store=tmp_path / "one"),
        )

    with pytest.raises(StoreError, match="of another log"):
        resume(tmp_path / "other.log")
    data = (tmp_path / "one.log").read_bytes()
    record = read_log(tmp_path / "one.log")[0].record_bytes
    (tmp_path / "short.log").write_bytes(data[: -2 * record])
    with pytest.raises(StoreError, match="cut short"):
        resume(tmp_path / "short.log")
    model = opened(folder, "device")
    zo = ZOStep(model, settings, weights=streamed(model, settings, store=tmp_path / "one"))
    with pytest.raises(StoreError, match="continue it with ZOStep"):
        take(zo, 1)
    zo.close()
    again = resume(tmp_path / "one.log")
    assert again.next_step == 4
    again.close()


def test_a_closed_run_leaves_the_base(
    folders: dict[str, Path], opened: Opener, tmp_path: Path
) -> None:
    folder = folders["untied"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = opened(folder, "host")
    with torch.no_grad():
        start = causal_lm_losses(model, batch(0), 1)
    zo = ZOStep(model, MEZO[1], weights=streamed(model, MEZO[1], store=tmp_path / "run"))
    take(zo, 3)
    with zo.current():
        assert causal_lm_losses(model, batch(0), 1) != start
    zo.close()
    with torch.no_grad():
        assert causal_lm_losses(model, batch(0), 1) == start
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.path.exists(tmp_path / "run" / "commit.json")
