"""The fused AdamW: against torch, against torch operations, across tilings and master formats."""

import math
from itertools import pairwise

import pytest
import torch

from headrace.optim import AdamW, adamw
from headrace.optim.adam import Adam
from headrace.optim.brick_rule import BrickRule
from headrace.optim.host.bits import host_view
from headrace.optim.host.finite import all_finite
from headrace.optim.masters import master_of
from headrace.optim.spec import allocate
from headrace.optim.storage import encoding_of
from headrace.quant.rounding import CounterGenerator

HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(rule, weight, gradients, *, tiles=None, update=None):
    weight = weight.clone()
    states = allocate(rule.state_spec(tuple(weight.shape), weight.dtype), "cpu")
    rule.init_states(weight, states)
    bounds = tiles or [0, weight.numel()]
    for step, gradient in enumerate(gradients, start=1):
        for a, b in pairwise(bounds):
            own = {name: tensor[a:b] for name, tensor in states.items()}
            rule.update(
                weight[a:b], gradient[a:b].clone(), own,
                step=step, hyper=HYPER, seed=11, element_offset=a,
            )  # fmt: skip
    return weight, states


def gradients(count, steps, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator).mul(0.1).to(dtype) for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": False}])
def test_fp32_matches_torch(options, weight_decay):
    torch.manual_seed(0)
    start = torch.randn(1003)
    theirs = torch.nn.Parameter(start.clone())
    ours = torch.nn.Parameter(start.clone())
    kwargs = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    reference = torch.optim.AdamW([theirs], **kwargs, **options)
    optimizer = adamw([ours], **kwargs)
    for gradient in gradients(1003, 20, torch.float32):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        reference.step()
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    mine, other = (o.state[p]["exp_avg_sq"] for o, p in ((optimizer, ours), (reference, theirs)))
    torch.testing.assert_close(mine, other, rtol=2e-6, atol=0)


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight_dtype", "master"),
    [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.float16, "fp32"),
     (torch.bfloat16, "split"), (torch.bfloat16, "sr")],
)  # fmt: skip
def test_kernel_equals_torch_operations(weight_dtype, gradient_dtype, master):
    rule = AdamW(master=master)
    weight = torch.randn(777, generator=torch.Generator().manual_seed(1)).to(weight_dtype)
    mine, my_states = run(rule, weight, gradients(777, 6, gradient_dtype))

    bricks = BrickRule(Adam(), encoding_of("fp32"), master=master)
    other, states = run(bricks, weight, gradients(777, 6, gradient_dtype))
    assert torch.equal(mine, other)
    for name, tensor in states.items():
        assert torch.equal(my_states[name], tensor), name


