"""Replay of a whole log: the live bits, whatever threads and ranges the work is divided into."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headrace.offload.errors import StoreFormatError
from headrace.zo.control import RmsScale
from headrace.zo.dense import Dense
from headrace.zo.log import read_log
from headrace.zo.lowrank import LowRank
from headrace.zo.noise import Kind
from headrace.zo.one_sided import OneSided
from headrace.zo.perturb import Rounding
from headrace.zo.replay import Replayer, replay
from headrace.zo.settings import ZOSettings, recommended
from headrace.zo.step import ZOStep

METHODS = {
    "mezo": ZOSettings(lr=1e-3, weight_decay=0.1),
    "integers": ZOSettings(lr=1e-3, directions=Dense(Kind.IRWIN_HALL)),
    "signs, stochastic rounding": ZOSettings(
        lr=1e-3,
        estimator=OneSided(2),
        directions=Dense(Kind.RADEMACHER, Rounding.STOCHASTIC),
    ),
    "low rank": ZOSettings(
        lr=1e-3, estimator=OneSided(4), directions=LowRank(4, steps=7), controls=(RmsScale(),)
    ),
    "recommended": recommended(copies=2, examples=3),
}


def net(width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(width, 40), nn.LayerNorm(40), nn.Linear(40, width))
    return made.to(torch.bfloat16)


def live(settings: ZOSettings, log: Path, steps: int, width: int = 24) -> dict[str, Tensor]:
    model = net(width)
    zo = ZOStep(model, settings, log=log)
    for step in range(steps):
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(step)).bfloat16()

        def losses(m: nn.Module, copies: int, x: Tensor = x) -> list[float]:
            errors = (m(x.repeat(copies, 1)) - x.sin().repeat(copies, 1)).float().square()
            return errors.view(copies * settings.estimator.parts, -1).mean(1).tolist()

        if settings.estimator.parts > 1:
            zo.step_together(losses, batch=step)
        else:
            zo.step(lambda m, losses=losses: losses(m, 1)[0], batch=step)
    zo.close()
    return dict(zo.export())


def tensors(width: int = 24) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net(width).named_parameters()}


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("threads", [1, 3])
def test_live_bits_from_any_division(
    method: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Replayer.__module__], "JOB_ELEMENTS", 100)
    wanted = live(METHODS[method], tmp_path / "log", 11)
    header, records = read_log(tmp_path / "log")
    with Replayer(header, records, threads=threads) as replayer:
        together = tensors()
        replayer.apply(together)
        replayer.check_complete()
    one_by_one = dict(replay(tensors().items(), header, records, threads=threads))
    for name, tensor in wanted.items():
        assert torch.equal(together[name], tensor), name
        assert torch.equal(one_by_one[name], tensor), name


def test_an_error_of_a_thread_reaches_the_caller_and_threads_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(METHODS["mezo"], tmp_path / "log", 2)
    header, records = read_log(tmp_path / "log")
    wrong = tensors()
    wrong["0.weight"] = wrong["0.weight"][:-1]
    with pytest.raises(StoreFormatError, match=r"0\.weight has shape"):
        list(replay(wrong.items(), header, records, threads=2))
    del wrong["0.weight"]
    with pytest.raises(StoreFormatError, match="lacks 1 trained tensors"):
        list(replay(wrong.items(), header, records, threads=2))
    assert not [t for t in threading.enumerate() if t.name.startswith("headrace-replay")]
    with pytest.raises(ValueError, match="threads must be at least 1"):
        Replayer(header, records, threads=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_a_thousand_steps_of_a_larger_model(method: str, tmp_path: Path) -> None:
    wanted = live(METHODS[method], tmp_path / "log", 1000, width=512)
    header, records = read_log(tmp_path / "log")
    rebuilt = dict(replay(tensors(512).items(), header, records, threads=2))
    for name, tensor in wanted.items():
        assert torch.equal(rebuilt[name], tensor), name
