"""Sparse projectors and the param-group keys of the reference packages."""

import pytest
import torch
from torch import nn

from headrace.optim import apollo, frugal, galore_adamw, grass, memory, q_galore
from headrace.optim.base import StepContext
from headrace.optim.grass import grass as grass_brick
from headrace.optim.sign import Sign
from headrace.optim.slices import CoordinateProjector, MultinomialProjector
from headrace.optim.spec import allocate


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_multinomial_slices_are_unbiased(shape):
    """The mean over seeds of up(down(G)) is G, also where norms differ a thousandfold."""
    scales = torch.logspace(-2, 1, 10)
    gradient = noise(*shape) * (scales[:, None] if shape[0] == 10 else scales)
    projector = MultinomialProjector(4)
    slots = projector.slots(*shape)
    total = torch.zeros(shape)
    draws = 4000
    for seed in range(draws):
        states = allocate({k: s.spec for k, s in slots.items()}, "cpu")
        context = StepContext(1, {}, seed, 0, torch.zeros(shape))
        projector.refresh(gradient, states, context)
        basis = projector.basis(*shape, states, 0)
        low = projector.down(gradient, basis)
        assert low.shape == projector.low_shape(*shape)
        total += projector.up(low, basis, *shape)
    assert (total / draws - gradient).norm() < 0.05 * gradient.norm()


def test_a_zero_gradient_has_slices_too():
    projector = MultinomialProjector(4)
    states = allocate({k: s.spec for k, s in projector.slots(6, 9).items()}, "cpu")
    projector.refresh(torch.zeros(6, 9), states, StepContext(1, {}, 3, 0, torch.zeros(6, 9)))
    assert torch.isfinite(projector.basis(6, 9, states, 0)).all()


@pytest.mark.parametrize("density", [0.001, 0.25, 0.7, 1.0])
def test_coordinates_are_distinct_everywhere_and_take_no_memory(density):
    projector = CoordinateProjector(density)
    assert projector.slots(33, 57) == {}
    seen = torch.zeros(33 * 57)
    (count,) = projector.low_shape(33, 57)
    for period in range(40):
        basis = projector.basis(33, 57, {}, period)
        assert len(basis.unique()) == count
        assert torch.equal(basis, projector.basis(33, 57, {}, period))
        seen[basis] += 1
        matrix = noise(33, 57)
        again = projector.up(projector.down(matrix, basis), basis, 33, 57)
        assert torch.equal(again.view(-1)[basis], matrix.view(-1)[basis])
        assert again.count_nonzero() == count
    if density >= 0.25:
        assert seen.min() > 0


def test_frugal_on_coordinates_steps_every_element_and_keeps_its_share_of_state():
    weight = nn.Parameter(torch.zeros(64, 80))
    optimizer = frugal([weight], lr=1.0, projection="coordinates", density=0.25)
    assert sum(optimizer.memory().values()) == 8 * 64 * 80 // 4 + 8  # and when it restarted
    weight.grad = noise(64, 80)
    optimizer.step()
    # Adam's first step and signSGD's are both of size lr.
    torch.testing.assert_close(weight.abs(), torch.ones(64, 80), rtol=1e-3, atol=1e-3)


def test_uniform_and_multinomial_grass_spread_over_more_rows_than_top():
    gradient = noise(16, 32) * torch.logspace(-1, 1, 16)[:, None]
    touched = {}
    for selection in ("top", "multinomial", "uniform"):
        brick = grass_brick(Sign(), rank=4, gap=1, selection=selection)
        states = allocate({k: s.spec for k, s in brick.init_spec((16, 32)).items()}, "cpu")
        rows = set()
        for step in range(1, 40):
            context = StepContext(step, {"betas": (0.9, 0.999)}, 0, 0, gradient)
            direction = brick.update(gradient.clone(), states, context)
            rows |= set(direction.abs().sum(dim=1).nonzero().view(-1).tolist())
        touched[selection] = len(rows)
    assert touched["top"] == 4
    assert touched["multinomial"] > 6
    assert touched["uniform"] == 16


def test_keys_of_the_reference_packages_reach_the_bricks():
    weight, other = nn.Parameter(noise(128, 96)), nn.Parameter(noise(128, 96))
    parts = galore_adamw([{"params": [weight], "rank": 4}, {"params": [other]}]).memory()
    assert parts["projector"] == 4 * 96 * 4
    group = {"params": [weight], "rank": 8, "proj": "svd", "scale_type": "tensor"}
    assert apollo([group]).memory()["projector"] == 4 * 96 * 8
    assert "projector" not in apollo([{"params": [weight], "rank": 8, "proj": "random"}]).memory()
    coarse = {"params": [weight], "rank": 128, "quant_group_size": 1024, "quant_n_bit": 4}
    fine = {**coarse, "quant_group_size": 32}
    sizes = [memory([g], q_galore)["projector.scale"] for g in (coarse, fine)]
    assert sizes[0] < sizes[1]
    assert "projector" in q_galore([{**coarse, "quant": False}]).memory()
    split = [
        {"params": [weight], "is_proj_params": True, "density": 0.5, "proj_params_lr_scale": 0.5},
        {"params": [other], "is_proj_params": False},
    ]
    optimizer = frugal(split, lr=1.0)
    before = weight.detach().clone()
    weight.grad, other.grad = noise(128, 96, seed=1), noise(128, 96, seed=1)
    optimizer.step()
    assert optimizer.state[other]["exp_avg"].shape == (128, 96)
    assert optimizer.state[weight]["exp_avg"].shape == (128, 48)
    assert (weight.detach() - before).abs().max() == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        (galore_adamw, "dim", 3),
        (q_galore, "quant_n_bit", 8),
        (apollo, "proj", "fourier"),
        (frugal, "inactive_update_rule", "sgd"),
    ],
)
def test_values_that_are_not_offered_are_refused(recipe, key, value):
    with pytest.raises(ValueError, match=f"{key}={value!r} is not offered"):
        recipe([{"params": [nn.Parameter(noise(8, 8))], "rank": 4, key: value}])
    with pytest.raises(ValueError, match="selection='best' is unknown"):
        grass([nn.Parameter(noise(8, 8))], selection="best")
