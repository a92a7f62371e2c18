"""A run for the kill tests: zo_kill_worker.py METHOD LOG STEPS; prints every step's number."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from headrace.zo.lowrank import LowRank
from headrace.zo.one_sided import OneSided
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep

METHODS = {
    "mezo": ZOSettings(lr=1e-2),
    "low rank": ZOSettings(lr=1e-2, estimator=OneSided(4), directions=LowRank(4, steps=7)),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(torch.bfloat16)


def loss(model: nn.Module, step: int) -> float:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
    return float((model(x) - x[:, :3].sin()).double().square().mean())


def run(method: str, log: Path, steps: int) -> None:
    if log.exists():
        zo = ZOStep.resume(make_model(), log)
    else:
        zo = ZOStep(make_model(), METHODS[method], log=log)
    while zo.next_step < steps:
        step = zo.next_step
        zo.step(lambda model, step=step: loss(model, step), batch=step)
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()
    zo.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
