"""``HeadraceConfig`` in transformers' own ``from_pretrained``: encode, save, open again, stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streaming_cases import FAMILIES, batches, make_folder, resident_model
from transformers import AutoConfig, AutoModelForCausalLM

import headrace
from headrace import HeadraceConfig
from headrace.foreign_quantizing import quantize_for_transformers
from headrace.quant.fold import default_choice
from headrace.quant.folder import EncodedFolder
from headrace.quant.model import encode_model, encoded_weights
from headrace.quant.nf4 import Nf4Codec
from headrace.streamed import StreamedModel


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        value: torch.Tensor = model(batches(1)[0]).logits
    return value


def encoded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HeadraceConfig(**options)
    )


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_every_door_opens_the_same_model(tmp_path: Path, family: str) -> None:
    folder = make_folder(family, tmp_path, torch.bfloat16)
    reference = resident_model(folder, torch.bfloat16).eval()
    names = encode_model(reference, default_choice(Nf4Codec()))
    expected = logits(reference)

    model = encoded(folder)
    assert encoded_weights(model).keys() == set(names)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for n, p in again.named_parameters() if "_absmax" in n)

    streamed = headrace.load(tmp_path / "saved", train="none", device="cpu")
    assert encoded_weights(streamed).keys() == set(names)
    assert torch.equal(logits(streamed), expected)
    streamed.close()

    headrace.quantize(folder, tmp_path / "encoded")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "encoded")
    assert torch.equal(logits(opened), expected)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_with_a_store_it_streams_within_its_budgets(tmp_path: Path, family: str) -> None:
    folder = make_folder(family, tmp_path, torch.bfloat16)
    expected = logits(encoded(folder, format="int8"))
    budgets = {"device_budget": "3MB", "host_budget": "2MB", "micro_batch": 2}
    model = encoded(folder, format="int8", store=tmp_path / "store", **budgets)
    assert isinstance(model, StreamedModel)
    assert model._runtime.host_budget.limit_bytes == 2_000_000
    assert torch.equal(logits(model), expected)
    model.close()
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "store/encoded").iterdir())
    taken_up = encoded(folder, format="int8", store=tmp_path / "store", **budgets)
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "store/encoded").iterdir()) == before
    assert torch.equal(logits(taken_up), expected)
    taken_up.close()
    with pytest.raises(headrace.InputError, match="give another store"):
        encoded(folder, format="nf4", store=tmp_path / "store", **budgets)


def test_adapters_train_on_the_encoded_model(tmp_path: Path) -> None:
    model = encoded(make_folder("llama", tmp_path, torch.bfloat16))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    ids = batches(1)[0]
    model(ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 8
    assert all(grad is not None for grad in grads.values())


def test_modules_can_be_kept_as_they_are(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    model = encoded(folder, modules_to_not_convert=["down_proj", "model.layers.1"])
    names = encoded_weights(model).keys()
    assert len(names) == 3 * 6
    assert not any("down_proj" in name or "layers.1." in name for name in names)


# What another process, in which this library is not imported, gets from plain transformers.
OPENS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = model(ids).logits
assert "headrace" not in sys.modules
torch.save({"logits": logits, "kinds": sorted({type(m).__name__ for m in model.modules()})},
           sys.argv[3])
"""


