"""kill -9 at random instants of a streamed run with a store: weights and log of a calm run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import final

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

WORKER = Path(__file__).parent / "zo_streamed_kill_worker.py"
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    tie_word_embeddings=False,
)


@final
class Worker:
    """The process that forks runs; one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, method: str, model: Path, folder: Path, steps: int) -> int:
        """Begin a run; returns its process id."""
        folder.mkdir(exist_ok=True)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{method} {model} {folder} {steps}\n")
        self._process.stdin.flush()
        return int(self.line("pid"))

    def line(self, *kinds: str) -> str:
        """The rest of the next line of one of these kinds; an end of the run is always told."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            kind, _, rest = line.strip().partition(" ")
            if kind in kinds:
                return rest
            if kind == "exit":
                return f"exit {rest}"
        raise AssertionError("the worker died")


@pytest.fixture
def worker() -> Iterator[Worker]:
    command = [sys.executable, str(WORKER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Worker(process)
        assert process.stdin is not None
        process.stdin.close()


def killed_run(worker: Worker, method: str, folder: Path, *, kills: int, steps: int) -> None:
    torch.manual_seed(0)
    model = folder / "model"
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(model)
    worker.start(method, model, folder / "calm", steps)
    calm = worker.line("weights")
    assert not calm.startswith("exit")
    assert worker.line("exit") == "0"
    chance = random.Random(kills)
    done, died = 0, 0
    for _ in range(kills):
        child = worker.start(method, model, folder / "killed", steps)
        worker.line("ready")
        # Some die while they open their store, or make it.
        ahead = chance.choice((0, chance.randint(1, max(1, 2 * steps // kills))))
        wanted = min(done + ahead, steps - 1)
        while done < wanted:
            text = worker.line("step")
            assert not text.startswith("exit"), text
            done = int(text)
        timer = threading.Timer(chance.uniform(0, 2e-2), os.kill, (child, signal.SIGKILL))
        timer.start()
        while not (text := worker.line("step", "exit")).startswith("-"):
            assert not text.startswith("exit"), text
            done = int(text)
        timer.join()
        died += text == "-9"
    assert died == kills
    worker.start(method, model, folder / "killed", steps)
    assert worker.line("weights") == calm
    assert worker.line("exit") == "0"
    assert (folder / "killed" / "log").read_bytes() == (folder / "calm" / "log").read_bytes()


def test_killed_three_times(worker: Worker, tmp_path: Path) -> None:
    killed_run(worker, "mezo", tmp_path, kills=3, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mezo", "lowrank"])
def test_killed_fifty_times(method: str, worker: Worker, tmp_path: Path) -> None:
    killed_run(worker, method, tmp_path, kills=50, steps=500)
