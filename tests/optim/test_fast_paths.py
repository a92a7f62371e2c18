"""Fused kernels equal the bricks bit for bit: every fast path, master and gradient dtype."""

import numpy as np
import pytest
import torch

from headrace.optim.adam import Adam
from headrace.optim.brick_rule import BrickRule
from headrace.optim.choose import fast_rule
from headrace.optim.host import dynamic
from headrace.optim.lion import Lion
from headrace.optim.spec import allocate
from headrace.optim.storage import encoding_of
from headrace.quant.tables import code_table, dynamic_map

FAST = [
    (Adam(), "fp32"),
    (Adam(), "int8"),
    (Lion(), "int8"),
    (Adam(), "coat"),
    (Adam(), "int8_dynamic"),
]
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
    if encoding != "fp32" and gradient_dtype != dtype:
        pytest.skip("gradients are loaded as in the fp32 kernels, which try all")
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
    assert states["exp_avg.absmax"].isnan().tolist() == [
        start <= 130 < start + rule.granule for start in range(0, 300, rule.granule)
    ]
    before = weight.clone()
    rule.update(weight, torch.ones(300), states, step=2, hyper=HYPER, seed=0, element_offset=0)
    start = 130 // rule.granule * rule.granule
    lost = torch.arange(300).sub(start).float().div(rule.granule).floor() == 0
    assert torch.equal(weight.isnan(), lost)
    assert not torch.equal(weight[~lost], before[~lost])


@pytest.mark.parametrize("brick", [Adam(), Lion()])
@pytest.mark.parametrize("encoding", ["fp32", "int8", "int8_dynamic", "coat"])
def test_parameters_without_gradient_do_not_move(brick, encoding):
    rule = fast_rule(brick, encoding, "fp32")
    weight = torch.linspace(-2, 2, 700)
    states = allocate(rule.state_spec((700,), torch.float32), "cpu")
    rule.init_states(weight, states)
    before, gradient = weight.clone(), torch.randn(700)
    gradient[::3] = 0.0
    gradient[256:512] = 0.0  # a whole block
    for step in range(1, 30):
        rule.update(
            weight, gradient, states, step=step, hyper={**HYPER, "weight_decay": 0.0}, seed=0,
            element_offset=0,
        )  # fmt: skip
    assert torch.equal(weight == before, gradient == 0)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_codes_differ_from_the_codec_only_at_middles(signed):
    table = code_table(dynamic_map(signed=signed), torch.device("cpu"))
    middles = table.midpoints[table.midpoints > 0]
    near = [middles * (1 + shift * 2.0**-22) for shift in (-12, -3, -1, 0, 1, 3, 12)]
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(200_000, generator=generator) ** 8
    values = torch.cat([*near, spread, table.ascending, torch.tensor([0.0, 1e-30])])
    values = torch.cat([values, -values]) if signed else values[values >= 0]
    kernel = dynamic.encode_signed if signed else dynamic.encode_positive
    codes = torch.tensor([int(kernel(x, np.float32(1.0))) for x in values.numpy()])
    exact = table.nearest(values).int()
    if not signed:
        exact = torch.where((values > 0) & (exact == 0), 1, exact)
    differs = codes != exact
    assert (codes - exact).abs().max() <= 1
    distance = (values[:, None].abs() - middles).abs().min(dim=1).values / values.abs()
    assert (distance[differs] < 2.0**-20).all()
    assert differs[values.shape[0] // 2 :].float().mean() < 0.01
