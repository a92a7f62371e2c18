"""Peak memory of streamed zeroth-order steps: zo_memory_worker.py METHOD MODEL FOLDER STEPS.

Prints JSON: bytes of peak RSS before the model was opened and at the end, and the two budgets.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import headrace
from headrace.zo.dense import Dense
from headrace.zo.lowrank import LowRank
from headrace.zo.noise import Kind
from headrace.zo.objective import causal_lm_losses
from headrace.zo.one_sided import OneSided
from headrace.zo.perturb import StepUpdate, apply_update, write_perturbed
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.streamed import StreamedWeights

METHODS = {
    "mezo": ZOSettings(lr=1e-6, directions=Dense(Kind.RADEMACHER)),
    "lowrank": ZOSettings(lr=1e-6, estimator=OneSided(8), directions=LowRank(8, steps=2)),
}


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def warm_up() -> None:
    """Load what the first use of kernels and model classes loads."""
    weight = torch.zeros(8, dtype=torch.bfloat16)
    for kind in (Kind.RADEMACHER, Kind.GAUSSIAN):
        write_perturbed(weight.clone(), weight, scale=1.0, kind=kind, seed=0, stream=0, direction=0)
        apply_update(weight, [StepUpdate(0, 0.0, (0.0,))], kind=kind, stream=0)
    assert AutoModelForCausalLM is not None


def run(method: str, source: str, folder: Path, steps: int) -> dict[str, int]:
    before = peak_bytes()
    budgets = {"device": 200 << 20, "host": 200 << 20}
    model = headrace.load(
        source,
        train="none",
        device="cpu",
        device_budget=budgets["device"],
        host_budget=budgets["host"],
    )
    settings = METHODS[method]
    runtime = headrace.runtime_of(model)
    weights = StreamedWeights(model, runtime, settings.directions, store=folder / "store")
    zo = ZOStep(model, settings, weights=weights, log=folder / "log")
    ids = torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(0))

    def objective(model: nn.Module, members: int) -> list[float]:
        return causal_lm_losses(model, {"input_ids": ids, "labels": ids}, members)

    for _ in range(steps):
        zo.step_together(objective)
    zo.close()
    model.close()
    return {"before": before, "after": peak_bytes(), **budgets}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warm_up()
    sys.stdout.write(json.dumps(run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
