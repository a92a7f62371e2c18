"""Every optimizer recipe drives the stream: the bits of the same recipe on a resident model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_cases import (
    batches,
    make_folder,
    resident_model,
    resident_steps,
    streamed_steps,
    streamed_weights,
)

import headrace
import headrace.optim as recipes

QUICK = ("adamw_8bit", "galore_adamw", "lion")
SLOW = (
    "adafactor",
    "adam_mini",
    "adamw_4bit",
    "adamw_fp8",
    "apollo",
    "apollo_mini",
    "fira",
    "frugal",
    "galore_adamw_8bit",
    "grass",
    "lion_8bit",
    "natural_galore",
    "q_galore",
    "sgd",
    "stable_adamw",
)


def options(recipe: Any) -> dict[str, Any]:
    """Small ranks and gaps, where the recipe has them, so that bases change within the run."""
    own = inspect.signature(recipe).parameters
    small = {"rank": 4, "update_proj_gap": 2}
    return {name: value for name, value in small.items() if name in own}


@pytest.mark.parametrize(
    ("name", "update"),
    [(n, "forward" if i % 2 else "backward") for i, n in enumerate(QUICK)]
    + [
        pytest.param(n, "forward" if i % 2 else "backward", marks=pytest.mark.slow)
        for i, n in enumerate(SLOW)
    ],
)
def test_a_streamed_recipe_equals_the_resident_one(
    tmp_path: Path, device: str, name: str, update: str
) -> None:
    if device != "cpu":
        pytest.skip("resident updates on a GPU run as torch operations, streamed ones on the host")
    recipe = getattr(recipes, name)
    folder = make_folder("qwen2", tmp_path, torch.bfloat16)
    ids = batches(4)
    resident = resident_model(folder, torch.bfloat16)
    expected = resident_steps(
        resident, recipe(resident, lr=1e-2, **options(recipe)), ids, micro_batch=2
    )
    streamed = headrace.load(
        folder,
        train="all",
        device="cpu",
        device_budget="2MB",
        host_budget="3MB",
        store=tmp_path / "store",
        micro_batch=2,
        update=update,
    )
    found = streamed_steps(streamed, recipe(streamed, lr=1e-2, **options(recipe)), ids)
    assert found == expected
    weights, reference = streamed_weights(streamed), dict(resident.named_parameters())
    assert all(torch.equal(weights[n], reference[n]) for n in weights)
    streamed.close()