def opened_elsewhere(folder: Path, tmp_path: Path) -> dict[str, Any]:
    torch.save(batches(1)[0], tmp_path / "ids.pt")
    arguments = [str(folder), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")]
    subprocess.run(
        [sys.executable, "-c", OPENS, *arguments],
        check=True,
        cwd="/",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
    )
    found: dict[str, Any] = torch.load(tmp_path / "out.pt", weights_only=True)
    return found


@pytest.mark.parametrize(
    ("family", "word", "kind"),
    [
        ("llama", "nf4", "Linear4bit"),
        ("gpt2", "nf4", "Linear4bit"),
        ("llama", "nf4-fitted", "Linear4bit"),
        ("llama", "fp4", "Linear4bit"),
        ("llama", "int8", "Linear8bitLt"),
        ("llama", "fp8", "Linear"),
    ],
)
def test_the_saved_folder_opens_without_us(
    tmp_path: Path, family: str, word: str, kind: str
) -> None:
    if kind != "Linear":
        pytest.importorskip("bitsandbytes", reason="the extra headrace[bench]")
    # bitsandbytes cannot multiply on a CPU by rows of less than a block.
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    config = AutoConfig.for_model(family, **FAMILIES[family] | sizes)
    folder = tmp_path / "model"
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    model = encoded(folder, format=word, layout="transformers")
    ours = logits(model)
    model.save_pretrained(tmp_path / "saved")
    elsewhere = opened_elsewhere(tmp_path / "saved", tmp_path)
    assert kind in elsewhere["kinds"]
    error = (elsewhere["logits"].float() - ours.float()).norm() / ours.float().norm()
    # bitsandbytes multiplies INT8 by INT8: it rounds activations too.
    assert error < (3e-2 if word == "int8" else 1e-2)
    streamed = headrace.load(tmp_path / "saved", train="none", device="cpu")
    assert len(encoded_weights(streamed)) == len(encoded_weights(model))
    assert torch.equal(logits(streamed), ours)
    streamed.close()


def test_the_mxfp4_of_gpt_oss_opens_without_us(tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 97}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("gpt_oss", **sizes, **counts, **experts)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    model = encoded(tmp_path / "m", format="mxfp4", layout="transformers")
    assert len(encoded_weights(model)) == 4
    ours = logits(model)
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as shard:
        assert "model.layers.0.mlp.experts.gate_up_proj_blocks" in shard.keys()
    elsewhere = opened_elsewhere(tmp_path / "saved", tmp_path)
    assert torch.allclose(elsewhere["logits"], ours, atol=1e-2)
    streamed = headrace.load(tmp_path / "saved", train="none", device="cpu")
    assert torch.equal(logits(streamed), ours)
    streamed.close()


def test_what_transformers_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    mixtral = make_folder("mixtral", tmp_path, torch.bfloat16)
    with pytest.raises(headrace.InputError, match=r"layers\.0\.mlp\.experts.*modules_to_not_conv"):
        encoded(mixtral, format="nf4", layout="transformers")
    kept = encoded(mixtral, format="nf4", layout="transformers", modules_to_not_convert=["experts"])
    kept.save_pretrained(tmp_path / "kept")
    assert torch.equal(logits(headrace.load(tmp_path / "kept", device="cpu")), logits(kept))
    llama = make_folder("llama", tmp_path, torch.bfloat16)
    with pytest.raises(headrace.InputError, match="no layout for format 'nvfp4'"):
        encoded(llama, format="nvfp4", layout="transformers")
    with pytest.raises(headrace.InputError, match="no weight that"):
        encoded(llama, format="mxfp4", layout="transformers")
    with pytest.raises(headrace.InputError, match="format 'nf5'"):
        encoded(llama, format="nf5")
    with pytest.raises(headrace.InputError, match="layout is 'theirs'"):
        HeadraceConfig(layout="theirs")
    with pytest.raises(headrace.InputError, match="give store="):
        HeadraceConfig(device_budget="1GB")


def test_weights_that_are_not_numbers_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(headrace.InputError, match=r"layers\.2\.mlp\.up_proj.* 1 values"):
        encoded(folder)


@pytest.mark.parametrize("harm", ["bits", "missing", "shape", "dtype", "codec", "name", "empty"])
def test_a_damaged_or_foreign_folder_is_refused_by_name(tmp_path: Path, harm: str) -> None:
    model = encoded(make_folder("llama", tmp_path, torch.bfloat16))
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    file, config_file = saved / "model.safetensors", saved / "config.json"
    tensors, config = load_file(file), json.loads(config_file.read_text())
    weight = "model.layers.3.self_attn.o_proj.weight"
    codes = tensors[f"{weight}_codes"]
    group = config["quantization_config"]["weights"][0]
    expected = weight.replace(".", r"\.")
    if harm == "bits":
        codes[7] ^= 1
    elif harm == "missing":
        del tensors[f"{weight}_codes"]
    elif harm == "shape":
        tensors[f"{weight}_codes"] = codes[:-8].clone()
        expected = "mismatch|size"
    elif harm == "dtype":
        tensors[f"{weight}_codes"] = codes.to(torch.int32)
    elif harm == "codec":
        group["codec"]["codec"] = "nf5"
        expected = "codec 'nf5' is not known"
    elif harm == "name":
        group["weights"]["model.layers.9.mlp.up_proj.weight"] = [[64, 32], ""]
        expected = r"no parameter 'model\.layers\.9\.mlp\.up_proj\.weight'"
    else:
        config["quantization_config"]["weights"] = []
        expected = "names no encoded weights"
    save_file(tensors, file, {"format": "pt"})
    config_file.write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=expected):
        AutoModelForCausalLM.from_pretrained(saved)
    if harm != "bits":  # bytes that stream are not read before they are used
        with pytest.raises(
            ValueError, match=weight.replace(".", r"\.") + r"|layers\.9|" + expected
        ):
            headrace.load(saved, device="cpu")


