"""A run whose optimizer states stay in host memory still resumes with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from streaming_cases import batches, make_folder, streamed_steps, streamed_weights

import headrace
from headrace.optim import adamw

BUDGETS = {"device": "cpu", "device_budget": "50MB", "host_budget": "100MB"}


@pytest.mark.parametrize("durability", ["step", "checkpoint"])
def test_resident_states_are_in_the_store(tmp_path: Path, durability: str) -> None:
    folder = make_folder("llama", tmp_path / "model")
    ids = batches(4)

    def run(store: str, part: list[torch.Tensor], *, resume: bool) -> tuple[list[float], dict]:
        if resume:
            model = headrace.resume(tmp_path / store, **BUDGETS)
        else:
            model = headrace.load(
                folder,
                train="all",
                store=tmp_path / store,
                durability=durability,
                snapshot_every=1,
                **BUDGETS,
            )
        losses = streamed_steps(model, adamw(model, lr=1e-2), part)
        weights = streamed_weights(model)
        model.close()
        return losses, weights

    whole, expected = run("whole", ids, resume=False)
    first, _ = run("parts", ids[:2], resume=False)
    second, found = run("parts", ids[2:], resume=True)
    assert first + second == whole
    assert all(torch.equal(found[n], expected[n]) for n in expected)
