"""Peak memory of a model of more than 1 GB on disk, stepped and written back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

WORKER = Path(__file__).parent / "zo_memory_worker.py"
LIMIT_BYTES = 600_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """552 M parameters in bfloat16: 1.10 GB of random weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=12,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        shards.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards.values()):
        file = f"model-{number:05d}.safetensors"
        made = {
            name: (torch.randn(p.shape) * 0.02).bfloat16()
            if p.dim() > 1
            else torch.ones(p.shape, dtype=torch.bfloat16)
            for name, p in tensors.items()
        }
        save_file(made, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    total = sum(p.numel() * 2 for p in model.parameters())
    assert total > 1_000_000_000
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (path / "model.safetensors.index.json").write_text(text)
    config.save_pretrained(path)
    yield path
    for file in path.glob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mezo", "lowrank"])
def test_peak_memory_stays_small(method: str, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER), method, str(folder), str(tmp_path), "3"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    for file in (tmp_path / "store").iterdir():
        file.unlink()
    grown = found["after"] - found["before"]
    sys.stderr.write(f"{method}: {grown / 1e6:.0f} MB over the import baseline; {found}\n")
    assert grown < LIMIT_BYTES, found
