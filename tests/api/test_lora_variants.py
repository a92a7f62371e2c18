"""LoRA's variants over a streamed base, bf16 and NF4: the bits of the same base in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from streaming_cases import batches, make_folder, resident_model, resident_steps, streamed_steps
from transformers import AutoModelForCausalLM

import headrace
from headrace.errors import InputError
from headrace.offload.errors import HeadraceError
from headrace.optim import adamw
from headrace.quant.eora import eora
from headrace.quant.fold import default_choice
from headrace.quant.gptq import InputMoments
from headrace.quant.model import encode_model
from headrace.quant.registry import codec_for_format

BUDGETS = {"device": "cpu", "device_budget": "8MB", "host_budget": "1MB", "micro_batch": 2}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(model: Any, **changed: Any) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **changed})
    return get_peft_model(model, config).train()


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """A tiny Llama in bf16, and the same encoded."""
    where = tmp_path_factory.mktemp("variants")
    folder = make_folder("llama", where / "model", torch.bfloat16)
    headrace.quantize(folder, where / "nf4", format="nf4")
    return {None: folder, "nf4": where / "nf4"}


def resident_base(folders: dict[str | None, Path], word: str | None) -> Any:
    resident = resident_model(folders[None], torch.bfloat16)
    if word is not None:
        encode_model(resident, default_choice(codec_for_format(word)))
    return resident


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("word", [None, "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_with_the_resident_bits(
    folders: dict[str | None, Path], variant: str, word: str | None
) -> None:
    ids = batches(2)
    resident = adapted(resident_base(folders, word), **VARIANTS[variant])
    before = {n: p.clone() for n, p in trainable(resident).items()}
    assert all(bool(torch.isfinite(p).all()) for p in before.values())
    parameters = [p for p in resident.parameters() if p.requires_grad]
    expected = resident_steps(resident, adamw(parameters, lr=1e-2), ids, micro_batch=2)

    base = headrace.load(folders[word], train="adapters", **BUDGETS)
    streamed = adapted(base, **VARIANTS[variant])
    found = trainable(streamed)
    assert found.keys() == before.keys()
    assert [n for n in before if not torch.equal(found[n], before[n])] == []
    assert streamed_steps(streamed, adamw(streamed, lr=1e-2), ids) == expected
    after = trainable(resident)
    assert [n for n in after if not torch.equal(trainable(streamed)[n], after[n])] == []
    base.close()


def test_an_adapter_saved_with_dora_opens_over_a_stream(
    folders: dict[str | None, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = headrace.load(folders["nf4"], train="adapters", **BUDGETS)
    model = adapted(base, use_dora=True)
    streamed_steps(model, adamw(model, lr=1e-2), batches(1))
    saved = {n: p.clone() for n, p in trainable(model).items()}
    model.save_pretrained(tmp_path / "adapter", state_dict=saved, save_embedding_layers=False)
    base.close()
    base = headrace.load(folders["nf4"], train="adapters", **BUDGETS)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    found = trainable(again)
    assert [n for n in saved if not torch.equal(found[n], saved[n])] == []
    base.close()


@pytest.mark.parametrize("init", ["olora", "pissa"])
@pytest.mark.parametrize("word", [None, "nf4"])
def test_an_initialisation_that_changes_the_base_is_refused(
    folders: dict[str | None, Path], init: str, word: str | None
) -> None:
    base = headrace.load(folders[word], train="adapters", **BUDGETS)
    with pytest.raises((HeadraceError, ValueError, RuntimeError)):
        adapted(base, init_lora_weights=init)
    base.close()


def test_an_adapter_added_later_is_refused_while_it_holds_nan(
    folders: dict[str | None, Path],
) -> None:
    base = headrace.load(folders[None], train="adapters", **BUDGETS)
    model = adapted(base)
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    with pytest.raises(HeadraceError, match="holds NaN"):
        adamw(model, lr=1e-3)
    base.close()


def test_loftq_starts_at_the_best_correction_and_trains_with_the_resident_bits(
    folders: dict[str | None, Path],
) -> None:
    base = headrace.load(folders["nf4"], train="adapters", **BUDGETS)
    streamed = adapted(base, use_rslora=True)
    headrace.correct_adapters(streamed, folders[None])

    exact = AutoModelForCausalLM.from_pretrained(folders[None], dtype="auto")
    resident = adapted(resident_base(folders, "nf4"), use_rslora=True)
    for name, layer in resident.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        wanted = exact.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
        decoded = layer.base_layer.weight.decode().float()
        u, s, v = torch.linalg.svd(wanted.detach().float() - decoded, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ v[:4]
        found = streamed.get_submodule(name)
        delta = found.get_delta_weight("default")
        assert torch.allclose(delta, best, atol=1e-5)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(found.lora_A["default"].weight)
            layer.lora_B["default"].weight.copy_(found.lora_B["default"].weight)
    ids = batches(2)
    parameters = [p for p in resident.parameters() if p.requires_grad]
    expected = resident_steps(resident, adamw(parameters, lr=1e-2), ids, micro_batch=2)
    assert streamed_steps(streamed, adamw(streamed, lr=1e-2), ids) == expected
    after, found_after = trainable(resident), trainable(streamed)
    assert [n for n in after if not torch.equal(found_after[n], after[n])] == []
    base.close()


def test_eora_lowers_the_error_that_outputs_feel(folders: dict[str | None, Path]) -> None:
    exact = AutoModelForCausalLM.from_pretrained(folders[None], dtype="auto")
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(4))
    inputs[:, ::7] *= 6
    counted: dict[int, torch.Tensor] = {}
    for width in (32, 64):
        moments = InputMoments(width)
        moments.add(inputs[:, :width])
        counted[width] = moments.matrix()

    def moments_of(name: str) -> torch.Tensor:
        return counted[exact.get_parameter(name).shape[1]]

    base = headrace.load(folders["nf4"], train="adapters", **BUDGETS)
    model = adapted(base)
    headrace.correct_adapters(model, folders[None], moments=moments_of)
    resident = resident_base(folders, "nf4")
    name = "model.layers.2.mlp.down_proj"
    wanted = exact.get_parameter(f"{name}.weight").detach().float()
    decoded = resident.get_submodule(name).weight.decode().float()
    a, b = eora(wanted, decoded, counted[64], rank=4)
    delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
    assert torch.allclose(delta, b @ a, atol=1e-6)
    x = inputs
    before = (x @ (decoded - wanted).t()).norm()
    after = (x @ (decoded + delta - wanted).t()).norm()
    assert after < 0.8 * before
    base.close()


def test_a_correction_needs_the_folder_that_was_encoded(
    folders: dict[str | None, Path], tmp_path: Path
) -> None:
    other = make_folder("gpt2", tmp_path / "other")
    base = headrace.load(folders["nf4"], train="adapters", **BUDGETS)
    model = adapted(base)
    with pytest.raises(InputError, match="GPT2LMHeadModel"):
        headrace.correct_adapters(model, other)
    base.close()
