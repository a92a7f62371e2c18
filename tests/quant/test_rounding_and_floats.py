"""Counter-based bits, stochastic rounding, small floats, logarithms: against exact references."""

import math

import pytest
import torch

from headrace.quant import CounterGenerator
from headrace.quant.minifloat import E2M1, E4M3, E5M2
from headrace.quant.mx import shared_exponent
from headrace.quant.rounding import bfloat16_stochastic, round_stochastic, seed_key


def reference_bits(seed, index):
    """The generator's definition in Python integers."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    low, high = seed_key(seed)
    return mix(mix((index & 0xFFFFFFFF) ^ low) ^ (index >> 32) ^ high)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("start", [0, 17, 2**32 - 3, 2**40 + 1])
def test_bits_are_a_pure_function_of_seed_and_index(seed, start):
    bits = CounterGenerator(seed).bits(start, 9)
    assert bits.tolist() == [reference_bits(seed, start + i) for i in range(9)]
    assert torch.equal(CounterGenerator(seed, start).bits(0, 9), bits)
    assert torch.equal(CounterGenerator(seed).shifted(start).bits(4, 5), bits[4:])


def test_bits_look_uniform_and_neighbouring_seeds_are_independent():
    one, two = (CounterGenerator(seed).uniform(0, 1 << 16) for seed in (1, 2))
    for u in (one, two):
        assert abs(u.mean() - 0.5) < 0.005
        assert abs(u.var() - 1 / 12) < 0.002
        assert u.min() >= 0
        assert u.max() < 1
    pairs = torch.stack([one, two, one.roll(1), two.roll(1)])
    off_diagonal = torch.corrcoef(pairs) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.02


def test_bad_seeds_are_refused():
    with pytest.raises(ValueError, match="seed"):
        CounterGenerator(-1)
    with pytest.raises(ValueError, match="element_offset"):
        CounterGenerator(0, -4)


def test_stochastic_rounding_takes_neighbours_with_the_right_odds():
    x = torch.full((1 << 16,), 3.3)
    rounded = round_stochastic(x, CounterGenerator(5).uniform(0, x.numel()))
    assert set(rounded.tolist()) == {3.0, 4.0}
    assert abs(rounded.mean() - 3.3) < 0.01
    whole = torch.arange(-5.0, 5.0)
    assert torch.equal(round_stochastic(whole, torch.full((10,), 0.999)), whole)


def test_bfloat16_stochastic_is_unbiased_and_keeps_what_is_exact():
    x = torch.full((1 << 16,), 1.0 + 2.0**-9)  # a quarter of the way to the next bf16
    mean = bfloat16_stochastic(x, CounterGenerator(1)).to(torch.float64).mean().item()
    assert abs(mean - (1.0 + 2.0**-9)) < 2e-5
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, 2.0**-133])
    assert torch.equal(bfloat16_stochastic(exact, CounterGenerator(2)).float(), exact)
    assert bfloat16_stochastic(torch.tensor([math.nan]), CounterGenerator(2)).isnan().all()
    whole = bfloat16_stochastic(x[:100], CounterGenerator(3))
    tail = bfloat16_stochastic(x[40:100], CounterGenerator(3, 40))
    assert torch.equal(whole[40:], tail)
    with pytest.raises(ValueError, match="float32"):
        bfloat16_stochastic(x.half(), CounterGenerator(0))


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
def test_rounding_finds_the_nearest_even_value_of_the_grid(fmt):
    half = torch.tensor(fmt.values()[: 1 << (fmt.code_bits - 1)], dtype=torch.float64)
    finite = half[half.isfinite()]
    midpoints = ((finite[:-1] + finite[1:]) / 2).float()
    y = torch.cat([finite.float(), midpoints, midpoints * 1.0001, midpoints * 0.9999])
    y = torch.cat([y, -y])
    grid = torch.cat([-finite.flip(0), finite])
    rounded = fmt.round(y)
    error = (rounded.double() - y.double()).abs()
    best = (grid[None] - y.double()[:, None]).abs().min(dim=1).values
    assert torch.equal(error, best)
    at_ties = fmt.encode(midpoints)
    assert bool((at_ties % 2 == 0).all()), "ties go to the even mantissa"
    assert torch.equal(
        torch.tensor(fmt.values())[fmt.encode(y).int()].nan_to_num(), rounded.nan_to_num()
    )


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
def test_beyond_the_largest_value_everything_saturates(fmt):
    y = torch.tensor([1.0001, 1.06, 2.0, 1e6]) * fmt.largest
    expected = torch.full((4,), fmt.largest)
    for uniform in (None, torch.full((4,), 0.5)):
        values = torch.tensor(fmt.values())
        assert torch.equal(values[fmt.encode(y, uniform).int()], expected)
        assert torch.equal(values[fmt.encode(-y, uniform).int()], -expected)


def test_shared_exponents_follow_the_published_rules():
    amax = torch.tensor([0.0, 1.0, 6.0, 6.5, 448.0, 449.0, 500.0, 2.0**-140, 3e38, math.nan])
    rules = {rule: shared_exponent(amax, E4M3, rule) for rule in ("floor", "even", "ceil", "rceil")}
    assert rules["floor"].tolist() == [0, 119, 121, 121, 127, 127, 127, 0, 246, 255]
    assert rules["rceil"].tolist() == [0, 119, 121, 121, 127, 128, 128, 0, 246, 255]
    assert rules["ceil"].tolist() == [0, 119, 122, 122, 128, 128, 128, 0, 246, 255]
    # 500 rounds up to 512 in three mantissa bits, 449 does not.
    assert rules["even"].tolist() == [0, 119, 121, 121, 127, 127, 128, 0, 246, 255]