@pytest.mark.parametrize("master", ["fp32", "split", "sr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_tiles(master, dtype):
    weight = torch.randn(1001, generator=torch.Generator().manual_seed(2)).to(dtype)
    rule = AdamW(master=master)
    whole, whole_states = run(rule, weight, gradients(1001, 4, dtype))
    cut, cut_states = run(rule, weight, gradients(1001, 4, dtype), tiles=[0, 1, 8, 333, 1000, 1001])
    assert torch.equal(whole, cut)
    for name, tensor in whole_states.items():
        assert torch.equal(tensor, cut_states[name])


def test_split_equals_fp32_master_bit_for_bit():
    weight = torch.randn(20_000, generator=torch.Generator().manual_seed(3)).bfloat16()
    grads = gradients(20_000, 12, torch.bfloat16)
    full, full_states = run(AdamW(master="fp32"), weight, grads)
    split, split_states = run(AdamW(master="split"), weight, grads)
    assert torch.equal(full, split)
    rebuilt = master_of("split", torch.bfloat16).read(split, split_states)
    assert torch.equal(rebuilt, full_states["master"])
    assert torch.equal(full, full_states["master"].bfloat16())


def test_split_keeps_every_master_including_ties_and_specials():
    ties = (torch.arange(0, 4000, dtype=torch.int32) << 16) + 0x3F80_8000
    values = torch.cat([ties.view(torch.float32), torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    kept = {}
    for name in ("fp32", "split"):
        master = master_of(name, torch.bfloat16)
        weight = torch.zeros(values.numel(), dtype=torch.bfloat16)
        states = allocate(master.state_spec(tuple(weight.shape)), "cpu")
        master.write(weight, states, values, CounterGenerator(0))
        kept[name] = master.read(weight, states).clone()
        assert torch.equal(weight, values.bfloat16())
    assert torch.equal(kept["fp32"], kept["split"])
    assert ((kept["fp32"].view(torch.int32) - values.view(torch.int32)).abs() <= 1).all()


def test_split_nan_stays_nan():
    master = master_of("split", torch.bfloat16)
    weight = torch.zeros(2, dtype=torch.bfloat16)
    states = allocate(master.state_spec((2,)), "cpu")
    pattern = torch.tensor([0x7F80_0001, -1], dtype=torch.int32).view(torch.float32)
    master.write(weight, states, pattern, CounterGenerator(0))
    assert master.read(weight, states).isnan().all()


def test_stochastic_rounding_is_unbiased_and_moves_what_nearest_cannot():
    count = 40_000
    weight = torch.ones(count, dtype=torch.bfloat16)
    hyper = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    rule = AdamW(master="sr")
    states = allocate(rule.state_spec((count,), torch.bfloat16), "cpu")
    for step in range(1, 11):
        rule.update(weight, torch.ones(count), states,
                    step=step, hyper=hyper, seed=5, element_offset=0)  # fmt: skip
    # every exact step is -1e-4, far below half a bf16 unit (2e-3) at one
    assert weight.float().mean().item() == pytest.approx(1 - 1e-3, abs=1e-4)
    assert weight.float().std() > 0


def test_stochastic_noise_crosses_the_32_bit_counter():
    rule = AdamW(master="sr")
    weight = torch.ones(64, dtype=torch.bfloat16)
    results = []
    for bounds in ([0, 64], [0, 20, 40, 64]):
        w = weight.clone()
        states = allocate(rule.state_spec((64,), torch.bfloat16), "cpu")
        for a, b in pairwise(bounds):
            own = {name: tensor[a:b] for name, tensor in states.items()}
            rule.update(w[a:b], torch.full((b - a,), 0.1), own, step=1, hyper=HYPER, seed=1,
                        element_offset=2**32 - 32 + a)  # fmt: skip
        results.append(w)
    assert torch.equal(*results)
    assert results[0].unique().numel() > 1


def test_sixteen_bit_floats_round_as_torch_does():
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = halves[torch.isfinite(halves)]
    assert all_finite(host_view(finite))
    rule = AdamW()
    hyper = {"lr": 0.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    weight = torch.zeros(finite.numel())
    states = allocate(rule.state_spec((finite.numel(),), torch.float32), "cpu")
    rule.update(weight, finite, states, step=1, hyper=hyper, seed=0, element_offset=0)
    assert torch.equal(states["exp_avg"], finite.float())
    for dtype in (torch.bfloat16, torch.float16):
        some = torch.randn(5000) * torch.logspace(-9, 6, 5000)
        weight = some.to(dtype)
        states = allocate(rule.state_spec((5000,), dtype), "cpu")
        states["master"].copy_(some)
        rule.update(
            weight, torch.zeros(5000), states, step=1, hyper=hyper, seed=0, element_offset=0
        )
        assert torch.equal(weight, states["master"].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_finite_check_sees_one_bad_element(dtype, bad):
    values = torch.full((1000,), 3.0, dtype=dtype)
    values[-1] = torch.finfo(dtype).max
    assert all_finite(host_view(values))
    values[517] = bad
    assert not all_finite(host_view(values))
    assert all_finite(host_view(values[:0]))


@pytest.mark.parametrize("master", ["split", "sr"])
def test_fp16_weights_have_no_split_or_stochastic_master(master):
    with pytest.raises(ValueError, match="needs bfloat16 weights"):
        adamw([torch.nn.Parameter(torch.ones(2, dtype=torch.float16))], master=master)


def test_noncontiguous_views_are_refused_by_the_kernel_door():
    with pytest.raises(ValueError, match="contiguous"):
        host_view(torch.zeros(4, 6).t())
