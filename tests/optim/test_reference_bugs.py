"""Defects of published implementations, each a test that ours does not have it."""

import io
import itertools
import math

import pytest
import torch
from torch import nn

from headrace.optim import (
    adamw,
    adamw_8bit,
    apollo,
    fira,
    frugal,
    galore_adamw,
    memory,
    natural_galore,
    q_galore,
)
from headrace.optim.adam import Adam
from headrace.optim.base import StepContext
from headrace.optim.brick_rule import BrickRule
from headrace.optim.fira import Fira
from headrace.optim.galore import GaLore
from headrace.optim.projected import LazyRefresh
from headrace.optim.projector import OrthogonalProjector, RandomProjector
from headrace.optim.spec import allocate
from headrace.optim.storage import encoding_of, encodings

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(optimizer, parameter, gradient):
    parameter.grad = gradient.clone()
    optimizer.step()


def context(weight, number=1):
    return StepContext(number, HYPER, 0, 0, weight)


def test_galore_state_is_what_the_paper_says_and_nothing_hides_behind_views():
    """galore-torch holds 4.25 bytes a parameter where 0.375 are meant (fp32 gradients)."""
    weight = nn.Parameter(noise(256, 256))
    optimizer = galore_adamw([weight], rank=8, method="svd")
    step(optimizer, weight, noise(256, 256, seed=1))
    held = 0
    for name, tensor in optimizer.state[weight].items():
        if name != "step":
            held += tensor.untyped_storage().nbytes()
    assert held == memory([weight], lambda p: galore_adamw(p, rank=8))["total"]
    assert held / weight.numel() == pytest.approx(4 * 3 * 8 / 256)


def test_moments_follow_a_change_of_basis():
    """Re-projected moments are close to those that the new basis would have gathered itself."""
    projector = OrthogonalProjector(8)
    old = torch.linalg.qr(noise(32, 8))[0]
    new = old @ torch.linalg.qr(noise(8, 8, seed=5))[0]
    moments = {}
    for name, basis in (("old", old), ("new", new)):
        states = allocate({k: s.spec for k, s in Adam().init_spec((8, 48)).items()}, "cpu")
        for number in range(1, 30):
            gradient = old @ (noise(8, 48, seed=1) + noise(8, 48, seed=number + 9))
            Adam().update(basis.T @ gradient, states, context(torch.zeros(32, 48), number))
        moments[name] = states
    carried = {k: v.clone() for k, v in moments["old"].items()}
    change = projector.change(old, new, 32, 48)
    Adam().rotate(carried, (8, 48), change, context(torch.zeros(32, 48), 30))

    def direction(states):
        return (new @ (states["exp_avg"] / (states["exp_avg_sq"].sqrt() + 1e-8))).flatten()

    right = direction(moments["new"])
    assert torch.cosine_similarity(direction(carried), right, dim=0) > 0.97
    assert torch.cosine_similarity(direction(moments["old"]), right, dim=0) < 0.5


@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (5, 5), (3, 2, 4)])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_every_side_of_every_shape_works_at_any_rank(shape, side):
    """galore-torch: shape errors for reverse_std at rank >= rows, for 1-D and for 3-D."""
    for rank in (1, 4, 64):
        weight = nn.Parameter(noise(*shape))
        bias = nn.Parameter(noise(7))
        optimizer = galore_adamw(
            [{"params": [weight], "rank": rank, "proj_type": side}, {"params": [bias]}], lr=0.1
        )
        bias.grad = noise(7)
        step(optimizer, weight, noise(*shape, seed=1))
        assert torch.isfinite(weight).all()


def test_nan_gradients_skip_the_step_instead_of_crashing_the_svd():
    weight = nn.Parameter(noise(8, 8))
    optimizer = galore_adamw([weight], rank=2, method="svd")
    before = weight.detach().clone()
    step(optimizer, weight, torch.full((8, 8), math.nan))
    assert optimizer.skipped_steps == 1
    assert torch.equal(weight, before)


