"""Every family, every setting: a streamed run equals the resident run to the last bit.

The default run takes settings that cover every allowed pair of choices; ``-m slow`` adds, for
each family, every combination of method, update mode, micro-batches and placement, with
precision, clipping and frozen parts taken in turn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_cases import FAMILIES, batches
from streaming_runs import (
    ROWS,
    TOKENS,
    Setting,
    budgets_for,
    differences,
    folder_of,
    load_streamed,
    resident_run,
    resident_step,
    streamed_run,
)
from transformers import AutoModelForCausalLM

from headrace.offload.timeline import LaneName
from headrace.optim import adamw

CHOICES: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    "method": ("full", "lora"),
    "update": ("forward", "backward"),
    "micro_batches": (1, 3, 4),
    "placement": ("big", "host", "disk"),
    "precision": ("fp32", "bf16-fp32", "bf16-split", "bf16-sr"),
    "clipping": ("none", "optimizer", "model"),
    "frozen": ("none", "embedding", "layers", "vectors"),
}


def allowed(setting: Setting) -> bool:
    """Whether a combination means something."""
    if setting.method == "lora":
        # Adapters are ordinary resident parameters: the stream updates nothing.
        return (
            setting.update == "forward"
            and setting.precision in ("fp32", "bf16-fp32")
            and setting.frozen == "none"
        )
    return setting.update == "forward" or setting.clipping == "none"


def pairs(setting: Setting) -> set[tuple[Any, ...]]:
    """Every pair of choices that the setting contains."""
    made = [(name, getattr(setting, name)) for name in CHOICES]
    return set(itertools.combinations(made, 2))


def a_setting(rng: random.Random, fixed: dict[str, Any]) -> Setting:
    """A random allowed setting that contains ``fixed``."""
    while True:
        drawn = {name: rng.choice(values) for name, values in CHOICES.items()}
        setting = Setting(**{**drawn, **fixed})
        if allowed(setting):
            return setting


def possible_pairs() -> Iterator[tuple[Any, ...]]:
    """Pairs of choices that some allowed setting contains."""
    for (a, values_a), (b, values_b) in itertools.combinations(CHOICES.items(), 2):
        for x, y in itertools.product(values_a, values_b):
            partial = Setting(**{"family": "llama", "update": "forward", a: x, b: y})
            # Everything not fixed stands at a choice that goes with every other.
            if allowed(partial):
                yield ((a, x), (b, y))


def pairwise() -> list[Setting]:
    """Settings that together contain every possible pair."""
    rng = random.Random(2)
    todo = dict.fromkeys(possible_pairs())
    chosen: list[Setting] = []
    while todo:
        fixed = dict(next(iter(todo)))
        best = max(
            (a_setting(rng, fixed) for _ in range(40)), key=lambda s: len(pairs(s) & todo.keys())
        )
        chosen.append(best)
        for pair in pairs(best):
            todo.pop(pair, None)
    return chosen


def cross_product() -> list[Setting]:
    """Every family x method x update x micro-batches x placement, the rest in turn."""
    chosen = []
    core = ("family", "method", "update", "micro_batches", "placement")
    rng = random.Random(3)
    for values in itertools.product(*(CHOICES[name] for name in core)):
        fixed = dict(zip(core, values, strict=True))
        if fixed["method"] == "lora" and fixed["update"] == "backward":
            continue
        chosen.append(a_setting(rng, fixed))
    return chosen


PAIRWISE = pairwise()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny models are made, once each."""
    return tmp_path_factory.mktemp("models")


def check(setting: Setting, models: Path, device: str, store: Path) -> None:
    """Train both ways and compare; the bytes must also have moved as the placement says."""
    folder = folder_of(setting, models)
    resident = resident_run(setting, folder, device)
    budgets = budgets_for(setting, folder, device, store.parent / "probe")
    streamed = streamed_run(setting, folder, device, store, budgets)
    assert streamed.parameters
    assert differences(streamed, resident) == []
    assert streamed.statistics is not None
    for budget in streamed.statistics.budgets.values():
        assert 0 < budget.peak_bytes <= budget.limit_bytes
    step = streamed.statistics.last_step
    assert step is not None
    if setting.placement == "disk":
        assert step.lanes[LaneName.DISK_READ].nbytes > 0
    else:
        assert step.lanes[LaneName.DISK_READ].nbytes == 0
    if setting.placement != "big":
        assert step.lanes[LaneName.H2D].nbytes > 0


def test_selection_covers_every_pair() -> None:
    covered = set().union(*(pairs(s) for s in PAIRWISE))
    assert set(possible_pairs()) <= covered
    for family in FAMILIES:
        assert sum(s.family == family for s in PAIRWISE) >= 2


@pytest.mark.parametrize("setting", PAIRWISE, ids=str)
def test_same_bits(setting: Setting, models: Path, device: str, tmp_path: Path) -> None:
    check(setting, models, device, tmp_path / "store")


@pytest.mark.slow
@pytest.mark.parametrize("setting", cross_product(), ids=str)
def test_same_bits_everywhere(setting: Setting, models: Path, device: str, tmp_path: Path) -> None:
    check(setting, models, device, tmp_path / "store")


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_torch_adamw(family: str, models: Path, device: str, tmp_path: Path) -> None:
    """fp32 against torch's own fused kernel, which rounds in another order."""
    setting = Setting(family, placement="disk")
    folder = folder_of(setting, models)
    # A key's bias has no gradient but rounding noise; a larger eps keeps Adam from scaling it up.
    hyper: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5}
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = reference.to(device).train()
    theirs = torch.optim.AdamW(reference.parameters(), fused=True, **hyper)
    budgets = budgets_for(setting, folder, device, tmp_path / "probe")
    model = load_streamed(folder, setting, device, tmp_path / "store", budgets)
    ours = adamw(model, **hyper)
    for batch in batches(5, rows=ROWS, tokens=TOKENS):
        expected = resident_step(reference, batch.to(device), setting.micro_batches)
        theirs.step()
        theirs.zero_grad()
        loss = model(input_ids=batch.to(device), labels=batch.to(device)).loss
        loss.backward()
        ours.step()
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    named = dict(reference.named_parameters())
    for _, tensors in model.chunk_tensors():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, named[name].detach().cpu(), rtol=1e-5, atol=1e-7)
    model.close()
