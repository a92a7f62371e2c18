"""A frozen base in few bits, streamed from disk: the bits of the same weights in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from streaming_cases import (
    batches,
    make_folder,
    resident_model,
    resident_steps,
    streamed_steps,
)

import headrace
from headrace.cli import main
from headrace.offload.timeline import LaneName
from headrace.optim import adamw
from headrace.quant.fold import default_choice
from headrace.quant.model import encode_model, encoded_weights
from headrace.quant.registry import codec_for_format


def adapted(model: Any, family: str) -> Any:
    """The model under LoRA on its attention."""
    torch.manual_seed(3)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    ).train()


@pytest.mark.parametrize(
    ("family", "word"),
    [("llama", "nf4"), ("qwen2_moe", "nf4"), ("mixtral", "int8"), ("gpt2", "mxfp4")],
)
def test_qlora_from_disk_equals_the_resident_encoded_model(
    tmp_path: Path, family: str, word: str
) -> None:
    folder = make_folder(family, tmp_path / "model", torch.bfloat16)
    headrace.quantize(folder, tmp_path / "encoded", format=word)
    ids = batches(3)

    resident = resident_model(folder, torch.bfloat16)
    names = encode_model(resident, default_choice(codec_for_format(word)))
    if "moe" in family or family == "mixtral":
        assert any("experts" in name for name in names)
    resident = adapted(resident, family)
    trainable = [p for p in resident.parameters() if p.requires_grad]
    expected = resident_steps(resident, adamw(trainable, lr=1e-2), ids, micro_batch=2)

    base = headrace.load(
        tmp_path / "encoded",
        train="adapters",
        device="cpu",
        device_budget="2MB",
        host_budget="1MB",
        micro_batch=2,
    )
    assert encoded_weights(base).keys() == set(names)
    streamed = adapted(base, family)
    assert streamed_steps(streamed, adamw(streamed, lr=1e-2), ids) == expected
    reference = {n: p for n, p in resident.named_parameters() if p.requires_grad}
    found = {n: p for n, p in streamed.named_parameters() if p.requires_grad}
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[n], reference[n]) for n in reference)
    assert headrace.statistics(base).lanes[LaneName.DISK_WRITE].nbytes == 0
    base.close()


def test_encoded_weights_cannot_be_trained_themselves(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model")
    headrace.quantize(folder, tmp_path / "encoded")
    with pytest.raises(ValueError, match="encoded weights"):
        headrace.load(tmp_path / "encoded", train="all", store=tmp_path / "store")


def test_a_damaged_encoded_folder_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model")
    headrace.quantize(folder, tmp_path / "encoded")
    shard = sorted((tmp_path / "encoded").glob("*layers.1*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4096])
    with pytest.raises(ValueError, match=shard.name):
        headrace.load(tmp_path / "encoded", train="adapters", device="cpu")


def test_the_command_reports_errors_and_refuses_a_finished_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder("mixtral", tmp_path / "model")
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--format", "int8", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    experts = [t for t in record["tensors"] if "experts" in t["name"]]
    assert experts and all(t["codec"] == "int8_rowwise" for t in experts)
    assert all(0 < t["relative_rms"] < 0.02 for t in experts)
    assert record["bytes_after"] < record["bytes_before"]
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 2
    assert "finished encoding" in capsys.readouterr().err
