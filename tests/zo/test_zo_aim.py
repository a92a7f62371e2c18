"""Activation subspaces: what is measured, what is probed, and replay from the log alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headrace.offload.errors import StoreFormatError
from headrace.zo.aim import ActivationSubspace
from headrace.zo.basis import Basis, measure_basis
from headrace.zo.log import read_log
from headrace.zo.noise import step_seed
from headrace.zo.one_sided import OneSided
from headrace.zo.replay import replay
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep

NAMES = ("0.weight", "2.weight")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))


def inputs(seed: int) -> Tensor:
    """Inputs of length 1 that lie in three of twelve dimensions."""
    plane = torch.linalg.qr(torch.randn(12, 3, generator=torch.Generator().manual_seed(9)))[0]
    inside = torch.randn(32, 3, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(inside, dim=1) @ plane.T


def measured(rank: int = 3) -> Basis:
    batches = [{"input": inputs(seed)} for seed in range(3)]
    return measure_basis(net(), batches, names=NAMES, rank=rank)


def loss(model: nn.Module, seed: int) -> float:
    x = inputs(seed)
    return float((model(x) - x[:, :3].sin()).detach().square().mean())


def settings(lr: float = 1e-2) -> ZOSettings:
    return ZOSettings(
        lr=lr, estimator=OneSided(6), directions=ActivationSubspace(6, measured(), steps=5)
    )


def test_the_basis_is_orthonormal_and_spans_the_inputs() -> None:
    basis = measured().matrix("0.weight", 12)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=0.03)
    x = inputs(77)
    assert float((x - x @ basis @ basis.T).norm() / x.norm()) < 0.03


def test_directions_have_unit_variance_and_lie_in_the_subspace() -> None:
    zo = ZOStep(net(), settings())
    window = zo._traces["0.weight"].window(0)
    seeds = [step_seed(1, step) for step in range(200)]
    made = torch.cat([window.directions(seed) @ window.right.T for seed in seeds])
    assert made.shape == (1200, 10, 12)
    # Where the inputs live all of the variance lies: 12 / 3 an element of those three dimensions.
    assert float(made.square().mean()) == pytest.approx(1.0, rel=0.1)
    inside = inputs(5) @ made.transpose(1, 2)
    assert float(inside.square().mean() / inputs(5).square().sum(1).mean()) == pytest.approx(
        4.0, rel=0.15
    )


def test_learns_and_replays_from_the_log_alone(tmp_path: Path) -> None:
    model = net()
    zo = ZOStep(model, settings(lr=2e-2), log=tmp_path / "log")
    before = loss(model, 99)
    for step in range(42):
        zo.step(lambda m, step=step: loss(m, step), batch=step)
    with zo.current():
        assert loss(model, 99) < before - 0.02
    zo.close()
    header, records = read_log(tmp_path / "log")
    assert ZOSettings.from_json(header.settings["method"]) == settings(lr=2e-2)
    base = {name: p.detach().clone() for name, p in net().named_parameters()}
    rebuilt = dict(replay(base.items(), header, records))
    for name, tensor in zo.export():
        assert torch.equal(tensor, rebuilt[name]), name
    resumed = ZOStep.resume(net(), tmp_path / "log")
    assert resumed.next_step == 42
    resumed.close()


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.weight is not the weight"):
        measure_basis(net(), [], names=["1.weight"])
    with pytest.raises(ValueError, match=r"no forward reached 0\.weight"):
        measure_basis(net(), [], names=NAMES)
    with pytest.raises(ValueError, match="an input has 10 features"):
        measured(11)
    with pytest.raises(ValueError, match="same number"):
        ZOSettings(estimator=OneSided(5), directions=ActivationSubspace(6, measured()))
    with pytest.raises(ValueError, match=r"no input directions of other\.weight"):
        measured().matrix("other.weight", 12)


@pytest.mark.parametrize(
    "change",
    [{"codes": ["!!"] * 2}, {"scales": [[float("nan")] * 3] * 2}, {"scales": []}, {"rank": 0}],
)
def test_a_hostile_basis_is_refused(change: dict[str, object]) -> None:
    text = settings().to_json()
    text["directions"]["basis"] |= change
    with pytest.raises(StoreFormatError, match="Basis"):
        ZOSettings.from_json(text)


def test_a_basis_of_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="take 36 bytes, expected 13 rows of 3"):
        measured().matrix("0.weight", 13)
