"""Estimators and controls as pure functions, and what they say about a known gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.zo.control import Clip, RmsScale, Standardize, apply_controls
from headrace.zo.estimate import Estimator, Member
from headrace.zo.noise import Kind, noise, step_seed
from headrace.zo.one_sided import OneSided
from headrace.zo.per_example import PerExample
from headrace.zo.two_point import TwoPoint

ESTIMATORS = [
    TwoPoint(1),
    TwoPoint(4),
    OneSided(8),
    OneSided(4, baseline="centre"),
    PerExample(3, 4),
]


def test_two_point_is_mezo() -> None:
    assert TwoPoint(1).members() == (Member(0, 1), Member(0, -1))
    assert TwoPoint(2).projected_grads([2.0, 1.0, 5.0, 9.0], 1e-3) == (
        1.0 / (2 * 1e-3),
        -4.0 / (2 * 1e-3),
    )


def test_leave_one_out_is_written_out() -> None:
    losses = [3.0, 1.0, 2.0, 7.0]
    expected = [(a - (sum(losses) - a) / 3) / 0.5 for a in losses]
    assert OneSided(4).projected_grads(losses, 0.5) == pytest.approx(expected)


@given(shift=st.floats(-1e3, 1e3), losses=st.lists(st.floats(-10, 10), min_size=5, max_size=5))
def test_one_sided_ignores_a_shift_of_the_loss(shift: float, losses: list[float]) -> None:
    for estimator in (OneSided(5), OneSided(4, baseline="centre")):
        plain = estimator.projected_grads(losses, 1.0)
        moved = estimator.projected_grads([loss + shift for loss in losses], 1.0)
        assert moved == pytest.approx(plain, abs=1e-9)


@given(losses=st.lists(st.floats(-10, 10), min_size=12, max_size=12), shift=st.floats(-1e3, 1e3))
def test_an_example_is_compared_with_itself_only(losses: list[float], shift: float) -> None:
    grads = PerExample(copies=3, examples=4).projected_grads(losses, 0.5)
    alone = OneSided(3).projected_grads(losses[1::4], 0.5)
    assert grads[1::4] == pytest.approx(alone, abs=1e-9)
    moved = [loss + shift * (member % 4 == 2) for member, loss in enumerate(losses)]
    again = PerExample(copies=3, examples=4).projected_grads(moved, 0.5)
    assert again == pytest.approx(grads, abs=1e-9)


def test_copies_and_parts() -> None:
    assert (PerExample(3, 4).copies, PerExample(3, 4).parts) == (3, 4)
    assert (TwoPoint(2).copies, TwoPoint(2).parts) == (4, 1)
    with pytest.raises(ValueError, match=r"12 members \(3 copies of 4 parts\), got 3 losses"):
        PerExample(3, 4).projected_grads([1.0] * 3, 1e-3)
    with pytest.raises(ValueError, match="copies must be at least 2"):
        PerExample(1, 4)
    with pytest.raises(ValueError, match="examples must be positive"):
        PerExample(2, 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_estimate_is_the_gradient_of_a_quadratic(estimator: Estimator) -> None:
    size, eps, steps = 12, 1e-3, 1200
    generator = torch.Generator().manual_seed(0)
    curvature = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    point = torch.randn(size, generator=generator, dtype=torch.float64)
    truth = curvature * point
    total = torch.zeros(size, dtype=torch.float64)
    for step in range(steps):
        seed = step_seed(3, step)
        z = torch.stack(
            [
                noise(Kind.GAUSSIAN, seed=seed, stream=1, direction=d, start=0, count=size)
                for d in range(estimator.directions)
            ]
        ).double()
        at = [point + m.sign * eps * z[m.direction] for m in estimator.members()]
        grads = estimator.projected_grads([float(0.5 * (curvature * w * w).sum()) for w in at], eps)
        total += (torch.tensor(grads, dtype=torch.float64)[:, None] * z).mean(0)
    spread = truth.norm() * math.sqrt((size + 1) / (steps * estimator.directions))
    assert (total / steps - truth).norm() < 2 * spread * math.sqrt(2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_wrong_losses_and_eps_are_refused(estimator: Estimator) -> None:
    fine = [1.0] * len(estimator.members())
    with pytest.raises(ValueError, match="members"):
        estimator.projected_grads([*fine, 1.0], 1e-3)
    for eps in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps"):
            estimator.projected_grads(fine, eps)


def test_counts_are_checked() -> None:
    for make in (lambda: TwoPoint(0), lambda: OneSided(1), lambda: TwoPoint(5000)):
        with pytest.raises(ValueError, match="directions must be in"):
            make()


def test_controls_in_order_with_memory() -> None:
    controls = (Clip(2.0), RmsScale(beta=0.5))
    memories = tuple(control.initial() for control in controls)
    grads, memories = apply_controls(controls, (4.0,), memories)
    assert grads == pytest.approx((1.0,))  # 2 / sqrt(4)
    grads, memories = apply_controls(controls, (1.0,), memories)
    square = (0.5 * (0.5 * 4) + 0.5 * 1) / (1 - 0.25)
    assert grads == pytest.approx((1 / math.sqrt(square),))


def test_controls_survive_flat_losses() -> None:
    assert Standardize().apply((0.0, 0.0), ())[0] == (0.0, 0.0)
    assert RmsScale().apply((0.0,), (0.0, 0.0))[0] == (0.0,)


def test_standardize_cancels_eps() -> None:
    losses = [0.3, 0.1, 0.7]
    by_eps = [
        Standardize().apply(OneSided(3).projected_grads(losses, eps), ())[0] for eps in (1e-3, 1.0)
    ]
    assert by_eps[0] == pytest.approx(by_eps[1])
