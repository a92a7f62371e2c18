"""The resident step against references written out by hand, and the log against the live run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from headrace.offload.errors import StoreFormatError
from headrace.zo.basis import measure_basis
from headrace.zo.common_right import CommonRight
from headrace.zo.control import Clip, RmsScale
from headrace.zo.dense import Dense
from headrace.zo.factored import FactoredTrace
from headrace.zo.log import read_log
from headrace.zo.lowrank import LowRank
from headrace.zo.noise import Kind, assign_streams, reference_noise, step_seed
from headrace.zo.objective import causal_lm_losses
from headrace.zo.one_sided import OneSided
from headrace.zo.per_example import PerExample
from headrace.zo.perturb import Rounding
from headrace.zo.random_subspace import CoreAdam, RandomSubspace
from headrace.zo.replay import fingerprint, replay
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.two_point import TwoPoint


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).to(dtype).eval()


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 64, (3, 12), generator=generator)
        made.append({"input_ids": ids, "labels": ids})
    return made


def loss_of(batch: dict[str, Tensor]) -> Callable[[nn.Module], Any]:
    return lambda model: model(**batch).loss


def run(zo: ZOStep, data: list[dict[str, Tensor]], first: int = 0) -> list[tuple[float, ...]]:
    return [
        zo.step(loss_of(batch), batch=index).record.losses
        for index, batch in enumerate(data[first:], first)
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_mezo_equals_the_algorithm_written_out(dtype: torch.dtype, tied: bool, count: int) -> None:
    lr, eps, decay = 1e-3, 1e-2, 0.1
    model, twin = llama(dtype, tied), llama(dtype, tied)
    zo = ZOStep(
        model, ZOSettings(lr=lr, eps=eps, seed=5, estimator=TwoPoint(count), weight_decay=decay)
    )
    streams = assign_streams(name for name, _ in twin.named_parameters())

    def z(name: str, p: Tensor, seed: int, direction: int) -> Tensor:
        return reference_noise(
            Kind.GAUSSIAN,
            seed=seed,
            stream=streams[name],
            direction=direction,
            start=0,
            count=p.numel(),
        ).view(p.shape)

    data = batches(4)
    losses = run(zo, data)
    for step, batch in enumerate(data):
        seed = step_seed(5, step)
        stored = weights_of(twin)
        found = []
        for direction in range(count):
            for sign in (1, -1):
                with torch.no_grad():
                    for name, p in twin.named_parameters():
                        moved = stored[name].float() + z(name, p, seed, direction) * float(
                            np.float32(sign * eps)
                        )
                        p.copy_(moved.to(dtype))
                    found.append(float(twin(**batch).loss))
        assert tuple(found) == losses[step]
        with torch.no_grad():
            for name, p in twin.named_parameters():
                total = torch.zeros(p.shape)
                for direction in range(count):
                    plus, minus = found[2 * direction : 2 * direction + 2]
                    grad = float(np.float32((plus - minus) / (2 * eps)))
                    scale = float(np.float32(lr * grad / count))
                    total = total + z(name, p, seed, direction) * scale
                keep = 1.0 if "norm" in name else float(np.float32(1 - lr * decay))
                p.copy_((stored[name].float() * keep - total).to(dtype))
    for name, p in twin.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name]), name


METHODS = {
    "mezo": ZOSettings(lr=1e-3, seed=3),
    "dense sr": ZOSettings(lr=1e-3, directions=Dense(Kind.RADEMACHER, Rounding.STOCHASTIC)),
    "population": ZOSettings(lr=1e-3, estimator=OneSided(3), directions=Dense(Kind.IRWIN_HALL)),
    "low rank": ZOSettings(
        lr=1e-3, estimator=OneSided(4), directions=LowRank(4, steps=3), controls=(RmsScale(),)
    ),
    "low rank 2": ZOSettings(
        lr=1e-3, estimator=TwoPoint(2), directions=LowRank(2, rank=2, steps=4)
    ),
    "common right": ZOSettings(
        lr=1e-3, estimator=OneSided(4), directions=CommonRight(4, rank=2, steps=3)
    ),
    "measured": ZOSettings(
        lr=1e-3,
        estimator=OneSided(4),
        # GPT-2's transposed weights are not in it and keep random right factors.
        directions=CommonRight(4, steps=3, basis=measure_basis(llama(), batches(2), rank=2)),
    ),
    "subspace": ZOSettings(
        lr=1e-3, estimator=OneSided(4), directions=RandomSubspace(4, 6, 3), controls=(Clip(50.0),)
    ),
    "subspace adam": ZOSettings(
        lr=1e-3, estimator=OneSided(4), directions=RandomSubspace(4, 6, 3, CoreAdam())
    ),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_replay_and_resume_give_the_live_bits(method: str, tmp_path: Path) -> None:
    settings = METHODS[method]
    data = batches(8)
    live, half = llama(torch.bfloat16), llama(torch.bfloat16)
    zo = ZOStep(live, settings, log=tmp_path / "live.zolog")
    losses = run(zo, data)
    zo.close()

    first = ZOStep(half, settings, log=tmp_path / "half.zolog")
    run(first, data[:5])
    first.close()
    fresh = llama(torch.bfloat16)
    second = ZOStep.resume(fresh, tmp_path / "half.zolog")
    assert second.next_step == 5
    assert run(second, data, 5) == losses[5:]
    second.close()
    assert (tmp_path / "half.zolog").read_bytes() == (tmp_path / "live.zolog").read_bytes()
    for name, p in live.named_parameters():
        assert torch.equal(p, dict(fresh.named_parameters())[name]), name

    header, records = read_log(tmp_path / "live.zolog")
    assert ZOSettings.from_json(header.settings["method"]) == settings
    base = weights_of(llama(torch.bfloat16))
    trained = {name: base[name] for name in header.settings["trained"]}
    assert fingerprint(trained.items()) == header.base
    rebuilt = dict(replay(base.items(), header, records))
    changed = 0
    for name, tensor in zo.export():
        assert torch.equal(tensor, rebuilt[name]), name
        changed += not torch.equal(tensor, dict(llama(torch.bfloat16).named_parameters())[name])
    assert changed


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "method", ["low rank", "low rank 2", "common right", "measured", "subspace", "subspace adam"]
)
@pytest.mark.parametrize("embeddings", [False, True])
def test_factored_forward_equals_dense_weights(
    make: Callable[[torch.dtype], nn.Module], method: str, embeddings: bool
) -> None:
    """Shared forward, member-by-member forward, and explicit dense weights agree in fp64."""
    settings = METHODS[method]
    model = make(torch.float64)
    select = (lambda name, p: p.dim() == 2 and "wpe" not in name) if embeddings else None
    zo = ZOStep(model, settings, select=select)
    assert embeddings == any("embed" in n or "wte" in n for n in zo.trained_names)
    for batch in batches(5):
        step, seed = zo.next_step, step_seed(settings.seed, zo.next_step)
        members = settings.estimator.members()
        with torch.no_grad(), zo.evaluating(members, seed):
            together = causal_lm_losses(model, batch, len(members))
        stored = weights_of(model)
        explicit = []
        for member in members:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name not in zo.trained_names:
                        continue
                    trace = zo._traces[name]
                    assert isinstance(trace, FactoredTrace)
                    window = trace.window(step)
                    left = window.directions(seed)[member.direction].double()
                    left *= member.sign * settings.eps
                    if window.left is not None:
                        left += window.left
                    p.copy_(stored[name] + left @ window.right.double().T)
                explicit.append(causal_lm_losses(model, batch, 1)[0])
                for name, p in model.named_parameters():
                    p.copy_(stored[name])
        assert together == pytest.approx(explicit, abs=1e-6)
        result = zo.step_together(lambda m, n, batch=batch: causal_lm_losses(m, batch, n))
        assert list(result.record.losses) == together


def test_rows_of_a_batch_meet_directions_of_their_own() -> None:
    """Every row alone, under explicit dense weights, in the order copies, then rows."""
    settings = ZOSettings(lr=1e-2, estimator=PerExample(2, 3), directions=CommonRight(6, steps=3))
    model = llama(torch.float64)
    zo = ZOStep(model, settings)
    for batch in batches(4):
        step, seed = zo.next_step, step_seed(settings.seed, zo.next_step)
        stored = weights_of(model)
        explicit = []
        for member in range(6):
            with torch.no_grad():
                for name in zo.trained_names:
                    trace = zo._traces[name]
                    assert isinstance(trace, FactoredTrace)
                    window = trace.window(step)
                    left = window.directions(seed)[member].double() * settings.eps
                    if window.left is not None:
                        left += window.left
                    weight = model.get_parameter(name)
                    weight.copy_(stored[name] + left @ window.right.double().T)
                row = {name: rows[member % 3 : member % 3 + 1] for name, rows in batch.items()}
                explicit.append(causal_lm_losses(model, row, 1)[0])
                model.load_state_dict(stored)
        result = zo.step_together(
            lambda m, n, batch=batch: causal_lm_losses(m, batch, n, parts=3), batch=step
        )
        assert list(result.record.losses) == pytest.approx(explicit, abs=1e-6)


def test_a_row_without_labels_moves_nothing() -> None:
    settings = ZOSettings(estimator=PerExample(2, 3), directions=CommonRight(6))
    zo = ZOStep(llama(), settings)
    batch = batches(1)[0]
    labels = batch["labels"].clone()
    labels[1] = -100
    part = {**batch, "labels": labels}
    record = zo.step_together(lambda m, n: causal_lm_losses(m, part, n, parts=3)).record
    assert [grad != 0 for grad in record.grads] == [True, False, True] * 2


def test_parts_need_a_loss_each_and_rows_to_split() -> None:
    zo = ZOStep(llama(), ZOSettings(estimator=PerExample(2, 3), directions=CommonRight(6)))
    batch = batches(1)[0]
    with pytest.raises(ValueError, match="call step_together"):
        zo.step(loss_of(batch))
    with pytest.raises(ValueError, match="2 copies of 3 parts"):
        zo.step_together(lambda m, n: causal_lm_losses(m, batch, n))
    two = {name: rows[:2] for name, rows in batch.items()}
    with pytest.raises(ValueError, match="2 rows does not split into 3"):
        zo.step_together(lambda m, n: causal_lm_losses(m, two, n, parts=3))
    assert zo.next_step == 0


def test_window_is_merged_lazily_and_exactly() -> None:
    model = llama()
    zo = ZOStep(model, dataclasses.replace(METHODS["low rank"], lr=1e-2))
    name = "model.layers.0.mlp.up_proj.weight"
    start = weights_of(model)[name]
    seen = []
    for batch in batches(6):
        zo.step(loss_of(batch))
        seen.append(weights_of(model)[name])
    assert torch.equal(seen[0], start) and torch.equal(seen[1], start)
    assert not torch.equal(seen[2], start)
    assert torch.equal(seen[3], seen[2]) and torch.equal(seen[4], seen[2])
    assert not torch.equal(seen[5], seen[2])


def test_current_evaluates_pending_updates() -> None:
    model = llama()
    zo = ZOStep(model, dataclasses.replace(METHODS["low rank"], lr=1e-2))
    batch = batches(1)[0]
    zo.step(loss_of(batch))
    with zo.current():
        pending = float(model(**batch).loss)
    merged = llama()
    merged.load_state_dict(dict(zo.export()), strict=False)
    with torch.no_grad():
        assert float(merged(**batch).loss) == pytest.approx(pending, abs=1e-6)
        assert float(model(**batch).loss) != pytest.approx(pending, abs=1e-6)


@pytest.mark.parametrize("method", ["mezo", "low rank", "subspace adam"])
def test_training_lowers_the_loss(method: str) -> None:
    rate = {"mezo": 2e-4, "low rank": 2e-3, "subspace adam": 3e-3}[method]
    settings = dataclasses.replace(METHODS[method], lr=rate)
    model = llama()
    zo = ZOStep(model, settings)
    batch = batches(1)[0]
    with zo.current():
        before = float(model(**batch).loss)
    for _ in range(60):
        zo.step(loss_of(batch))
    with zo.current():
        assert float(model(**batch).loss) < before - 0.02


def test_an_objective_without_gradient_is_fine() -> None:
    model = llama()
    zo = ZOStep(model, ZOSettings(lr=1e-2, eps=1e-2, estimator=OneSided(6)))
    ids = batches(1)[0]["input_ids"]

    def errors(model: nn.Module) -> int:
        return int((model(input_ids=ids).logits[:, :-1].argmax(-1) != ids[:, 1:]).sum())

    record = zo.step(errors).record
    assert all(loss == int(loss) for loss in record.losses)
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())


def test_a_bad_loss_skips_the_step_whole(tmp_path: Path) -> None:
    model = llama()
    before = weights_of(model)
    zo = ZOStep(model, METHODS["mezo"], log=tmp_path / "log")
    assert zo.step(lambda _: float("nan")).record.skipped
    assert zo.skipped_steps == 1 and zo.next_step == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    zo.close()
    resumed = ZOStep.resume(llama(), tmp_path / "log")
    assert (resumed.next_step, resumed.skipped_steps) == (1, 1)
    resumed.close()


def test_an_error_in_the_objective_leaves_the_weights() -> None:
    model = llama()
    before = weights_of(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    zo = ZOStep(model, METHODS["mezo"])

    def fails(_: nn.Module) -> float:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        zo.step(fails)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert zo.next_step == 0


def test_another_base_is_refused(tmp_path: Path) -> None:
    ZOStep(llama(), METHODS["mezo"], log=tmp_path / "log").close()
    other = llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(StoreFormatError, match="belongs to base"):
        ZOStep.resume(other, tmp_path / "log")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="same number"):
        ZOSettings(estimator=OneSided(4), directions=LowRank(5))
    with pytest.raises(ValueError, match="no weight decay"):
        ZOSettings(directions=LowRank(1), weight_decay=0.1)
    with pytest.raises(ValueError, match="one member at a time"):
        ZOStep(llama(), METHODS["mezo"]).step_together(lambda m, n: [0.0] * n)
    with pytest.raises(ValueError, match="no parameter that Dense can train"):
        ZOStep(llama().requires_grad_(False), METHODS["mezo"])
