"""Optimizer states as a plain folder: what is in it, and runs that go on from it elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming_cases import batches, make_folder, streamed_steps
from transformers import AutoModelForCausalLM

import headrace
from headrace.errors import InputError
from headrace.offload.errors import SourceError
from headrace.optim import adamw, adamw_8bit, galore_adamw

RECIPES: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda model: adamw(model, lr=1e-2),
    "adamw_8bit": lambda model: adamw_8bit(model, lr=1e-2),
    "galore_adamw": lambda model: galore_adamw(model, lr=1e-2, rank=4, update_proj_gap=2),
}

IDS = batches(8, rows=2, tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("qwen2", tmp_path_factory.mktemp("model"), torch.bfloat16)


def opened(folder: Path, store: Path, host_budget: str = "16MB") -> Any:
    return headrace.load(
        folder,
        train="all",
        store=store,
        device="cpu",
        device_budget="8MB",
        host_budget=host_budget,
    )


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_run_goes_on_from_exported_weights_and_states(
    recipe: str, folder: Path, tmp_path: Path
) -> None:
    model = opened(folder, tmp_path / "first")
    optimizer = RECIPES[recipe](model)
    streamed_steps(model, optimizer, IDS[:3])
    headrace.export(model, tmp_path / "weights")
    headrace.export_states(model, tmp_path / "states")
    expected = streamed_steps(model, optimizer, IDS[3:6])
    model.close()

    # Another placement: nothing fits beside what moves, so states stream in other tiles.
    again = opened(tmp_path / "weights", tmp_path / "second", host_budget="2MB")
    optimizer = RECIPES[recipe](again)
    # A master holds bits that the exported weights lack: it must come from the folder.
    headrace.import_states(again, tmp_path / "states")
    assert streamed_steps(again, optimizer, IDS[3:6]) == expected
    again.close()


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    model = opened(folder, place / "store")
    streamed_steps(model, adamw(model, lr=1e-2), IDS[:1])
    headrace.export_states(model, place / "states")
    model.close()
    return place / "states"


def test_states_have_the_names_and_shapes_of_their_parameters(exported: Path, folder: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    states: dict[str, torch.Tensor] = {}
    for path in exported.glob("chunk-*.safetensors"):
        states.update(load_file(path))
    moments = {name.removesuffix("/exp_avg") for name in states if name.endswith("/exp_avg")}
    assert moments == weights.keys() - {"lm_head.weight"}
    for name in moments:
        assert states[f"{name}/exp_avg"].shape == weights[name].shape
        assert bool((states[f"{name}/exp_avg_sq"] >= 0).all())
    body = json.loads((exported / "states.json").read_text())
    assert body["steps"] == 1 and set(body["slot_steps"]) == moments
    assert body["param_groups"][0]["lr"] == 1e-2


def damaged(exported: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(exported, target)
    change(target)
    return target


def _drop(folder: Path) -> None:
    (folder / "chunk-00001.safetensors").unlink()


def _cut(folder: Path) -> None:
    path = folder / "chunk-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _reshape(folder: Path) -> None:
    path = folder / "chunk-00001.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].reshape(-1)[1:].clone()}, path)


def _rename(folder: Path) -> None:
    path = folder / "chunk-00001.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "other/exp_avg": torch.zeros(2)}, path)


def _no_counters(folder: Path) -> None:
    (folder / "states.json").unlink()


def _bad_counters(folder: Path) -> None:
    (folder / "states.json").write_text('{"headrace": "states", "version": 1, "steps": true}')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_drop, "lacks the state"),
        (_cut, "chunk-00001"),
        (_reshape, "this optimizer needs"),
        (_rename, "are not this optimizer's, the first 'other/exp_avg'"),
        (_no_counters, "states.json: it is missing"),
        (_bad_counters, "states.json: it is not a list of states"),
    ],
)
def test_a_damaged_folder_is_refused_and_changes_nothing(
    change: Callable[[Path], None], reason: str, exported: Path, folder: Path, tmp_path: Path
) -> None:
    bad = damaged(exported, tmp_path / "bad", change)
    model = opened(folder, tmp_path / "store")
    optimizer = adamw(model, lr=1e-2)
    before = streamed_steps(model, optimizer, IDS[:2])
    with pytest.raises(SourceError, match=reason):
        headrace.import_states(model, bad)
    assert len(before) == 2
    after = streamed_steps(model, optimizer, IDS[2:3])
    model.close()

    untouched = opened(folder, tmp_path / "untouched")
    assert streamed_steps(untouched, adamw(untouched, lr=1e-2), IDS[:3]) == before + after
    untouched.close()


def test_states_of_another_recipe_are_refused(exported: Path, folder: Path, tmp_path: Path) -> None:
    model = opened(folder, tmp_path / "store")
    adamw_8bit(model, lr=1e-2)
    with pytest.raises(SourceError, match="recipe"):
        headrace.import_states(model, exported)
    model.close()


def test_a_model_without_an_optimizer_is_refused(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, tmp_path / "store")
    with pytest.raises(InputError, match="no optimizer yet"):
        headrace.export_states(model, tmp_path / "states")
    model.close()
