"""Training processes killed at random instants, then resumed: same losses, same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from streaming_cases import make_folder

HERE = Path(__file__).parent
MODES = ("forward", "backward", "lora")


class Workers:
    """The forking process: starts training runs and kills them."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, job: dict[str, str], *, kill_after_seconds: float | None) -> tuple[int, float]:
        """Run one child; returns its exit code (-9 if it was killed) and how long it lived."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        start = time.perf_counter()
        timer = None
        if kill_after_seconds is not None:
            timer = threading.Timer(kill_after_seconds, os.kill, (pid, signal.SIGKILL))
            timer.start()
        status = int(self._process.stdout.readline())
        if timer is not None:
            timer.cancel()
            timer.join()
        return status, time.perf_counter() - start

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """One forking process for the whole file."""
    workers = Workers()
    yield workers
    workers.close()


def losses(log: Path) -> dict[int, set[str]]:
    """Every loss that any run logged for a step, as exact hexadecimal."""
    seen: dict[int, set[str]] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        step, loss = line.split()
        seen.setdefault(int(step), set()).add(loss)
    return seen


def kill_and_resume(workers: Workers, folder: Path, mode: str, *, kills: int, seed: int) -> None:
    """Compare runs killed at ``kills`` random instants with one that was left alone."""
    model = make_folder("qwen2", folder / "model")

    def job(name: str) -> dict[str, str]:
        return {
            "mode": mode,
            "model": str(model),
            "store": str(folder / f"{name}.store"),
            "log": str(folder / f"{name}.log"),
            "weights": str(folder / f"{name}.safetensors"),
        }

    status, seconds = workers.run(job("whole"), kill_after_seconds=None)
    assert status == 0
    expected, weights = losses(folder / "whole.log"), load_file(folder / "whole.safetensors")
    assert sorted(expected) == list(range(6)) and all(len(v) == 1 for v in expected.values())
    chooser = random.Random(seed)
    killed, run = 0, 0
    while killed < kills:
        name = f"run{run}"
        run += 1
        while True:
            # Instants cover loading, importing, every step and commit, and the end.
            instant = chooser.uniform(0, 1.1 * seconds) if killed < kills else None
            status, _ = workers.run(job(name), kill_after_seconds=instant)
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"{name} failed by itself ({status})"
            killed += 1
        # A kill between a step's commit and its log line leaves that line out; no line may differ.
        seen = losses(folder / f"{name}.log")
        assert seen == {step: expected[step] for step in seen}, name
        found = load_file(folder / f"{name}.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[n], weights[n]) for n in weights), name


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_resumes_with_the_same_bits(
    workers: Workers, tmp_path: Path, mode: str
) -> None:
    kill_and_resume(workers, tmp_path, mode, kills=4, seed=20)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_killed_many_times_resumes_with_the_same_bits(
    workers: Workers, tmp_path: Path, mode: str
) -> None:
    kill_and_resume(workers, tmp_path, mode, kills=40, seed=21)
