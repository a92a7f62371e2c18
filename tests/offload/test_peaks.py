"""Peak memory equals the engine's stated terms, and the process itself stays under its bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from streaming_cases import batches, streamed_weights
from streaming_runs import (
    BIG_BYTES,
    ROWS,
    TOKENS,
    Setting,
    budgets_for,
    folder_of,
    load_streamed,
)

from headrace.offload.budget import Tier
from headrace.offload.update import RING_SLABS
from headrace.optim import adamw

HIDDEN_BYTES = ROWS * TOKENS * 32 * 4  # the hidden states of a batch, fp32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def train(model: Any, device: str, *, steps: int = 3, **options: Any) -> None:
    optimizer = adamw(model, lr=1e-2, **options)
    for batch in batches(steps, rows=ROWS, tokens=TOKENS):
        batch = batch.to(device)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layout_bytes(model: Any) -> dict[str, int]:
    return {n: c.layout.nbytes for n, c in model._runtime.engine.chunks.items()}


def tile_bytes(model: Any) -> list[int]:
    tiles = model._runtime.updates._states._tiles
    return [t.nbytes for of_chunk in tiles.values() for t in of_chunk]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_device_peak_is_the_sum_of_its_terms(
    family: str, micro_batches: int, models: Path, device: str, tmp_path: Path
) -> None:
    """Weights that visit the device, two gradients, working memory, parked inputs: no more."""
    setting = Setting(family, micro_batches=micro_batches)
    model = load_streamed(
        folder_of(setting, models),
        setting,
        device,
        tmp_path / "store",
        (BIG_BYTES, BIG_BYTES),
        activations="device",
    )
    train(model, device)
    sizes = layout_bytes(model)
    visiting = [b for n, b in sizes.items() if not model._runtime.engine.chunks[n].gathered]
    gradients = sum(sorted(visiting, reverse=True)[:2])
    # Four layers, the final norm and the loss each keep their input.
    parked = 6 * HIDDEN_BYTES
    peak = model._runtime.statistics().budgets[Tier.DEVICE].peak_bytes
    assert peak == sum(visiting) + gradients + model._runtime.workspace.nbytes + parked
    model.close()
    assert model._runtime.device_budget.statistics().in_use_bytes == 0


@pytest.mark.parametrize("update", ["forward", "backward"])
def test_host_peak_is_the_sum_of_its_terms(
    update: str, models: Path, device: str, tmp_path: Path
) -> None:
    setting = Setting("llama", update=update)
    model = load_streamed(
        folder_of(setting, models),
        setting,
        device,
        tmp_path / "store",
        (BIG_BYTES, BIG_BYTES),
        activations="device",
    )
    train(model, device)
    model._runtime.flush()
    sizes, tiles = layout_bytes(model), tile_bytes(model)
    held = model._runtime.engine.host.statistics()
    gradients = sorted(sizes.values(), reverse=True)
    expected = {
        "state tiles": RING_SLABS * max(tiles),
        "states": sum(tiles),
        # All wait for the end of the step in 'forward'; two are under way in 'backward'.
        "gradients": sum(gradients if update == "forward" else gradients[:2]),
        **sizes,
    }
    assert held.by_borrower.keys() == expected.keys()
    for borrower, nbytes in expected.items():
        # A slab that is idle already serves a request up to a fifth smaller than itself.
        assert nbytes <= held.by_borrower[borrower] <= nbytes * 5 // 4, borrower
    budget = model._runtime.host_budget.statistics()
    assert budget.in_use_bytes == held.held_bytes + held.idle_bytes
    # What is idle was lent while the initial weights were copied: never more than two chunks.
    assert held.idle_bytes <= 2 * max(sizes.values())
    assert budget.peak_bytes <= sum(expected.values()) + 2 * max(sizes.values())
    model.close()
    assert model._runtime.host_budget.statistics().in_use_bytes == 0


@pytest.mark.parametrize("activations", ["auto", "host", "disk"])
@pytest.mark.parametrize("update", ["forward", "backward"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt2"])
def test_tight_budgets_are_kept(
    family: str, update: str, activations: str, models: Path, device: str, tmp_path: Path
) -> None:
    setting = Setting(family, update=update, placement="disk")
    folder = folder_of(setting, models)
    budgets = budgets_for(setting, folder, device, tmp_path / "probe")
    model = load_streamed(
        folder, setting, device, tmp_path / "store", budgets, activations=activations
    )
    train(model, device)
    streamed_weights(model)
    for tier, limit in ((Tier.DEVICE, budgets[0]), (Tier.HOST, budgets[1])):
        statistics = model._runtime.statistics().budgets[tier]
        assert limit // 2 < statistics.peak_bytes <= limit
    # The budgets are small: neither tier could hold the model's state.
    assert budgets[1] < 3 * sum(layout_bytes(model).values()) + sum(tile_bytes(model))
    model.close()
    for budget in (model._runtime.host_budget, model._runtime.device_budget):
        assert budget.statistics().in_use_bytes == 0
        assert budget.statistics().by_borrower == {}


MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=16000, hidden_size=1024, intermediate_size=4096,
    num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
    max_position_embeddings=2048, tie_word_embeddings=False)
LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""

TRAIN = """
import json, sys, torch
from pathlib import Path
import headrace, headrace.loading, peft
from headrace.offload.activation import ParkPlace
from headrace.offload.timeline import LaneName
from headrace.optim import adamw

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

