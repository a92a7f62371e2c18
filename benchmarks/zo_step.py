"""What a zeroth-order step costs beyond its forwards, and how fast a log is replayed.

Claims: a low-rank step takes at most 1.15 times the bare forwards of the step (the same rows in
one resident forward), MeZO's dense step at most 2.2 times; 1,000 logged dense steps of the whole
model are replayed in under a minute, with bits that do not depend on how the work is divided.

The model is the demo's (SmolLM2-135M in bf16) on the CPU, all trained parameters resident.  Steps
and bare forwards take turns in one run; a ratio is the median over rounds of a step's time over
that of its neighbour.  Replay is timed for integer-derived noise (the same bits on every device)
and for Gaussian noise (MeZO's), and for the recommended method.

    python benchmarks/zo_step.py --quick --out zo-step.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headrace.demo import demo_model
from headrace.progress import Silent
from headrace.zo import (
    Dense,
    Kind,
    StepRecord,
    ZOSettings,
    ZOStep,
    causal_lm_losses,
    fingerprint,
    measure_basis,
    recommended,
)
from headrace.zo.log import LogHeader
from headrace.zo.noise import step_seed
from headrace.zo.replay import Replayer

Row = dict[str, Any]


def load_model() -> Any:
    """The demo's model in bf16."""
    from transformers import AutoModelForCausalLM

    folder = demo_model(Silent())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def batch_of(rows: int, tokens: int) -> dict[str, Tensor]:
    """Random tokens, the last eight of each row with labels."""
    ids = torch.randint(0, 49152, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -8:] = ids[:, -8:]
    return {"input_ids": ids, "labels": labels}


def interleaved(step: Callable[[], object], bare: Callable[[], object], rounds: int) -> Row:
    """Seconds of a step and of its bare forwards, in turns, after one turn to warm up."""
    step()
    bare()
    times: dict[str, list[float]] = {"step": [], "bare": []}
    for _ in range(rounds):
        for name, call in (("bare", bare), ("step", step)):
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times["step"], times["bare"], strict=True)]
    return {
        "step_seconds": round(statistics.median(times["step"]), 4),
        "bare_seconds": round(statistics.median(times["bare"]), 4),
        "ratio": round(statistics.median(ratios), 4),
    }


def low_rank(model: nn.Module, rounds: int, rows: int, tokens: int) -> Row:
    """The recommended step against one forward of all its members' rows."""
    batch = batch_of(rows, tokens)
    basis = measure_basis(model, [{**batch, "use_cache": False}])
    zo = ZOStep(model, recommended(lr=1e-6, examples=rows, basis=basis))
    estimator = zo.settings.estimator

    def losses(model: nn.Module, copies: int) -> list[float]:
        return causal_lm_losses(model, batch, copies, parts=estimator.parts)

    @torch.no_grad()
    def bare() -> None:
        losses(model, estimator.copies)

    made = interleaved(lambda: zo.step_together(losses), bare, rounds)
    row = {"method": "recommended", "copies": estimator.copies, "members": estimator.directions}
    return {**row, "rows": rows, "tokens": tokens, **made}


def dense(model: nn.Module, rounds: int, rows: int, tokens: int) -> Row:
    """MeZO's step against two forwards."""
    batch = batch_of(rows, tokens)
    zo = ZOStep(model, ZOSettings(lr=1e-9))

    def loss(model: nn.Module) -> float:
        return causal_lm_losses(model, batch, 1)[0]

    @torch.no_grad()
    def bare() -> None:
        loss(model)
        loss(model)

    made = interleaved(lambda: zo.step(loss), bare, rounds)
    return {"method": "MeZO", "members": 2, "rows": rows, "tokens": tokens, **made}


