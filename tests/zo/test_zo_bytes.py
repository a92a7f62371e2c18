"""Bytes a step, from the kernel's counters of this process: what is read, and what is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import headrace
from headrace.offload.budget import Tier
from headrace.offload.runtime import Runtime
from headrace.offload.timeline import LaneName
from headrace.quant.int4_group import Int4GroupCodec
from headrace.quant.nf4 import Nf4Codec
from headrace.zo.dense import Dense
from headrace.zo.lowrank import LowRank
from headrace.zo.noise import Kind
from headrace.zo.objective import causal_lm_losses
from headrace.zo.one_sided import OneSided
from headrace.zo.quantised import qzo_settings, trains_scales
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.streamed import StreamedWeights
from headrace.zo.two_point import TwoPoint

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=24,
    num_attention_heads=4,
    tie_word_embeddings=False,
)
IDS = torch.randint(0, 64, (1, 4), generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Tensor] = {"input_ids": IDS, "labels": IDS}
LOW_RANK = ZOSettings(lr=1e-4, estimator=OneSided(4), directions=LowRank(4, steps=3))
MEZO = ZOSettings(lr=1e-6, estimator=TwoPoint(2), directions=Dense(Kind.RADEMACHER))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def opened() -> Iterator[list[nn.Module]]:
    models: list[nn.Module] = []
    yield models
    for model in models:
        model.close()


def open_on_disk(folder: Path, models: list[nn.Module]) -> nn.Module:
    """A model with room for two of its 27 chunks on either tier."""

    def load(device_bytes: int, host_bytes: int) -> nn.Module:
        return headrace.load(
            folder,
            train="none",
            device="cpu",
            device_budget=device_bytes,
            host_budget=host_bytes,
        )

    roomy = load(1 << 30, 1 << 30)
    least = headrace.runtime_of(roomy).engine.least_budgets()
    roomy.close()
    # The scales that QZO holds in host memory, and what pages round up to.
    model = load(2 * least[Tier.DEVICE] + 8192, 2 * least[Tier.HOST] + (1 << 20))
    models.append(model)
    return model


def parameter_count() -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(CONFIG).parameters())


def counters() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def bytes_of(zo: ZOStep, runtime: Runtime, steps: int) -> tuple[float, float, float]:
    """Bytes read, written and uploaded, a parameter and step."""

    def sample() -> tuple[int, int, int]:
        runtime.engine.drain()
        now = counters()
        uploaded = runtime.timeline.total_bytes(LaneName.H2D)
        return now["read_bytes"], now["write_bytes"], uploaded

    before = sample()
    for _ in range(steps):
        zo.step_together(lambda model, members: causal_lm_losses(model, BATCH, members))
    each = parameter_count() * steps
    read, written, uploaded = (b - a for a, b in zip(before, sample(), strict=True))
    return read / each, written / each, uploaded / each


def test_dense_steps_read_and_write_two_bytes(
    plain: Path, opened: list[nn.Module], tmp_path: Path
) -> None:
    model = open_on_disk(plain, opened)
    runtime = headrace.runtime_of(model)
    weights = StreamedWeights(model, runtime, MEZO.directions, store=tmp_path / "run")
    zo = ZOStep(model, MEZO, weights=weights, log=tmp_path / "log")
    bytes_of(zo, runtime, 1)
    read, written, uploaded = bytes_of(zo, runtime, 3)
    assert written == pytest.approx(2, rel=0.03)
    # At most a few chunks are still there from the step before.
    assert 2 * 22 / 27 < read < 2 * 1.03
    # Four members, one load.
    assert 2 * 22 / 27 < uploaded < 2 * 1.03
    zo.close()


def test_low_rank_writes_at_merges_only(
    plain: Path, opened: list[nn.Module], tmp_path: Path
) -> None:
    model = open_on_disk(plain, opened)
    runtime = headrace.runtime_of(model)
    weights = StreamedWeights(model, runtime, LOW_RANK.directions, store=tmp_path / "run")
    zo = ZOStep(model, LOW_RANK, weights=weights, log=tmp_path / "log")
    matrices = sum(p.numel() for p in weights.parameters.values()) / parameter_count()
    bytes_of(zo, runtime, 1)
    read, written, _ = bytes_of(zo, runtime, 2)
    assert written < 0.01
    assert read < 2 * 1.03
    read, written, uploaded = bytes_of(zo, runtime, 1)  # the window's merge comes due
    assert written == pytest.approx(2 * matrices, rel=0.03)
    read, written, uploaded = bytes_of(zo, runtime, 2)
    assert written < 0.01
    assert read < 2 * 1.03
    assert uploaded < 2 * 1.03
    zo.close()


@pytest.mark.parametrize("method", ["low rank", "qzo"])
def test_encoded_weights_are_read_once_and_never_written(
    method: str, plain: Path, opened: list[nn.Module], tmp_path: Path
) -> None:
    qzo = method == "qzo"
    codec = Int4GroupCodec(scale_dtype="float32") if qzo else Nf4Codec()
    headrace.quantize(plain, tmp_path / "encoded", format=codec)
    model = open_on_disk(tmp_path / "encoded", opened)
    runtime = headrace.runtime_of(model)
    settings = qzo_settings() if qzo else LOW_RANK
    select = trains_scales(model) if qzo else None
    weights = StreamedWeights(model, runtime, settings.directions, select=select)
    zo = ZOStep(model, settings, weights=weights, log=tmp_path / "log")
    bytes_of(zo, runtime, 1)
    read, written, uploaded = bytes_of(zo, runtime, 3)
    assert 0.4 < read <= 0.56
    assert written < 0.01
    assert uploaded <= 0.56
    zo.close()
