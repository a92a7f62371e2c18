"""What 4-bit LoRA from disk reads and writes, by the process's own counters (Linux only)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import headrace
from headrace.offload.residency import Residency
from headrace.offload.timeline import LaneName
from headrace.optim import adamw
from headrace.quant.model import encoded_weights

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc/self/io, which only Linux has"
)


@dataclass(frozen=True)
class Counters:
    """Bytes that the read and write calls of this process have moved."""

    read: int
    written: int

    @classmethod
    def now(cls) -> Counters:
        lines = Path("/proc/self/io").read_text().splitlines()
        values = {name: int(value) for name, value in (line.split(": ") for line in lines)}
        return cls(values["rchar"], values["wchar"])


def make_nf4_folder(tmp_path: Path, *, width: int, layers: int) -> Path:
    """A random Llama of many thin layers, encoded: what stays in 16 bits is a trifle."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    headrace.quantize(tmp_path / "m", tmp_path / "nf4", format="nf4")
    return tmp_path / "nf4"


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in sorted(folder.iterdir())
    }


def lora(base: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


@dataclass(frozen=True)
class Step:
    """One training step: what the process moved, and what the schedule says it must move."""

    moved: Counters
    expected_read: int


@dataclass(frozen=True)
class Run:
    """The steps of a run, and the model's weights (elements) and chunks (bytes as read)."""

    steps: list[Step]
    weights: int
    chunk_bytes: int
    lane_written: int


def measured_steps(folder: Path, *, count: int, device_budget: str, host_budget: str) -> Run:
    """Train adapters over the streamed base."""
    base = headrace.load(
        folder,
        train="adapters",
        device="cpu",
        device_budget=device_budget,
        host_budget=host_budget,
    )
    chunks = headrace.runtime_of(base).engine.chunks.values()
    sizes = {c.name: sum(slot.nbytes for slot in c.layout.slots) for c in chunks}
    total = sum(sizes.values())

    def in_memory() -> int:
        """Bytes that the pass to come need not read again."""
        return sum(sizes[c.name] for c in chunks if c.residency is not Residency.DISK)

    weights = sum(weight.numel() for weight in encoded_weights(base).values())
    model = lora(base)
    optimizer = adamw(model, lr=1e-3)
    ids = torch.randint(0, 64, (1, 4), generator=torch.Generator().manual_seed(1))
    steps = []
    before = Counters.now()  # each step begins where the last one ended: reads run ahead
    for _ in range(count):
        held_forward = in_memory()
        loss = model(input_ids=ids, labels=ids).loss
        held_backward = in_memory()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = Counters.now()
        moved = Counters(after.read - before.read, after.written - before.written)
        steps.append(Step(moved, 2 * total - held_forward - held_backward))
        before = after
    written = headrace.statistics(base).lanes[LaneName.DISK_WRITE].nbytes
    base.close()
    return Run(steps, weights, total, written)


def test_a_step_reads_the_base_twice_and_writes_nothing(tmp_path: Path) -> None:
    folder = make_nf4_folder(tmp_path, width=128, layers=64)
    before = digests(folder)
    run = measured_steps(folder, count=3, device_budget="5MB", host_budget="2.5MB")
    for step in run.steps[1:]:
        assert step.moved.read == pytest.approx(step.expected_read, rel=0.03)
        # Most of the base is not in memory at the turns of the schedule.
        assert step.expected_read > run.chunk_bytes
        assert step.moved.written == 0
    assert run.lane_written == 0
    assert digests(folder) == before


@pytest.mark.slow
def test_the_bytes_of_a_pass_are_those_of_the_format(tmp_path: Path) -> None:
    """About 200 M weights in 240 layers: 0.516 bytes a weight and pass, within 3 %."""
    folder = make_nf4_folder(tmp_path, width=256, layers=240)
    before = digests(folder)
    run = measured_steps(folder, count=3, device_budget="15MB", host_budget="10MB")
    assert run.weights > 200e6
    each_pass = run.chunk_bytes / run.weights
    assert each_pass == pytest.approx(0.516, rel=0.03)
    for step in run.steps[1:]:
        assert step.moved.read == pytest.approx(step.expected_read, rel=0.03)
        assert step.moved.written == 0
        print(
            f"{step.moved.read:,} bytes read ({step.moved.read / run.weights / 2:.4f} a weight "
            f"and pass), {step.expected_read:,} expected, {each_pass:.4f} a weight if nothing "
            f"stays in memory; {step.moved.written} written"
        )
    assert run.lane_written == 0
    assert digests(folder) == before
