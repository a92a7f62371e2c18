"""A trace of one step: its spans, its samples, and no thread left behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import headrace
from headrace.offload.budget import Tier
from headrace.offload.timeline import LaneName
from headrace.optim import adamw


def test_a_trace_shows_the_lanes_and_the_memory_of_a_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = headrace.load(
        tmp_path / "model",
        train="all",
        device="cpu",
        device_budget="1MB",
        host_budget="1MB",
        store=tmp_path / "store",
    )
    optimizer = adamw(model, lr=1e-3)
    tokens = torch.arange(24).reshape(2, 12)
    with pytest.raises(ValueError, match="every_seconds"), headrace.trace(model, every_seconds=0):
        pass
    with headrace.trace(model, every_seconds=0.0005) as trace:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.close()
    assert not [t for t in threading.enumerate() if t.name == "headrace trace"]
    assert len(trace.chunk_bytes) == 7  # embedding, four layers, norm, head
    compute = {s.label for s in trace.spans if s.lane is LaneName.COMPUTE}
    assert {f"forward {name}" for name in trace.chunk_bytes} <= compute
    assert all(0 <= s.start <= s.end <= trace.seconds for s in trace.spans)
    times = [s.seconds for s in trace.samples]
    assert times == sorted(times) and len(times) >= 2
    for sample in trace.samples:
        assert sample.residency.keys() == trace.chunk_bytes.keys()
        assert all(sample.in_use_bytes[t] <= trace.limit_bytes[t] for t in trace.limit_bytes)
    assert max(s.in_use_bytes[Tier.DEVICE] for s in trace.samples) > 0
