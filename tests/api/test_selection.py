"""``train=``: chosen weights train through the stream with the bits of a resident run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_cases import batches, make_folder, resident_model, resident_steps, streamed_weights
from torch import Tensor

import headrace
from headrace.errors import InputError
from headrace.offload.timeline import LaneName
from headrace.optim import adamw
from headrace.selection import Named, SlimFit, Spectrum, selection_of, signal_to_noise

BUDGETS: dict[str, Any] = {"device": "cpu", "device_budget": "8MB", "host_budget": "110MB"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; layer 2 has a strong direction in its up projection, layer 1 in its query."""
    made = make_folder("llama", tmp_path_factory.mktemp("selection"))
    model = resident_model(made)
    with torch.no_grad():
        for name in ("layers.2.mlp.up_proj", "layers.1.self_attn.q_proj"):
            weight = model.get_parameter(f"model.{name}.weight")
            weight += 3 * torch.outer(torch.ones(weight.shape[0]), torch.ones(weight.shape[1]))
    model.save_pretrained(made)
    return made


def resident_with(folder: Path, names: set[str]) -> Any:
    model = resident_model(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def trained_names(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def reference_ratio(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.double())
    spread = (values.quantile(0.75) - values.quantile(0.25)) / 1.349
    rows, columns = sorted(weight.shape)
    threshold = spread * (1 + (rows / columns) ** 0.5)
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    return float(signal / noise / values[0])


def test_spectrum_measures_and_takes_the_best_of_each_kind(folder: Path, tmp_path: Path) -> None:
    model = headrace.load(folder, train="spectrum:0.25", store=tmp_path / "store", **BUDGETS)
    resident = resident_model(folder)
    ratios = signal_to_noise(model)
    kinds: dict[str, dict[str, float]] = {}
    for name, parameter in resident.named_parameters():
        if parameter.dim() == 2 and ".layers." in name:
            assert ratios[name] == pytest.approx(reference_ratio(parameter.detach()), rel=1e-9)
            kinds.setdefault(name.split(".")[-2], {})[name] = ratios[name]
    assert ratios.keys() == {name for names in kinds.values() for name in names}
    # One of the four layers for each kind of matrix.
    assert trained_names(model) == {max(names, key=names.get) for names in kinds.values()}  # type: ignore[arg-type]
    assert "model.embed_tokens.weight" not in trained_names(model)
    model.close()


@pytest.mark.parametrize("update", ["forward", "backward"])
@pytest.mark.parametrize(
    "train", ["spectrum:0.25", "regex:layers\\.[13]\\.mlp|norm", ["lm_head.weight"]]
)
def test_a_selection_trains_with_the_resident_bits(
    folder: Path, tmp_path: Path, train: Any, update: str
) -> None:
    ids = batches(3)
    model = headrace.load(
        folder, train=train, store=tmp_path / "store", update=update, micro_batch=2, **BUDGETS
    )
    names = trained_names(model)
    assert 0 < len(names) < len(list(model.named_parameters()))
    resident = resident_with(folder, names)
    chosen = [p for p in resident.parameters() if p.requires_grad]
    expected = resident_steps(resident, adamw(chosen, lr=1e-2), ids, micro_batch=2)
    optimizer = adamw(model, lr=1e-2)
    written = headrace.statistics(model).lanes[LaneName.DISK_WRITE].nbytes
    losses = []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    found = streamed_weights(model)
    assert losses == expected
    state = dict(resident.named_parameters())
    assert [n for n, t in found.items() if not torch.equal(t, state[n].detach())] == []
    # Chunks without a chosen weight are never written.
    per_step = (headrace.statistics(model).lanes[LaneName.DISK_WRITE].nbytes - written) / len(ids)
    chunks = model._runtime.engine.chunks  # type: ignore[attr-defined]
    touched = [c for c, b in model._runtime.bound.items() if names & b.parameters.keys()]  # type: ignore[attr-defined]
    weights = sum(chunks[c].layout.nbytes for c in touched)
    states = sum(8 * p.numel() for n, p in resident.named_parameters() if n in names)
    assert per_step <= 1.1 * (weights + states) + 4096 * 4 * len(touched)
    model.close()


def test_slimfit_rests_what_moved_least_and_keeps_the_resident_bits(
    folder: Path, tmp_path: Path
) -> None:
    ids = batches(6)
    selection = SlimFit(frozen=0.5, every=2, samples=10**9)
    model = headrace.load(
        folder, train=selection, store=tmp_path / "store", micro_batch=2, **BUDGETS
    )
    matrices = trained_names(model)
    optimizer = adamw(model, lr=1e-2)
    sets, losses = [matrices], []
    snapshots = [streamed_weights(model)]
    for batch in ids:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        selection.after_step(model)  # type: ignore[arg-type]
        sets.append(trained_names(model))
        snapshots.append(streamed_weights(model))
    assert sets[0] == sets[1] == matrices and sets[2] != matrices
    assert all(len(names) == len(matrices) - len(matrices) // 2 for names in sets[2:])

    def moved(name: str) -> float:
        change = snapshots[2][name] - snapshots[0][name]
        return float(change.norm() / snapshots[0][name].norm())

    resting = matrices - sets[2]
    assert max(map(moved, resting)) <= min(map(moved, sets[2]))

    resident = resident_with(folder, matrices)
    chosen = [p for p in resident.parameters() if p.requires_grad]

    def follow(step: int) -> None:
        for name, parameter in resident.named_parameters():
            parameter.requires_grad_(name in sets[step + 1])

    expected = resident_steps(resident, adamw(chosen, lr=1e-2), ids, micro_batch=2, each=follow)
    assert losses == expected
    state = dict(resident.named_parameters())
    found = snapshots[-1]
    assert [n for n, t in found.items() if not torch.equal(t, state[n].detach())] == []
    model.close()


def test_a_selected_run_resumes_with_its_selection(folder: Path, tmp_path: Path) -> None:
    model = headrace.load(folder, train="spectrum:0.25", store=tmp_path / "store", **BUDGETS)
    names = trained_names(model)
    optimizer = adamw(model, lr=1e-2)
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    before = streamed_weights(model)
    model.close()
    again = headrace.resume(tmp_path / "store", **BUDGETS)
    assert trained_names(again) == names
    adamw(again, lr=1e-2)
    found = streamed_weights(again)
    assert [n for n, t in found.items() if not torch.equal(t, before[n])] == []
    again.close()


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("everything", "spectrum:SHARE"),
        ("spectrum:much", "give a share"),
        ("spectrum:0", "more than 0"),
        ("slimfit:1.5", "at most 1"),
        ("regex:[", "no regular expression"),
        ("regex:nothing_like_it", "no parameter of LlamaForCausalLM"),
        (["model.norm.bias"], "no parameter of LlamaForCausalLM"),
        ("slimfit:1", "nothing would be left"),
        ([], "names no parameter at all"),
        (["model.norm.weight", 3], "list of parameter names"),
        (None, "list of parameter names"),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    folder: Path, tmp_path: Path, train: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        headrace.load(folder, train=train, store=tmp_path / "store", **BUDGETS)


def test_selections_as_text() -> None:
    assert selection_of("spectrum") == Spectrum()
    assert selection_of("slimfit:0.25") == SlimFit(0.25)
    for train in (Spectrum(0.5), Named(("a", "b"), exact=True), Named(("a.*",))):
        assert selection_of(str(train)) == train


def test_a_selection_needs_weights_that_can_be_trained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="store="):
        headrace.load(folder, train="spectrum:0.5", **BUDGETS)
    headrace.quantize(folder, tmp_path / "nf4")
    with pytest.raises(InputError, match="encoded weights"):
        headrace.load(tmp_path / "nf4", train="spectrum:0.5", store=tmp_path / "store", **BUDGETS)
    options = headrace.TuneOptions(
        model=str(folder), data=tmp_path / "data.jsonl", out=tmp_path / "out", train="spectrum"
    )
    with pytest.raises(InputError, match="--method full"):
        options.check()


def test_one_slimfit_may_choose_for_two_models(folder: Path, tmp_path: Path) -> None:
    selection = SlimFit(0.5, every=1)
    selection._moved["a matrix of another model"] = 0.0
    selection._steps = 7
    model = headrace.load(folder, train=selection, store=tmp_path / "store", **BUDGETS)
    chosen = {name for name, p in model.named_parameters() if p.requires_grad}
    selection.after_step(model)
    left = {name for name, p in model.named_parameters() if p.requires_grad}
    assert left < chosen and 2 * len(left) == len(chosen)
    model.close()
