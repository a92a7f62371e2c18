"""What ``headrace quantize`` keeps in memory and reads, on a checkpoint of more than 2 GB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 16


def make_checkpoint(folder: Path, *, width: int) -> int:
    """A Llama folder, one shard a layer, written without holding the model; its bytes."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    noise = torch.randn(4 * width * width, dtype=torch.bfloat16) * 0.02
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        shard = f"{words[2]:0>3}" if "layers" in words else "rest"
        # Tensors of one shard may not share memory.
        value = noise[: parameter.numel()].clone().view(parameter.shape)
        shards.setdefault(shard, {})[name] = value
        if name.endswith("post_attention_layernorm.weight"):  # the last one of a layer
            _write(folder, shard, shards)
    for shard in list(shards):
        _write(folder, shard, shards)
    files = sorted(folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict(_weight_map(files))})
    )
    _forget_pages(files)
    return sum(path.stat().st_size for path in files)


def _write(folder: Path, shard: str, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    path = folder / f"model-{shard}.safetensors"
    save_file(shards.pop(shard), path, metadata={"format": "pt"})


def _forget_pages(files: list[Path]) -> None:
    """Drop the files from the page cache, so that reads reach the disk and are counted."""
    for advice in (os.POSIX_FADV_NORMAL, os.POSIX_FADV_DONTNEED):
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, advice)
            os.close(descriptor)


def _weight_map(files: list[Path]) -> list[tuple[str, str]]:
    from safetensors import safe_open

    pairs = []
    for path in files:
        with safe_open(path, framework="pt") as shard:
            pairs += [(name, path.name) for name in shard.keys()]
    return pairs


QUANTIZE = """
import json, sys, torch
from pathlib import Path
import headrace, headrace.quantizing, headrace.cli

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def read_bytes():
    lines = dict(l.split(": ") for l in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])

torch.set_num_threads(1)
x = torch.randn(256, 256, dtype=torch.bfloat16)
x @ x  # the libraries' own first-use memory belongs to the baseline
Path("/proc/self/clear_refs").write_text("5")
baseline, before = status("VmRSS"), read_bytes()
code = headrace.cli.main(["quantize", *sys.argv[1:], "--json"])
print()
print(json.dumps({"code": code, "peak": status("VmHWM") - baseline, "read": read_bytes() - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, as Linux has it")
@pytest.mark.parametrize("word", ["int8", "nf4"])
def test_quantising_2_gb_keeps_two_layers_and_reads_once(tmp_path: Path, word: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    size = make_checkpoint(folder, width=2048)
    assert size > 2e9
    layer = size // LAYERS
    done = subprocess.run(
        [sys.executable, "-c", QUANTIZE, str(folder), str(tmp_path / "out"), "--format", word],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{word}: peak {found['peak']:,}, a layer {layer:,}, read {found['read']:,} of {size:,}")
    assert found["code"] == 0
    assert found["peak"] <= 2 * layer + 300e6
    if found["read"] == 0:
        pytest.skip("the file system does not report reads of its files")
    assert found["read"] == pytest.approx(size, rel=0.03)
