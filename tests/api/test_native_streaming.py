"""Low-bit checkpoints of others, streamed as they lie: the bits of their decoded weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from native_cases import LAYOUTS, fp8, linear, mxfp4, rewrite
from peft import LoraConfig, get_peft_model
from streaming_cases import batches, make_folder, resident_model, resident_steps, streamed_steps
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import headrace
from headrace.offload.timeline import LaneName
from headrace.optim import adamw
from headrace.quant.model import encoded_weights


def adapted(model: Any) -> Any:
    """The model under LoRA on its attention."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config).train()


def equal_training(resident: Any, folder: Path, **options: Any) -> Any:
    """Train both for three steps; everything must be equal bit for bit.  Returns the streamed."""
    ids = batches(3)
    resident = adapted(resident.train())
    trainable = [p for p in resident.parameters() if p.requires_grad]
    expected = resident_steps(resident, adamw(trainable, lr=1e-2), ids, micro_batch=2)
    base = headrace.load(
        folder,
        train="adapters",
        device="cpu",
        device_budget="4MB",
        host_budget="2MB",
        micro_batch=2,
        **options,
    )
    streamed = adapted(base)
    assert streamed_steps(streamed, adamw(streamed, lr=1e-2), ids) == expected
    reference = {n: p for n, p in resident.named_parameters() if p.requires_grad}
    found = {n: p for n, p in streamed.named_parameters() if p.requires_grad}
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[n], reference[n]) for n in reference)
    assert headrace.statistics(base).lanes[LaneName.DISK_WRITE].nbytes == 0
    return base


def with_weights(model: Any, decoded: dict[str, Tensor]) -> Any:
    """The model with these weights; every one must have its place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in decoded.items():
            parameters[name].copy_(value)
    return model


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_native_checkpoint_streams_with_the_bits_of_its_decoded_weights(
    tmp_path: Path, layout: str
) -> None:
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    resident = resident_model(folder, torch.bfloat16)
    settings, encode = LAYOUTS[layout]
    decoded = rewrite(folder, settings, lambda n, w: encode(w) if linear(n) else None)
    assert len(decoded) == 4 * 7
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    base = equal_training(with_weights(resident, decoded), folder)
    assert {n.replace(".base_layer", "") for n in encoded_weights(base)} == decoded.keys()
    assert not hasattr(base.config, "quantization_config")
    base.close()
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()} == before


def test_one_layer_costs_its_packed_bytes(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    settings, encode = LAYOUTS["gptq"]
    rewrite(folder, settings, lambda n, w: encode(w) if linear(n) else None)
    model = headrace.load(folder, device="cpu", device_budget="4MB", host_budget="2MB")
    layer = model.get_submodule("model.layers.0")
    packed = sum(p.numel() * p.element_size() for p in layer.parameters())
    weights = sum(w.numel() for n, w in encoded_weights(model).items() if ".layers.0." in n)
    # Groups of 16: 4 bits, a scale and a zero point for each group; the rest is norms.
    assert weights / 2 < packed < 0.9 * weights
    model.close()


@pytest.mark.parametrize("block", [16, 0], ids=["blocks", "whole"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_stored_one_by_one_become_one_stack(
    tmp_path: Path, family: str, block: int
) -> None:
    folder = make_folder(family, tmp_path, torch.bfloat16)
    original = shutil.copytree(folder, tmp_path / "decoded")
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    decoded = rewrite(folder, settings, lambda n, w: fp8(w, block) if linear(n) else None)
    assert sum("experts" in name for name in decoded) == 4 * 4 * 3
    # transformers' own fusing of the decoded experts is the reference.
    rewrite(original, {}, lambda n, w: ({"weight": decoded[n]}, w) if n in decoded else None)
    config = AutoConfig.from_pretrained(original)
    del config.quantization_config
    resident = AutoModelForCausalLM.from_pretrained(original, config=config, dtype=torch.bfloat16)
    base = equal_training(resident, folder)
    stacks = [n for n, w in encoded_weights(base).items() if "experts" in n and w.ndim == 3]
    assert len(stacks) == 4 * 2
    base.close()


def gpt_oss(folder: Path) -> Path:
    """Save a tiny random gpt-oss."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def test_gpt_oss_streams_its_own_mxfp4(tmp_path: Path) -> None:
    folder = gpt_oss(tmp_path / "model")
    resident = resident_model(folder, torch.bfloat16)

    def encode(name: str, weight: Tensor) -> Any:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        # The shipped layout has outputs before inputs.
        parts, exact = mxfp4(weight.transpose(1, 2).contiguous())
        return parts, exact.transpose(1, 2)

    decoded = rewrite(folder, {"quant_method": "mxfp4"}, encode)
    assert len(decoded) == 4
    base = equal_training(with_weights(resident, decoded), folder)
    # transformers decodes the same bytes to the same weights.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, weight in encoded_weights(base).items():
        assert weight.shape == theirs.get_parameter(name).shape
        assert torch.equal(theirs.get_parameter(name), decoded[name])
    base.close()


def test_norms_of_another_dtype_are_converted_beside_packed_bytes(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, torch.float32)
    resident = resident_model(folder, torch.bfloat16)
    settings, encode = LAYOUTS["fp8-blocks"]
    decoded = rewrite(folder, settings, lambda n, w: encode(w) if linear(n) else None)
    rounded = {name: value.to(torch.bfloat16) for name, value in decoded.items()}
    equal_training(with_weights(resident, rounded), folder, dtype=torch.bfloat16).close()


def test_a_native_checkpoint_cannot_be_trained_itself(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    settings, encode = LAYOUTS["fp8-blocks"]
    rewrite(folder, settings, lambda n, w: encode(w) if linear(n) else None)
    with pytest.raises(headrace.InputError, match="cannot be trained themselves"):
        headrace.load(folder, train="all", store=tmp_path / "store", device="cpu")
