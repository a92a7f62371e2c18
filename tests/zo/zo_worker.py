"""One worker of the distributed tests: python zo_worker.py MODE RANK SIZE STORE LOG STEPS."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from headrace.zo.distributed import DistributedStep, OneByte, agree_on_log
from headrace.zo.lowrank import LowRank
from headrace.zo.one_sided import OneSided
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.two_point import TwoPoint

METHODS = {
    "directions": ZOSettings(lr=1e-2, estimator=TwoPoint(3)),
    "data": ZOSettings(lr=1e-2, estimator=OneSided(4), directions=LowRank(4, steps=3)),
    "one byte": ZOSettings(lr=1e-2, estimator=TwoPoint(2)),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def batch_of(step: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + shard)
    x = torch.randn(5, 6, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def loss_on(model: nn.Module, step: int, shard: int) -> float:
    x, y = batch_of(step, shard)
    with torch.no_grad():
        return float((model(x) - y).double().square().mean())


def main() -> None:
    mode, rank, size, store, log, steps = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
    )
    known = agree_on_log(log)
    if known or Path(log).exists():
        zo = ZOStep.resume(make_model(), log)
    else:
        zo = ZOStep(make_model(), METHODS[mode], log=log)
    driver = DistributedStep(
        zo,
        split="directions" if mode == "directions" else "data",
        one_byte=OneByte(50.0) if mode == "one byte" else None,
    )
    shard = 0 if mode == "directions" else int(rank)
    while zo.next_step < int(steps):
        step = zo.next_step
        driver.step(lambda model, step=step: loss_on(model, step, shard), batch=step)
    zo.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
