"""LoRAM: adapters trained on a pruned base, used on the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from streaming_cases import batches, make_folder, resident_model, streamed_steps
from transformers import AutoModelForCausalLM

import headrace
from headrace.cli import main
from headrace.errors import InputError
from headrace.optim import adamw

BUDGETS: dict[str, Any] = {"device": "cpu", "device_budget": "8MB", "host_budget": "1MB"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def idle_half(folder: Path) -> dict[str, list[int]]:
    """Make half of the channels and heads of every layer do nothing; what works, by module."""
    model = resident_model(folder)
    generator = torch.Generator().manual_seed(2)
    works: dict[str, list[int]] = {}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            channels = torch.randperm(64, generator=generator)
            layer.mlp.down_proj.weight[:, channels[32:]] = 0
            works[f"model.layers.{number}.mlp"] = sorted(channels[:32].tolist())
            # Two groups of two heads of width 8.
            group = int(torch.randint(0, 2, (), generator=generator))
            layer.self_attn.o_proj.weight[:, 16 * (1 - group) : 16 * (2 - group)] = 0
            works[f"model.layers.{number}.self_attn"] = [group]
    model.save_pretrained(folder)
    return works


def trained(base: Any, out: Path, *, steps: int = 3) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)).train()
    streamed_steps(model, adamw(model, lr=2e-2), batches(steps))
    model.eval()
    factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(out, state_dict=factors, save_embedding_layers=False)
    return model


@torch.no_grad()
def loss_of(model: Any) -> float:
    ids = batches(1)[0]
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("word", [None, "nf4"])
def test_what_is_learnt_on_the_pruned_model_holds_for_the_whole(
    tmp_path: Path, family: str, word: str | None
) -> None:
    folder = make_folder(family, tmp_path / "model")
    works = idle_half(folder)
    headrace.prune(folder, tmp_path / "half", keep=0.5, **_budgets())
    kept = json.loads((tmp_path / "half" / "kept.json").read_text())["kept"]
    assert kept == works
    # What does nothing can go: the function is the same.
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    assert half.config.intermediate_size == 32 and half.config.num_key_value_heads == 1
    assert loss_of(half) == pytest.approx(loss_of(whole), rel=1e-6)

    small = tmp_path / "half"
    if word is not None:  # the small base may be encoded as well
        headrace.quantize(small, tmp_path / "half-nf4", format=word)
        (tmp_path / "half-nf4" / "kept.json").write_text((small / "kept.json").read_text())
        small = tmp_path / "half-nf4"
    base = headrace.load(small, train="adapters", **BUDGETS)
    tuned = trained(base, tmp_path / "tuned")
    learnt = loss_of(tuned)
    base.close()
    headrace.recover(tmp_path / "tuned", tmp_path / "whole")
    base = headrace.load(folder, train="none", **BUDGETS)
    recovered = PeftModel.from_pretrained(base, str(tmp_path / "whole"))
    found = loss_of(recovered)
    before = loss_of(whole)
    assert learnt < before - 0.02
    if word is None:
        assert found == pytest.approx(learnt, rel=1e-5)
    else:  # learnt around an encoding's error, used on exact weights
        assert found < before - 0.01
    base.close()
    resident = PeftModel.from_pretrained(whole, str(tmp_path / "whole")).eval()
    assert loss_of(resident) == found


def _budgets() -> dict[str, Any]:
    return {"device_budget": "8MB", "host_budget": "1MB"}


def test_nothing_is_added_to_what_was_dropped(tmp_path: Path) -> None:
    folder = make_folder("qwen2", tmp_path / "model")  # biases, a tied head
    headrace.prune(folder, tmp_path / "small", keep=0.75, **_budgets())
    record = json.loads((tmp_path / "small" / "kept.json").read_text())
    whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").state_dict()
    channels = record["kept"]["model.layers.1.mlp"]
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(small[name], whole[name][channels])
    assert torch.equal(
        small["model.layers.1.mlp.down_proj.weight"],
        whole["model.layers.1.mlp.down_proj.weight"][:, channels],
    )
    base = headrace.load(tmp_path / "small", train="adapters", **BUDGETS)
    trained(base, tmp_path / "tuned", steps=2)
    base.close()
    headrace.recover(tmp_path / "tuned", tmp_path / "whole")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "whole")
    )
    dropped = sorted(set(range(64)) - set(channels))
    layer = model.base_model.model.model.layers[1].mlp
    assert float(layer.up_proj.get_delta_weight("default")[dropped].abs().max()) == 0
    assert float(layer.down_proj.get_delta_weight("default")[:, dropped].abs().max()) == 0
    assert float(layer.up_proj.get_delta_weight("default")[channels].abs().min(1).values.max()) > 0


def test_keeping_everything_changes_nothing(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model", torch.bfloat16)
    assert (
        main(
            [
                "prune",
                str(folder),
                str(tmp_path / "same"),
                "--keep",
                "1",
                "--device-budget",
                "8MB",
                "--host-budget",
                "1MB",
            ]
        )
        == 0
    )
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype="auto").state_dict()
    assert [n for n in whole if not torch.equal(whole[n], same[n])] == []


def test_what_cannot_be_pruned_or_recovered_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family, said in (("gpt2", "does not say its sizes"), ("mixtral", "has the matrices")):
        folder = make_folder(family, tmp_path / family)
        with pytest.raises(InputError, match=said):
            headrace.prune(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = make_folder("llama", tmp_path / "llama")
    assert main(["prune", str(folder), str(tmp_path / "out"), "--keep", "0"]) == 2
    base = headrace.load(folder, train="adapters", **BUDGETS)
    trained(base, tmp_path / "tuned", steps=1)
    base.close()
    assert main(["recover", str(tmp_path / "tuned"), "--out", str(tmp_path / "whole")]) == 2
    assert "kept.json" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["empty", "no base", "gone", "short", "beyond", "silent"])
def test_a_damaged_record_of_what_was_kept_is_refused(tmp_path: Path, damage: str) -> None:
    folder = make_folder("llama", tmp_path / "model")
    headrace.prune(folder, tmp_path / "small", keep=0.5, **_budgets())
    base = headrace.load(tmp_path / "small", train="adapters", **BUDGETS)
    trained(base, tmp_path / "tuned", steps=1)
    base.close()
    path = tmp_path / "small" / "kept.json"
    record = json.loads(path.read_text())
    kept: dict[str, list[int]] = record["kept"]
    changed, said = {
        "empty": ({}, "damaged"),
        "no base": ({**record, "base": 3}, "damaged"),
        "gone": ({**record, "base": str(tmp_path / "gone")}, "no such model folder"),
        "short": ({**record, "kept": {n: [*rows, 0] for n, rows in kept.items()}}, "together"),
        "beyond": (
            {**record, "kept": {n: [*rows[1:], 10**6] for n, rows in kept.items()}},
            "together",
        ),
        "silent": ({**record, "kept": {}}, "does not say what"),
    }[damage]
    path.write_text(json.dumps(changed))
    with pytest.raises(InputError, match=said):
        headrace.recover(tmp_path / "tuned", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