def replayed(
    base: dict[str, Tensor], settings: ZOSettings, name: str, *, steps: int, threads: int
) -> Row:
    """Seconds to apply a log of ``steps`` steps to copies of all tensors, and the result's hash."""
    directions = settings.estimator.directions
    members = len(settings.estimator.members())
    shapes = {n: list(t.shape) for n, t in base.items()}
    header = LogHeader("", {"method": settings.to_json(), "trained": shapes}, members, directions)
    records = [
        StepRecord(step, step_seed(0, step), 0, 1e-6, 1e-3, (1.0,) * members, (3.0,) * directions)
        for step in range(steps)
    ]
    started, cpu = time.perf_counter(), time.process_time()
    tensors = {n: t.clone() for n, t in base.items()}
    with Replayer(header, records, threads=threads) as replayer:
        replayer.apply(tensors)
        replayer.check_complete()
    return {
        "noise": name,
        "steps": steps,
        "threads": threads,
        "parameters": sum(t.numel() for t in base.values()),
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "fingerprint": fingerprint(tensors.items()),
    }


def replays(model: nn.Module, steps: int) -> list[Row]:
    """Replay of all parameters by each kind of noise; of the matrices by the recommended method."""
    threads = os.cpu_count() or 1
    base = {name: p.detach() for name, p in model.named_parameters()}
    method = recommended(basis=measure_basis(model, [{**batch_of(4, 64), "use_cache": False}]))
    matrices = {name: base[name] for name in ZOStep(model, method).trained_names}
    return [
        replayed(
            base,
            ZOSettings(directions=Dense(Kind.IRWIN_HALL)),
            "integer-derived",
            steps=steps,
            threads=threads,
        ),
        replayed(base, ZOSettings(), "gaussian", steps=steps, threads=threads),
        replayed(matrices, method, "recommended", steps=steps, threads=threads),
    ]


def same_bits(model: nn.Module, steps: int) -> bool:
    """Whether one thread and several leave the same weights."""
    base = {name: p.detach() for name, p in model.named_parameters() if ".0." in name}
    found = {
        replayed(base, ZOSettings(), "", steps=steps, threads=threads)["fingerprint"]
        for threads in (1, 2, 3)
    }
    return len(found) == 1


def main() -> int:
    """Measure, print the tables, write the file; 0 only if all claims hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file of every figure")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; replay of 100 steps")
    parser.add_argument("--part", choices=("all", "step", "replay"), default="all")
    given = parser.parse_args()
    model = load_model()
    rounds = 3 if given.quick else 7
    logged = 100 if given.quick else 1000
    claims: list[Row] = []
    steps: list[Row] = []
    logs: list[Row] = []
    if given.part != "replay":
        steps = [low_rank(model, rounds, 4, 64), dense(model, rounds, 16, 64)]
        print("method         members  rows x tokens   step s   bare s   ratio")
        for row in steps:
            print(
                f"{row['method']:<14}{row['members']:>8}{row['rows']:>9} x {row['tokens']:<4}"
                f"{row['step_seconds']:>8.3f}{row['bare_seconds']:>9.3f}{row['ratio']:>8.3f}"
            )
        claims += [
            _claim("low-rank step over its bare forwards", steps[0]["ratio"], 1.15),
            _claim("MeZO step over its bare forwards", steps[1]["ratio"], 2.2),
        ]
    if given.part != "step":
        logs = replays(model, logged)
        for row in logs:
            print(
                f"replay of {row['steps']} steps, {row['noise']}: {row['seconds']:.1f} s "
                f"({row['parameters']:,} parameters, {row['threads']} threads)"
            )
        scale = 1000 / logged
        claims += [
            _claim(f"seconds to replay 1,000 steps, {row['noise']}", row["seconds"] * scale, 60.0)
            for row in logs
        ]
        claims.append(
            _claim("replays whose bits depend on threads", float(not same_bits(model, 20)), 0)
        )
    if given.out:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count()}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        whole = {"machine": machine, "versions": versions, "quick": given.quick}
        text = json.dumps({**whole, "steps": steps, "replays": logs, "claims": claims}, indent=1)
        given.out.write_text(text + "\n")
    for claim in claims:
        print(json.dumps(claim))
    return 0 if all(claim["holds"] for claim in claims) else 1


def _claim(text: str, value: float, bar: float) -> Row:
    return {"claim": text, "value": round(value, 3), "bar": bar, "holds": value <= bar}


if __name__ == "__main__":
    sys.exit(main())
