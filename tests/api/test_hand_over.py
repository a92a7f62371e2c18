"""A run goes on in FSDP2, and comes back, through a distributed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from streaming_cases import batches, make_folder, streamed_steps
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import headrace
from headrace.errors import InputError
from headrace.offload.errors import SourceError
from headrace.optim import adamw, galore_adamw

IDS = batches(8, rows=2, tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("qwen2", tmp_path_factory.mktemp("model"), torch.float32)


def opened(folder: Path, store: Path) -> Any:
    return headrace.load(
        folder, train="all", store=store, device="cpu", device_budget="8MB", host_budget="16MB"
    )


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, tmp_path / "first")
    optimizer = adamw(model, lr=1e-2, weight_decay=0.1)
    streamed_steps(model, optimizer, IDS[:3])
    headrace.export_distributed(model, tmp_path / "there")
    expected = streamed_steps(model, optimizer, IDS[3:7])
    model.close()

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        other = AutoModelForCausalLM.from_pretrained(folder)
        fully_shard(other, mesh=init_device_mesh("cpu", (1,)))
        theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
        weights, states = get_state_dict(other, theirs)
        dcp.load({"model": weights, "optim": states}, checkpoint_id=str(tmp_path / "there"))
        set_state_dict(other, theirs, model_state_dict=weights, optim_state_dict=states)
        there = streamed_steps(other, theirs, IDS[3:5])
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
    back = streamed_steps(again, optimizer, IDS[5:7])
    again.close()
    assert torch.allclose(torch.tensor(back), torch.tensor(expected[2:]), rtol=1e-5, atol=0)


def test_what_torch_has_not_is_refused(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, tmp_path / "store")
    optimizer = galore_adamw(model, lr=1e-2, rank=4)
    streamed_steps(model, optimizer, IDS[:1])
    with pytest.raises(InputError, match=r"none of torch\.optim\.AdamW's fp32 moments"):
        headrace.export_distributed(model, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    with pytest.raises(SourceError, match=r"\.metadata is missing"):
        headrace.import_distributed(model, tmp_path)
    model.close()
