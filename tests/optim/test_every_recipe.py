"""Every recipe on parameters of every kind, in several groups, saved and resumed half way."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn

from headrace import optim

HELPERS = {
    "attach_int8", "attach_loqt", "detach_int8", "detach_loqt", "for_trainer", "lora_pairs",
    "memory",
}  # fmt: skip
RECIPES = sorted({name for name in optim.__all__ if name[0].islower()} - HELPERS)
SHAPES = [(), (1,), (13,), (0,), (0, 5), (5, 0), (1, 1), (1, 7), (17, 13), (3, 5, 4), (70, 66)]


def noise(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(name, groups):
    recipe = getattr(optim, name)
    small = {"rank": 4, "update_proj_gap": 2, "update_gap": 2, "natural_history": 2, "lr": 1e-2}
    own = inspect.signature(recipe).parameters
    return recipe(groups, **{key: value for key, value in small.items() if key in own})


def parameters(dtype):
    made = [nn.Parameter(noise(shape, i, dtype)) for i, shape in enumerate(SHAPES)]
    strided = nn.Parameter(noise((12, 10), 50, dtype).t())
    lazy = nn.Parameter(noise((12, 10), 51, dtype))  # never gets a gradient
    still = nn.Parameter(noise((12, 10), 52, dtype))  # in a group whose rate is 0
    slow = nn.Parameter(noise((12, 10), 53, dtype))  # in a group of a smaller rate
    return [*made, strided, lazy], [still], [slow]


def optimizer_over(name, groups):
    fast, still, slow = groups
    return made(
        name,
        [
            {"params": fast},
            {"params": still, "lr": 0.0},
            {"params": slow, "lr": 1e-3, "weight_decay": 0.0},
        ],
    )


def step(optimizer, groups, number):
    for i, parameter in enumerate(p for group in groups for p in group):
        if parameter is not groups[0][-1]:
            parameter.grad = noise(parameter.shape, 1000 * number + i, parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_parameter_resumes_bit_exactly(name, dtype):
    straight = parameters(dtype)
    before = [[p.detach().clone() for p in group] for group in straight]
    optimizer = optimizer_over(name, straight)
    promised = sum(optimizer.memory().values())
    resumed = second = None
    for number in range(5):
        if number == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            resumed = parameters(dtype)
            for group, source in zip(resumed, straight, strict=True):
                for p, q in zip(group, source, strict=True):
                    p.data.copy_(q)
            second = optimizer_over(name, resumed)
            second.load_state_dict(torch.load(file, weights_only=True))
        step(optimizer, straight, number)
        if second is not None:
            step(second, resumed, number)
    for group, other in zip(straight, resumed, strict=True):
        for p, q in zip(group, other, strict=True):
            assert p.dtype == dtype
            assert torch.isfinite(p).all(), p.shape
            assert torch.equal(p, q), p.shape
    fast, still, slow = straight
    assert not fast[-2].is_contiguous()
    assert torch.equal(fast[-1], before[0][-1])
    assert fast[-1] not in optimizer.state
    assert torch.equal(still[0], before[1][0])
    assert not torch.equal(slow[0], before[2][0])
    for p, old in zip(fast[:-1], before[0][:-1], strict=True):
        # Stochastic rounding may leave a few elements where they are.
        assert p.numel() < 100 or not torch.equal(p, old), p.shape
    held = sum(
        tensor.nbytes
        for states in optimizer.state.values()
        for key, tensor in states.items()
        if key != "step"
    )
    missing = sum(made(name, [fast[-1]]).memory().values())
    assert held == promised - missing


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_under_closures_scalers_and_schedulers(name):
    weight = nn.Parameter(noise((12, 20), 0, torch.float32))
    optimizer = made(name, [weight])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = weight.square().mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == pytest.approx(float(before.square().mean()))
    schedule.step()
    after = weight.detach().clone()
    assert not torch.equal(after, before)
    optimizer.zero_grad()
    scaler.scale(weight.sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, after)
    optimizer.zero_grad()
    scaler.scale(weight.square().mean()).backward()
    scaler.step(optimizer)
    assert not torch.equal(weight, after)
    assert int(optimizer.state[weight]["step"]) == 2


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "apollo", "frugal", "grass"])
def test_moments_of_fp32_states_load_into_torch_adamw(name):
    """What no projection touches (here a bias) interchanges with torch in both directions."""
    bias = nn.Parameter(noise((13,), 0, torch.float32))
    theirs = nn.Parameter(bias.detach().clone())
    ours = made(name, [bias])
    ours.param_groups[0]["weight_decay"] = 0.0
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for number in range(3):
        bias.grad = noise((13,), number, torch.float32)
        ours.step()
    reference.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch keeps the tensors given
    theirs.data.copy_(bias)
    bias.grad = noise((13,), 9, torch.float32)
    theirs.grad = bias.grad.clone()
    ours.step()
    reference.step()
    torch.testing.assert_close(bias, theirs, rtol=1e-6, atol=1e-6)
    ours.load_state_dict(reference.state_dict())
    assert torch.equal(ours.state[bias]["exp_avg"], reference.state[theirs]["exp_avg"])
