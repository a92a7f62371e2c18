"""Merging adapters into a streamed base: the bits of PEFT's own merge, one chunk at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from streaming_cases import batches, make_folder
from torch import nn
from transformers import AutoModelForCausalLM

import headrace
from headrace.cli import main
from headrace.errors import InputError
from headrace.offload.errors import HeadraceError
from headrace.quant.folder import EncodedFolder
from headrace.quant.model import encoded_weights
from headrace.quant.registry import codec_for_format

BUDGETS = {"device": "cpu", "device_budget": "8MB", "host_budget": "1MB"}
TARGETS = {"llama": ["q_proj", "down_proj"], "mixtral": ["q_proj", "o_proj"], "gpt2": ["c_attn"]}


def adapted(model: Any, family: str, **changed: Any) -> Any:
    """The model under adapters whose both factors are random."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[family], **changed)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(wrapped.named_parameters()):
        if parameter.requires_grad and "magnitude" not in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return wrapped


def decoded_folder(encoded: Path, original: Path, out: Path) -> Path:
    """The original folder with every weight as the encoded folder decodes it."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    folder = EncodedFolder(encoded)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in folder.records:
                parameter.copy_(folder.decode(name))
    model.save_pretrained(out)
    return out


def same_weights(found: nn.Module, expected: nn.Module) -> None:
    reference = expected.state_dict()
    state = found.state_dict()
    assert state.keys() == reference.keys()
    different = [n for n in reference if not torch.equal(state[n], reference[n])]
    assert different == []


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("word", [None, "nf4"])
def test_the_merged_folder_is_peft_s_merge(
    tmp_path: Path, family: str, variant: dict[str, Any], word: str | None
) -> None:
    folder = opened = make_folder(family, tmp_path / "model", torch.bfloat16)
    if word is not None:
        opened = tmp_path / "encoded"
        headrace.quantize(folder, opened, format=word)
        folder = decoded_folder(opened, folder, tmp_path / "decoded")
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = adapted(resident, family, **variant).merge_and_unload()

    base = headrace.load(opened, train="adapters", **BUDGETS)
    headrace.export(adapted(base, family, **variant), tmp_path / "out")
    base.close()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    same_weights(found, expected)


def test_biases_of_adapters_are_merged(tmp_path: Path) -> None:
    folder = make_folder("gpt2", tmp_path / "model", torch.bfloat16)
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = adapted(resident, "gpt2", lora_bias=True).merge_and_unload()
    base = headrace.load(folder, train="adapters", **BUDGETS)
    headrace.export(adapted(base, "gpt2", lora_bias=True), tmp_path / "out")
    base.close()
    same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), expected)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("word", ["same", "int8"])
def test_merged_weights_are_encoded_again_on_request(
    tmp_path: Path, family: str, word: str
) -> None:
    folder = make_folder(family, tmp_path / "model", torch.bfloat16)
    headrace.quantize(folder, tmp_path / "encoded", format="nf4")
    base = headrace.load(tmp_path / "encoded", train="adapters", **BUDGETS)
    merged = headrace.merge_and_unload(adapted(base, family), tmp_path / "out", format=word)

    resident = AutoModelForCausalLM.from_pretrained(
        decoded_folder(tmp_path / "encoded", folder, tmp_path / "decoded"), dtype="auto"
    )
    expected = adapted(resident, family).merge_and_unload().state_dict()
    codec = codec_for_format("nf4" if word == "same" else word)
    assert encoded_weights(merged).keys() == EncodedFolder(tmp_path / "encoded").records.keys() & (
        encoded_weights(merged).keys()
    )
    result = EncodedFolder(tmp_path / "out")
    assert any(record.codec is not None for record in result.records.values())
    for name, record in result.records.items():
        value = expected[name]
        if record.codec is not None:
            assert record.codec == codec
            value = codec.decode(codec.encode(value), tuple(value.shape), value.dtype)
        assert torch.equal(result.decode(name), value), name
    # What comes back runs, from the new folder.
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.isfinite(merged(input_ids=ids, labels=ids).loss)
    merged.close()


def test_the_same_codec_needs_an_encoded_base(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model")
    base = headrace.load(folder, train="adapters", **BUDGETS)
    with pytest.raises(InputError, match="no weight of this model is encoded"):
        headrace.export(adapted(base, "llama"), tmp_path / "out", format="same")
    assert not (tmp_path / "out").exists()
    base.close()


@pytest.mark.parametrize("word", [None, "nf4"])
@pytest.mark.parametrize("safe", [False, True])
def test_peft_s_own_merge_is_refused_with_the_way_out(
    tmp_path: Path, word: str | None, safe: bool
) -> None:
    opened = make_folder("llama", tmp_path / "model", torch.bfloat16)
    if word is not None:
        headrace.quantize(opened, tmp_path / "encoded", format=word)
        opened = tmp_path / "encoded"
    base = headrace.load(opened, train="adapters", **BUDGETS)
    model = adapted(base, "llama")
    ids = batches(1)[0]
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids).loss
    with pytest.raises((HeadraceError, ValueError), match=r"headrace\.merge_and_unload"):
        model.merge_and_unload(safe_merge=safe)
    with torch.no_grad():  # nothing was merged, nothing was lost
        assert torch.equal(model(input_ids=ids, labels=ids).loss, before)
    base.close()


def test_export_on_the_command_line_takes_a_format(tmp_path: Path, model_folder: Path) -> None:
    headrace.quantize(model_folder, tmp_path / "encoded", format="nf4")
    base = headrace.load(tmp_path / "encoded", train="adapters", **BUDGETS)
    model = adapted(base, "llama")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "encoded")
    adapters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path / "adapters", state_dict=adapters, save_embedding_layers=False)
    base.close()
    arguments = ["export", str(tmp_path / "adapters"), "--out"]
    assert main([*arguments, str(tmp_path / "plain")]) == 0
    assert main([*arguments, str(tmp_path / "again"), "--format", "same"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").state_dict()
    again = EncodedFolder(tmp_path / "again")
    name = "model.layers.0.self_attn.q_proj.weight"
    codec = codec_for_format("nf4")
    expected = codec.decode(codec.encode(plain[name]), tuple(plain[name].shape), torch.bfloat16)
    assert torch.equal(again.decode(name), expected)
