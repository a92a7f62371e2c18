"""LoQT over a streamed 4-bit base: projections from the gradient, merges into the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from streaming_cases import batches, make_folder, resident_model

import headrace
from headrace import loqt
from headrace.errors import InputError
from headrace.optim import adamw
from headrace.quant.fold import default_choice
from headrace.quant.folder import EncodedFolder
from headrace.quant.model import encode_model
from headrace.quant.registry import codec_for_format

BUDGETS: dict[str, Any] = {"device": "cpu", "device_budget": "8MB", "host_budget": "2MB"}
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def adapted(model: Any, **changed: Any) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": TARGETS, **changed})
    return get_peft_model(model, config).train()


def as_batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_projection_spans_the_gradient(tmp_path: Path, micro_batch: int | None) -> None:
    folder = make_folder("llama", tmp_path / "model")
    headrace.quantize(folder, tmp_path / "nf4", format="nf4")
    ids = batches(1)[0]
    base = headrace.load(tmp_path / "nf4", train="adapters", micro_batch=micro_batch, **BUDGETS)
    model = adapted(base)
    with torch.no_grad():
        before = model(**as_batch(ids)).loss
    loqt.start(model, as_batch(ids))
    with torch.no_grad():
        assert torch.equal(model(**as_batch(ids)).loss, before)

    # The same weights, resident and trainable, tell the gradient itself.
    resident = resident_model(folder)
    encoded = EncodedFolder(tmp_path / "nf4")
    with torch.no_grad():
        for name, parameter in resident.named_parameters():
            parameter.copy_(encoded.decode(name))
    resident(**as_batch(ids)).loss.backward()
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        path = name.removeprefix("base_model.model.")
        gradient = resident.get_parameter(f"{path}.weight").grad
        fixed = layer.lora_B["default"].weight
        assert not fixed.requires_grad and layer.lora_A["default"].weight.requires_grad
        assert torch.allclose(fixed.t() @ fixed, torch.eye(4), atol=1e-5)
        caught = (fixed.t() @ gradient).norm()
        best = torch.linalg.svdvals(gradient)[:4].norm()
        assert caught > 0.75 * best  # a random range of that size catches 0.35
    base.close()


def test_rounds_of_training_and_merging_lower_the_loss(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model")
    headrace.quantize(folder, tmp_path / "round0", format="nf4")
    ids = batches(1)[0]
    base = headrace.load(tmp_path / "round0", train="adapters", **BUDGETS)
    losses = []
    for number in range(1, 3):
        model = adapted(base)
        loqt.start(model, as_batch(ids), seed=number)
        optimizer = adamw(model, lr=6e-2)
        for _ in range(6):
            loss = model(**as_batch(ids)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        # What is written is the codes of W + P B, by the codec that the base had.
        name = "model.layers.1.mlp.up_proj"
        layer = model.get_submodule(f"base_model.model.{name}")
        delta = layer.get_delta_weight("default").detach()
        before = EncodedFolder(tmp_path / f"round{number - 1}").decode(f"{name}.weight")
        base = loqt.merge(model, tmp_path / f"round{number}")
        after = EncodedFolder(tmp_path / f"round{number}")
        codec = after.records[f"{name}.weight"].codec
        assert codec == codec_for_format("nf4")
        expected = codec.decode(codec.encode(before + delta), tuple(before.shape))
        assert torch.equal(after.decode(f"{name}.weight"), expected)
    with torch.no_grad():
        final = float(base(**as_batch(ids)).loss)
    assert losses[-1] < losses[0] - 0.1
    assert final < losses[0] - 0.1
    base.close()


def test_a_round_has_the_resident_bits(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model")
    headrace.quantize(folder, tmp_path / "nf4", format="nf4")
    resident = resident_model(folder)
    encode_model(resident, default_choice(codec_for_format("nf4")))
    base = headrace.load(tmp_path / "nf4", train="adapters", **BUDGETS)
    found, ids = [], batches(4)
    for model in (adapted(resident), adapted(base)):
        loqt.start(model, as_batch(ids[0]))
        optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for batch in ids:
            loss = model(**as_batch(batch), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        factors = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
        found.append((losses, factors))
    assert found[0][0] == found[1][0]
    assert [n for n, p in found[0][1].items() if not torch.equal(p, found[1][1][n])] == []
    base.close()


def test_what_loqt_cannot_train_is_refused(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model")
    ids = batches(1)[0]
    base = headrace.load(folder, train="adapters", **BUDGETS)
    with pytest.raises(InputError, match="no LoRA layers"):
        loqt.start(base, as_batch(ids))
    with pytest.raises(InputError, match="plain LoRA"):
        loqt.start(adapted(base, use_dora=True), as_batch(ids))
    base.close()
    with pytest.raises(InputError, match="gaps"):
        loqt.merge_steps(10, first=0)


def test_gradients_that_say_nothing_are_refused(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "model")
    ids = batches(1)[0]
    base = headrace.load(folder, train="adapters", **BUDGETS)
    model = adapted(base)
    with pytest.raises(InputError, match="labels"):
        loqt.start(model, {"input_ids": ids})
    with pytest.raises(InputError, match=r"q_proj: its gradient is zero, or not finite"):
        loqt.start(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    base.close()
    base = headrace.load(folder, train="adapters", **BUDGETS)
    with pytest.raises(InputError, match=r"v_proj: the rank 20 is above 16"):
        loqt.start(adapted(base, r=20), as_batch(ids))
    base.close()
    with pytest.raises(InputError, match="gaps"):
        loqt.merge_steps(10, growth=float("nan"))
