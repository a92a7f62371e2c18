"""Stepping inside backward: the same numbers, and refusals where something would be lost."""

import pytest
import torch
from torch import nn

from headrace.optim import StepInBackward, adamw, galore_adamw


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("recipe", [adamw, lambda m: galore_adamw(m, rank=2, update_proj_gap=2)])
def test_the_same_bits_as_stepping_after_backward(recipe):
    ours, theirs = model(), model()
    mine, plain = recipe(ours), recipe(theirs)
    schedule = torch.optim.lr_scheduler.StepLR(mine, 1, 0.5)
    other = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    with StepInBackward(mine):
        for step in range(4):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            ours(x).square().mean().backward()
            assert all(p.grad is None for p in ours.parameters())
            mine.step()
            schedule.step()
            theirs(x).square().mean().backward()
            plain.step()
            plain.zero_grad()
            other.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    ours(torch.ones(1, 6)).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_what_would_be_lost_is_refused():
    one = model()
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 needs all gradients"):
        StepInBackward(adamw(one, max_grad_norm=1.0))
    with StepInBackward(adamw(one)):
        one(torch.ones(1, 6)).sum().backward()
        with pytest.raises(ValueError, match="second gradient"):
            one(torch.ones(1, 6)).sum().backward()
    with (
        StepInBackward(adamw(one)),
        pytest.raises(ValueError, match=r"'2\.bias' holds inf or NaN|'2\.weight' holds inf"),
    ):
        (one(torch.ones(1, 6)).sum() * torch.inf).backward()
