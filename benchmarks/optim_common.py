"""What the optimizer benchmarks share: arguments, interleaved timing, tables, claims."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def parse(description: str) -> argparse.Namespace:
    """Return the arguments every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON file of every figure")
    parser.add_argument("--plot", type=Path, help="PNG of the main table")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, the same bars")
    return parser.parse_args()


def peer(name: str) -> ModuleType:
    """Import a peer, or stop with the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{name} is missing ({error}): pip install 'headrace[bench]'") from error


def interleave(
    candidates: dict[str, Callable[[], None]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Time all candidates in turn; return wall and CPU seconds of every round."""
    for run in candidates.values():
        run()  # compiles, touches memory
    times: dict[str, dict[str, list[float]]] = {
        name: {"wall": [], "cpu": []} for name in candidates
    }
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(0.02)  # OpenMP threads of the candidate before spin a while for more work
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return times


def ratio(
    times: dict[str, dict[str, list[float]]], name: str, over: str, clock: str = "cpu"
) -> float:
    """Return the median over rounds of one candidate's time over another's."""
    pairs = zip(times[name][clock], times[over][clock], strict=True)
    return statistics.median(a / b for a, b in pairs)


def claim(text: str, value: float, bar: float, *, at_least: bool) -> dict[str, Any]:
    """Return one claim as the last lines of a benchmark print it."""
    holds = value >= bar if at_least else value <= bar
    return {"claim": text, "value": float(f"{value:.3g}"), "bar": bar, "holds": bool(holds)}


def finish(arguments: argparse.Namespace, figures: dict[str, Any], claims: list[Any]) -> int:
    """Write the file, print the claims, return the exit code."""
    if arguments.out:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count()}
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        whole = {"machine": machine, "versions": versions, "quick": arguments.quick}
        arguments.out.write_text(json.dumps({**whole, **figures, "claims": claims}, indent=1))
    for one in claims:
        print(json.dumps(one))
    return 0 if all(one["holds"] for one in claims) else 1
