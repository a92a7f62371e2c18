"""Runs streamed zeroth-order steps in forked children, for tests that kill them.

Every line of standard input, ``METHOD MODEL FOLDER STEPS``, is a run (new, or continued from what
the folder holds) in a child of its own.  Standard output gets ``pid N``, ``ready``, every step's
number, ``weights DIGEST`` and ``exit CODE``.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TextIO

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import headrace
from headrace.offload.runtime import Runtime
from headrace.zo.dense import Dense
from headrace.zo.lowrank import LowRank
from headrace.zo.noise import Kind
from headrace.zo.objective import causal_lm_losses
from headrace.zo.one_sided import OneSided
from headrace.zo.replay import fingerprint
from headrace.zo.settings import ZOSettings
from headrace.zo.step import ZOStep
from headrace.zo.streamed import StreamedWeights

METHODS = {
    "mezo": ZOSettings(lr=1e-3, directions=Dense(Kind.IRWIN_HALL)),
    "lowrank": ZOSettings(lr=1e-2, estimator=OneSided(4), directions=LowRank(4, steps=3)),
}


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # one write: a line is whole or not there


def objective(model: nn.Module, members: int, step: int) -> list[float]:
    ids = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(step))
    return causal_lm_losses(model, {"input_ids": ids, "labels": ids}, members)


def open_run(model: nn.Module, runtime: Runtime, method: str, folder: Path) -> ZOStep:
    settings, log, store = METHODS[method], folder / "log", folder / "store"
    if log.exists():
        return ZOStep.resume(
            model,
            log,
            weights=lambda select: StreamedWeights(
                model, runtime, settings.directions, select=select, store=store
            ),
        )
    weights = StreamedWeights(model, runtime, settings.directions, store=store)
    return ZOStep(model, settings, weights=weights, log=log)


def run(method: str, source: str, folder: Path, steps: int) -> None:
    model = headrace.load(
        source, train="none", device="cpu", device_budget=160 << 10, host_budget=160 << 10
    )
    say("ready")
    zo = open_run(model, headrace.runtime_of(model), method, folder)
    while zo.next_step < steps:
        step = zo.next_step
        zo.step_together(lambda m, n, step=step: objective(m, n, step), batch=step)
        say(f"step {step}")
    say(f"weights {fingerprint(zo.export())}")
    zo.close()
    model.close()


def warm_up() -> None:
    """Import and compile once, before the forks; nothing here leaves a thread behind."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for settings in METHODS.values():
        zo = ZOStep(model, settings)
        for step in range(4):
            zo.step(lambda m, step=step: objective(m, 1, step)[0])


def serve(requests: TextIO) -> None:
    warm_up()
    for line in requests:
        method, source, folder, steps = line.split()
        child = os.fork()
        if not child:
            try:
                run(method, source, Path(folder), int(steps))
            except BaseException:  # noqa: BLE001  (a child must not become a second server)
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        say(f"pid {child}")
        _, status = os.waitpid(child, 0)
        say(f"exit {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    serve(sys.stdin)