@pytest.mark.parametrize("recipe", [galore_adamw, q_galore, apollo, natural_galore, fira, frugal])
def test_states_hold_tensors_only_and_load_safely(recipe):
    weight = nn.Parameter(noise(8, 8))
    optimizer = recipe([weight])
    step(optimizer, weight, noise(8, 8, seed=1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in optimizer.state[weight].values())


def test_the_gradient_keeps_its_shape():
    """galore-torch's 8-bit optimizer leaves the low-rank gradient behind."""
    weight = nn.Parameter(noise(80, 80))
    optimizer = galore_adamw([weight], rank=4, states="int8")
    step(optimizer, weight, noise(80, 80, seed=1))
    assert torch.equal(weight.grad, noise(80, 80, seed=1))


def test_firas_residual_is_orthogonal_to_the_subspace():
    """fira's is G - alpha P P'G: 0.75 of G remains where nothing should (alpha 0.25)."""
    gradient = noise(16, 3) @ noise(3, 24, seed=1)
    brick = Fira(Adam(), OrthogonalProjector(3, method="svd"), scale=0.25)
    states = allocate({k: s.spec for k, s in brick.init_spec((16, 24)).items()}, "cpu")
    direction = brick.update(gradient.clone(), states, context(torch.zeros(16, 24)))
    lifted = GaLore(Adam(), OrthogonalProjector(3, method="svd"), scale=0.25)
    others = allocate({k: s.spec for k, s in lifted.init_spec((16, 24)).items()}, "cpu")
    alone = lifted.update(gradient.clone(), others, context(torch.zeros(16, 24)))
    assert (direction - alone).norm() < 1e-3 * alone.norm()


def test_random_projections_cost_no_memory_and_come_back_from_the_seed():
    projector = RandomProjector(4)
    assert projector.slots(16, 24) == {}
    first, second = (projector.basis(16, 24, {}, 77) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, projector.basis(16, 24, {}, 78))
    lengths = (RandomProjector(64).basis(512, 600, {}, 1).T @ noise(512, 600)).norm(dim=0)
    assert (lengths / noise(512, 600).norm(dim=0)).mean() == pytest.approx(1.0, abs=0.05)


def test_lazy_refresh_sees_subspaces_not_signs():
    """Q-GaLore's cosine of first singular vectors alternates between +1 and -1."""
    brick = GaLore(Adam(), OrthogonalProjector(2, int4=True), gap=2, lazy=LazyRefresh(0.5, 3))
    states = allocate({k: s.spec for k, s in brick.init_spec((16, 20)).items()}, "cpu")
    brick.init(states)
    gradient = noise(16, 2) @ noise(2, 20, seed=1)
    refreshed = []
    for number in range(1, 40):
        before = int(states["refresh_at"])
        sign = -1.0 if number % 3 else 1.0
        brick.update(sign * gradient, states, context(torch.zeros(16, 20), number))
        if int(states["refresh_at"]) != before:
            refreshed.append(number)
    gaps = [b - a for a, b in itertools.pairwise(refreshed)]
    assert gaps[:3] == [2, 2, 2]
    assert gaps[3:6] == [4, 8, 16]


def test_int4_projectors_take_half_a_byte_an_element():
    spec = OrthogonalProjector(128, int4=True).slots(256, 512)
    assert sum(slot.spec.nbytes for slot in spec.values()) <= 256 * 128 // 2 + 256 * 4


@pytest.mark.parametrize("encoding", encodings())
def test_a_lost_second_moment_never_explodes_the_update(encoding):
    """One outlier a block: torchao's 8-bit moves 708 learning rates, its FP8 846."""
    weight = torch.zeros(4096)
    rule = BrickRule(Adam(), encoding_of(encoding))
    states = allocate(rule.state_spec((4096,), torch.float32), "cpu")
    rule.init_states(weight, states)
    hyper = {**HYPER, "lr": 1.0, "betas": (0.9, 0.999)}
    last = weight.clone()
    for number in range(1, 12):
        gradient = noise(4096, seed=number) * 1e-5
        gradient[::64] = 1.0
        last.copy_(weight)
        rule.update(weight, gradient, states, step=number, hyper=hyper, seed=0, element_offset=0)
        assert (weight - last).abs().max() < (60 if encoding != "fp8_lm" else 1000), number


def test_a_float_learning_rate_may_change_between_steps():
    """torchao raises; here a tensor works as well."""
    weight = nn.Parameter(noise(80, 80))
    optimizer = adamw_8bit([weight], lr=torch.tensor(0.1))
    step(optimizer, weight, noise(80, 80, seed=1))
    optimizer.param_groups[0]["lr"] = 0.05
    step(optimizer, weight, noise(80, 80, seed=2))


@pytest.mark.parametrize("numel", [4097, 5000, 4096])
def test_sizes_that_no_block_divides_are_encoded_too(numel):
    weight = nn.Parameter(noise(numel).bfloat16())
    optimizer = adamw_8bit([weight])
    step(optimizer, weight, noise(numel, seed=1).bfloat16())
    assert optimizer.state[weight]["exp_avg.codes"].dtype == torch.uint8
    assert optimizer.state[weight]["exp_avg_sq.codes"].numel() == numel


def test_bf16_weights_keep_fp32_states_and_small_steps():
    """torch's AdamW keeps bf16 states: the weight never moves, the second moment stands still."""
    for master in ("fp32", "split"):
        weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = adamw([weight], lr=1e-5, weight_decay=0.0, master=master)
        for _ in range(400):
            step(optimizer, weight, torch.ones(8, dtype=torch.bfloat16))
        assert weight[0].item() == pytest.approx(1 - 400e-5, abs=3e-3)
        assert weight[0].item() < 1