def test_importing_the_package_registers_nothing() -> None:
    code = (
        "import headrace, transformers.quantizers.auto as auto\n"
        "assert 'headrace' not in auto.AUTO_QUANTIZER_MAPPING\n"
        "headrace.HeadraceConfig\n"
        "assert 'headrace' in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert 'headrace' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("family", "word"), [("llama", "nf4"), ("gpt2", "int8")])
def test_both_ways_to_a_foreign_folder_write_the_same_tensors(
    tmp_path: Path, family: str, word: str
) -> None:
    folder = make_folder(family, tmp_path, torch.bfloat16)
    encoded(folder, format=word, layout="transformers").save_pretrained(tmp_path / "saved")
    headrace.quantize_for_transformers(folder, tmp_path / "streamed", format=word)
    saved = load_file(tmp_path / "saved/model.safetensors")
    streamed: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "streamed").glob("*.safetensors"):
        streamed |= load_file(shard)
    assert streamed.keys() == saved.keys()
    assert all(torch.equal(streamed[name], saved[name]) for name in saved)
    configs = [
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("saved", "streamed")
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_words_that_are_ways_to_encode_do_the_same_here_as_on_disk(tmp_path: Path) -> None:
    folder = make_folder("mixtral", tmp_path, torch.bfloat16)
    for word in ("nf4-fitted", "hqq"):
        written = headrace.quantize(folder, tmp_path / word, format=word)
        for name, weight in encoded_weights(encoded(folder, format=word)).items():
            parts = written.read_parts(name)
            mine = weight.view_.owner.parts()
            assert all(torch.equal(mine[part], parts[part]) for part in parts), name
    nearest = headrace.quantize(folder, tmp_path / "nf4", format="nf4")
    fitted = EncodedFolder(tmp_path / "nf4-fitted")
    errors = [
        sum(r.error["relative_rms"] for r in f.records.values() if r.error is not None)
        for f in (fitted, nearest)
    ]
    assert errors[0] < 0.96 * errors[1]
    with pytest.raises(headrace.InputError, match="calibration data"):
        HeadraceConfig("gptq")


def test_fitted_scales_leave_in_the_layout_of_others(tmp_path: Path) -> None:
    """Their decoder multiplies by whatever scale is stored."""
    folder = make_folder("llama", tmp_path, torch.bfloat16)
    headrace.quantize(folder, tmp_path / "ours", format="nf4-fitted")
    quantize_for_transformers(folder, tmp_path / "theirs", format="nf4-fitted")
    ours = headrace.load(tmp_path / "ours", train="none", device="cpu")
    theirs = headrace.load(tmp_path / "theirs", train="none", device="cpu")
    assert torch.equal(logits(ours), logits(theirs))
    ours.close()
    theirs.close()
