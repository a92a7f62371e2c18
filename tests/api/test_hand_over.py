"""A run goes on in FSDP2, and comes back, through a distributed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import headrace
from headrace.errors import InputError
from headrace.offload.errors import SourceError
from headrace.optim import adamw, galore_adamw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    target = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    return target


def opened(folder: Path, store: Path) -> Any:
    return headrace.load(
        folder, train="all", store=store, device="cpu", device_budget="8MB", host_budget="16MB"
    )


def steps(model: Any, optimizer: Any, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 97, (2, 8), generator=generator)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, tmp_path / "first")
    optimizer = adamw(model, lr=1e-2, weight_decay=0.1)
    steps(model, optimizer, range(3))
    headrace.export_distributed(model, tmp_path / "there")
    expected = steps(model, optimizer, range(3, 7))
    model.close()

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        other = AutoModelForCausalLM.from_pretrained(folder)
        fully_shard(other, mesh=init_device_mesh("cpu", (1,)))
        theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
        weights, states = get_state_dict(other, theirs)
        dcp.load({"model": weights, "optim": states}, checkpoint_id=str(tmp_path / "there"))
        set_state_dict(other, theirs, model_state_dict=weights, optim_state_dict=states)
        there = steps(other, theirs, range(3, 5))
        weights, states = get_state_dict(other, theirs)
        dcp.save({"model": weights, "optim": states}, checkpoint_id=str(tmp_path / "back"))
        full = {name: tensor.full_tensor() for name, tensor in weights.items()}
        plain = AutoModelForCausalLM.from_pretrained(folder)
        plain.load_state_dict(full)
        plain.save_pretrained(tmp_path / "weights")
    finally:
        dist.destroy_process_group()
    assert torch.allclose(torch.tensor(there), torch.tensor(expected[:2]), rtol=1e-5, atol=0)

    again = opened(tmp_path / "weights", tmp_path / "second")
    optimizer = adamw(again, lr=1e-2, weight_decay=0.1)
    headrace.import_distributed(again, tmp_path / "back")
    back = steps(again, optimizer, range(5, 7))
    again.close()
    assert torch.allclose(torch.tensor(back), torch.tensor(expected[2:]), rtol=1e-5, atol=0)


def test_what_torch_has_not_is_refused(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, tmp_path / "store")
    optimizer = galore_adamw(model, lr=1e-2, rank=4)
    steps(model, optimizer, range(1))
    with pytest.raises(InputError, match=r"none of torch\.optim\.AdamW's fp32 moments"):
        headrace.export_distributed(model, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    with pytest.raises(SourceError, match=r"\.metadata is missing"):
        headrace.import_distributed(model, tmp_path)
    model.close()
