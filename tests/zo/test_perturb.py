"""Perturbed scratch weights and single-rounding updates: kernels against the written formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.zo import philox
from headrace.zo.noise import Factor, Kind, reference_noise
from headrace.zo.perturb import Rounding, StepUpdate, apply_update, write_perturbed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weights(count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (torch.randn(count, generator=generator) * 0.02).to(dtype)


def z_of(kind: Kind, seed: int, direction: int, start: int, count: int) -> Tensor:
    return reference_noise(
        kind, seed=seed, stream=42, direction=direction, start=start, count=count
    )


def f32(value: float) -> float:
    return float(np.float32(value))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(Kind))
def test_write_perturbed_is_the_formula(kind: Kind, dtype: torch.dtype) -> None:
    weight, before = weights(1001, dtype), weights(1001, dtype)
    out = torch.empty_like(weight)
    write_perturbed(out, weight, scale=-1e-3, kind=kind, seed=9, stream=42, direction=2, start=13)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (weight.to(wide) + z_of(kind, 9, 2, 13, 1001) * f32(-1e-3)).to(dtype)
    assert torch.equal(out, expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("decay", [1.0, 0.999])
@pytest.mark.parametrize("count", [1001, 9001])  # a kernel takes large tensors in larger groups
def test_update_is_the_formula(kind: Kind, dtype: torch.dtype, decay: float, count: int) -> None:
    weight = weights(count, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(count)
    for direction, grad in enumerate((3.0, -0.6, 0.015)):
        total = total + z_of(kind, 77, direction, 5, count) * f32(1e-3 * grad / 3)
    expected = (weight.to(wide) * f32(decay) - total).to(dtype)
    step = StepUpdate(seed=77, lr=1e-3, grads=(3.0, -0.6, 0.015), decay=decay)
    apply_update(weight, [step], kind=kind, stream=42, start=5)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("count", [1001, 9001])
def test_stochastic_rounding_is_the_formula(count: int) -> None:
    weight = weights(count, torch.bfloat16)
    value = weight.float() - z_of(Kind.GAUSSIAN, 7, 0, 3, count) * f32(1e-4)
    words = philox.block_words(0, 1 + count // 8, seed=7, stream=42 ^ Factor.ROUNDING, direction=0)
    random = philox.halves_from_words(words)[3 : 3 + count]
    bits = (value.view(torch.int32) + random) & -65536
    step = StepUpdate(seed=7, lr=1e-4, grads=(1.0,))
    apply_update(
        weight, [step], kind=Kind.GAUSSIAN, stream=42, start=3, rounding=Rounding.STOCHASTIC
    )
    assert torch.equal(weight, bits.view(torch.float32).to(torch.bfloat16))


def test_stochastic_rounding_is_unbiased_where_nearest_loses_the_update() -> None:
    size, steps = 20_000, 50
    start = torch.ones(size, dtype=torch.bfloat16)
    nearest, stochastic = start.clone(), start.clone()
    updates = [StepUpdate(seed=step, lr=1.0, grads=(0.0,), decay=1 - 1e-4) for step in range(steps)]
    apply_update(nearest, updates, kind=Kind.GAUSSIAN, stream=1)
    apply_update(stochastic, updates, kind=Kind.GAUSSIAN, stream=1, rounding=Rounding.STOCHASTIC)
    assert torch.equal(nearest, start)
    assert stochastic.double().mean().item() == pytest.approx((1 - 1e-4) ** steps, abs=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 900), max_size=4), start=st.integers(0, 2**34))
def test_any_tiling_gives_the_same_bits(dtype: torch.dtype, cuts: list[int], start: int) -> None:
    steps = [StepUpdate(seed=s, lr=1e-3, grads=(2.0, 4.0), decay=0.99) for s in (1, 2)]
    rounding = Rounding.STOCHASTIC if dtype == torch.bfloat16 else Rounding.NEAREST
    whole, tiled = weights(900, dtype), weights(900, dtype)
    settings_ = {"kind": Kind.IRWIN_HALL, "stream": 8, "rounding": rounding}
    apply_update(whole, steps, start=start, **settings_)
    out_whole, out_tiled = torch.empty_like(whole), torch.empty_like(whole)
    probe = {"scale": 0.1, "kind": Kind.GAUSSIAN, "seed": 3, "stream": 8, "direction": 0}
    write_perturbed(out_whole, whole, start=start, **probe)
    edges = [0, *sorted(cuts), 900]
    for low, high in itertools.pairwise(edges):
        apply_update(tiled[low:high], steps, start=start + low, **settings_)
        write_perturbed(out_tiled[low:high], tiled[low:high], start=start + low, **probe)
    assert torch.equal(whole, tiled)
    assert torch.equal(out_whole, out_tiled)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("start", [0, 2**34 - 777])
def test_large_and_small_ranges_give_the_same_bits(kind: Kind, start: int) -> None:
    steps = [StepUpdate(seed=s, lr=1e-3, grads=(2.0, 4.0)) for s in (1, 2)]
    whole, tiled = weights(20_000, torch.bfloat16), weights(20_000, torch.bfloat16)
    apply_update(whole, steps, kind=kind, stream=8, start=start)
    for low, high in itertools.pairwise([0, 1, 700, 9_500, 12_000, 20_000]):
        apply_update(tiled[low:high], steps, kind=kind, stream=8, start=start + low)
    assert torch.equal(whole, tiled)


def test_many_steps_in_one_call_equal_many_calls() -> None:
    steps = [StepUpdate(seed=s * 7, lr=1e-3, grads=(1 / (s + 1),), decay=0.999) for s in range(20)]
    together, apart = weights(5000, torch.bfloat16), weights(5000, torch.bfloat16)
    apply_update(together, steps, kind=Kind.RADEMACHER, stream=4)
    for step in steps:
        apply_update(apart, [step], kind=Kind.RADEMACHER, stream=4)
    assert torch.equal(together, apart)


def test_inf_and_nan_survive() -> None:
    weight = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0], dtype=torch.bfloat16)
    step = [StepUpdate(seed=1, lr=1e-3, grads=(1.0,))]
    for rounding in Rounding:
        moved = weight.clone()
        apply_update(moved, step, kind=Kind.GAUSSIAN, stream=1, rounding=rounding)
        assert torch.equal(torch.isnan(moved), torch.isnan(weight))
        assert torch.equal(torch.isinf(moved), torch.isinf(weight))


def test_what_cannot_be_done_is_refused() -> None:
    step = [StepUpdate(seed=1, lr=1e-3, grads=(1.0,))]
    with pytest.raises(ValueError, match="stochastic rounding is for bfloat16"):
        apply_update(
            torch.ones(4), step, kind=Kind.GAUSSIAN, stream=1, rounding=Rounding.STOCHASTIC
        )
    with pytest.raises(ValueError, match="contiguous"):
        apply_update(torch.ones(4, 4).T, step, kind=Kind.GAUSSIAN, stream=1)
    with pytest.raises(ValueError, match="must agree"):
        write_perturbed(
            torch.ones(4), torch.ones(5), scale=1, kind=Kind.GAUSSIAN, seed=0, stream=0, direction=0
        )
