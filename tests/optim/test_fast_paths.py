"""Fused kernels equal the bricks bit for bit: every fast path, master and gradient dtype."""

import numpy as np
import pytest
import torch
from numba import njit

from headrace.optim import encoded_adamw
from headrace.optim.adam import Adam
from headrace.optim.brick_rule import BrickRule
from headrace.optim.choose import fast_rule
from headrace.optim.host import dynamic
from headrace.optim.host.machine import permutes_bytes
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
#: Encodings with a second path for processors that permute bytes.
TWO_PATHS = ("int8_dynamic",)
MASTERS = [
    (torch.float32, "fp32"),
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "split"),
    (torch.bfloat16, "sr"),
    (torch.float16, "fp32"),
]
HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


@pytest.fixture(params=["wide", "portable"])
def path(request, monkeypatch):
    """Both paths of kernels that have one for processors that permute bytes."""
    if request.param == "wide" and not permutes_bytes():
        pytest.skip("this processor does not permute bytes")
    monkeypatch.setattr(encoded_adamw, "permutes_bytes", lambda: request.param == "wide")
    return request.param


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
def test_kernels_equal_bricks(brick, encoding, dtype, master, gradient_dtype, path):
    if path == "portable" and (encoding not in TWO_PATHS or (dtype, master) not in MASTERS[:3:2]):
        pytest.skip("one path only, or masters that the other path tries")
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


@pytest.mark.parametrize("count", [256, 300])
def test_dynamic_extremes_equal_the_bricks(count, path):
    fast = fast_rule(Adam(), "int8_dynamic", "fp32")
    slow = BrickRule(Adam(), encoding_of("int8_dynamic"), master="fp32")
    gradient = torch.logspace(-26, 17, count)
    results = []
    for rule in (fast, slow):
        weight = torch.zeros(count)
        states = allocate(rule.state_spec((count,), torch.float32), "cpu")
        rule.init_states(weight, states)
        for last in (1e17, torch.nan):
            gradient[-1] = last
            rule.update(weight, gradient, states, step=1, hyper=HYPER, seed=0, element_offset=0)
            results.append({name: states[name].clone() for name in states})
    for mine, oracle in zip(results[:2], results[2:], strict=True):
        for name, ours in mine.items():
            assert torch.equal(ours.nan_to_num(nan=-1.0), oracle[name].nan_to_num(nan=-1.0)), name
    # Second moments that underflow when scaled are not lost, unless they are zero.
    kept = results[0]["exp_avg_sq.codes"] > 0
    assert torch.equal(kept, (gradient * 0.01).nan_to_num(nan=1.0) * gradient.nan_to_num(1.0) > 0)


@pytest.mark.parametrize(("brick", "encoding"), FAST[1:])
def test_a_bad_gradient_poisons_its_block_only(brick, encoding, path):
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
def test_dynamic_codes_are_the_codecs(signed, path):
    table = code_table(dynamic_map(signed=signed), torch.device("cpu"))
    values, tables = edges_of_codes(table), dynamic.dynamic_tables(wide=path == "wide")
    values = torch.cat([values, -values]) if signed else values[~values.signbit()]
    values = torch.nn.functional.pad(values, (0, -values.numel() % 256)).reshape(-1, 256)
    codes = np.zeros(values.shape, np.uint8)
    encode_all(values.numpy(), np.float32(1.0), tables, codes, signed)
    exact = table.nearest(values).numpy()
    if not signed:
        exact = np.where((values.numpy() > 0) & (exact == 0), 1, exact)
    assert np.array_equal(codes, exact)
    again = np.zeros(values.shape, np.float32)
    decode_all(codes, tables, again, signed)
    assert np.array_equal(again, table.lookup(torch.from_numpy(codes)).numpy())


def edges_of_codes(table):
    """All values, all middles, all edges of decades, their neighbours; many others."""
    edges = 10.0 ** torch.arange(-9, 1).float()
    exact = torch.cat([table.ascending, table.midpoints, edges])
    up, down = (torch.nextafter(exact, torch.tensor(end)) for end in (2.0, -2.0))
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(300_000, generator=generator) ** 8
    tiny = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e-30, 2.0**-31, 2.0**-32])
    return torch.cat([exact, up, down, spread, tiny]).clamp(-1.0, 1.0)


@njit
def encode_all(values, factor, tables, codes, signed):
    for row in range(values.shape[0]):
        if signed:
            dynamic.encode_signed(values[row], factor, tables, codes[row])
        else:
            dynamic.encode_positive(values[row], factor, tables, codes[row])


@njit
def decode_all(codes, tables, values, signed):
    for row in range(values.shape[0]):
        if signed:
            dynamic.decode_signed(codes[row], tables, values[row])
        else:
            dynamic.decode_positive(codes[row], tables, values[row])
