"""Fused kernels equal the bricks bit for bit: every fast path, master and gradient dtype."""

import pytest
import torch

from headrace.optim.adam import Adam
from headrace.optim.brick_rule import BrickRule
from headrace.optim.choose import fast_rule
from headrace.optim.lion import Lion
from headrace.optim.spec import allocate
from headrace.optim.storage import encoding_of

FAST = [(Adam(), "fp32"), (Adam(), "int8"), (Lion(), "int8")]
MASTERS = [
    (torch.float32, "fp32"),
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "split"),
    (torch.bfloat16, "sr"),
    (torch.float16, "fp32"),
]
HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


def run(rule, dtype, gradient_dtype, count, hyper, offset=0):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(count, generator=generator).to(dtype)
    states = allocate(rule.state_spec((count,), dtype), "cpu")
    rule.init_states(weight, states)
    spread = torch.logspace(-12, 0, count)[torch.randperm(count, generator=generator)]
    for step in range(1, 6):
        gradient = torch.randn(count, generator=generator) * spread
        gradient[:: step + 2] = 0.0
        rule.update(
            weight, gradient.to(gradient_dtype), states,
            step=step, hyper=hyper, seed=9, element_offset=offset,
        )  # fmt: skip
    return weight, states


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dtype", "master"), MASTERS)
@pytest.mark.parametrize(("brick", "encoding"), FAST)
def test_kernels_equal_bricks(brick, encoding, dtype, master, gradient_dtype):
    if encoding == "int8" and gradient_dtype == torch.float16:
        pytest.skip("the loader is the same as in the fp32 kernels")
    fast = fast_rule(brick, encoding, master)
    assert not isinstance(fast, BrickRule)
    slow = BrickRule(brick, encoding_of(encoding), master=master)
    for count, maximize in ((1000, False), (128, True), (5, False)):
        hyper = {**HYPER, "maximize": maximize}
        offset = 2**32 - 512
        mine, my_states = run(fast, dtype, gradient_dtype, count, hyper, offset)
        oracle, states = run(slow, dtype, gradient_dtype, count, hyper, offset)
        assert torch.equal(mine, oracle)
        assert my_states.keys() == states.keys()
        for name, tensor in states.items():
            assert torch.equal(my_states[name], tensor), name


@pytest.mark.parametrize(("brick", "encoding"), FAST[1:])
def test_a_bad_gradient_poisons_its_block_only(brick, encoding):
    rule = fast_rule(brick, encoding, "fp32")
    weight = torch.ones(300)
    states = allocate(rule.state_spec((300,), torch.float32), "cpu")
    rule.init_states(weight, states)
    gradient = torch.ones(300)
    gradient[130] = torch.nan
    rule.update(weight, gradient, states, step=1, hyper=HYPER, seed=0, element_offset=0)
    assert states["exp_avg.absmax"].isnan().tolist() == [False, True, False]