x = torch.randn(256, 256, dtype=torch.bfloat16)
x @ x  # the libraries' own first-use memory belongs to the baseline
Path("/proc/self/clear_refs").write_text("5")
baseline = status("VmRSS")
folder, store, device_budget, host_budget = sys.argv[1:5]
model = headrace.load(folder, train="all", device="cpu", device_budget=device_budget,
    host_budget=host_budget, store=store, micro_batch=1, update="backward")
optimizer = adamw(model, lr=1e-4)
ids = torch.randint(0, 16000, (2, 512), generator=torch.Generator().manual_seed(1))
timeline, steps, losses = model._runtime.timeline, [], []
for _ in range(3):
    before = {lane: timeline.total_bytes(lane) for lane in LaneName}
    parked = dict(model._runtime.parking.parked_bytes)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    model._runtime.flush()
    losses.append(float(loss.detach()))
    steps.append({lane.value: timeline.total_bytes(lane) - before[lane] for lane in LaneName})
    after = model._runtime.parking.parked_bytes
    steps[-1]["parked"] = after[ParkPlace.DISK] - parked[ParkPlace.DISK]
chunks = model._runtime.engine.chunks
print(json.dumps({
    "parameters": sum(p.numel() for p in model.parameters()),
    "peak": status("VmHWM") - baseline,
    "steps": steps,
    "losses": losses,
    "weights": {n: c.layout.nbytes for n, c in chunks.items()},
    "gathered": [n for n, c in chunks.items() if c.gathered],
    "states": sum(t.nbytes for ts in model._runtime.updates._states._tiles.values() for t in ts),
    "budgets": {t.value: [b.peak_bytes, b.limit_bytes]
                for t, b in model._runtime.statistics().budgets.items()},
}))
model.close()
"""

DEVICE_BUDGET, HOST_BUDGET = "250MB", "250MB"


def run(code: str, *arguments: str) -> str:
    """Run a script in a process of its own; its last line of output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.mark.slow
def test_a_large_model_trains_in_900_mb(tmp_path: Path, device: str) -> None:
    """436 M parameters, 6.1 GB of state on disk, 512 tokens a micro-batch."""
    if device != "cpu":
        pytest.skip("resident memory of the process bounds the tiers of device='cpu' only")
    folder, store = str(tmp_path / "model"), str(tmp_path / "store")
    run(MAKE, folder)
    found = json.loads(run(TRAIN, folder, store, DEVICE_BUDGET, HOST_BUDGET))
    print(json.dumps({k: v for k, v in found.items() if k != "weights"}))
    count, weights, states = found["parameters"], found["weights"], found["states"]
    assert count >= 400e6
    assert found["losses"][2] < found["losses"][0]
    for peak, limit in found["budgets"].values():
        assert peak <= limit
    total = sum(weights.values())
    gathered = sum(weights[name] for name in found["gathered"])
    held = found["budgets"]["host"][1]
    for step in found["steps"]:
        # Every weight and every state is written exactly once a step, and so is a chunk input
        # that neither budget had room for.
        assert step["disk_write"] == total + states + step["parked"]
        assert step["disk_write"] == pytest.approx(14 * count, rel=0.03)
        # Read: the states, and each weight once forward and once backward (the gathered
        # embedding for its update alone).  Chunks still in host memory at either turn of the
        # schedule, the end of forward and the end of backward, are not read again.
        assert step["disk_read"] <= 16 * count * 1.03
        if step is not found["steps"][0]:
            saved = 2 * held + gathered
            assert step["disk_read"] >= states + 2 * total - saved + step["parked"]
    assert found["peak"] < 900e6
