"""Two gloo workers against one: same weights, also after a worker is lost and comes back."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.zo.distributed import OneByte
from headrace.zo.log import read_log
from headrace.zo.step import ZOStep

WORKER = Path(__file__).parent / "zo_worker.py"


def worker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zo_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(mode: str, rank: int, store: Path, log: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), mode, str(rank), "2", store, log, str(steps)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def run_workers(mode: str, folder: Path, store: str, steps: int) -> list[Path]:
    logs = [folder / f"log{rank}" for rank in range(2)]
    children = [start(mode, rank, folder / store, log, steps) for rank, log in enumerate(logs)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    return logs


def single(mode: str, steps: int) -> ZOStep:
    worker = worker_module()
    zo = ZOStep(worker.make_model(), worker.METHODS[mode])
    for step in range(steps):
        if mode == "directions":
            zo.step(lambda model, step=step: worker.loss_on(model, step, 0), batch=step)
            continue
        members = range(len(zo.settings.estimator.members()))
        parts = [
            zo.losses_of(lambda m, step=step, shard=shard: worker.loss_on(m, step, shard), members)
            for shard in range(2)
        ]
        zo.finish_step([(a + b) / 2 for a, b in zip(*parts, strict=True)], batch=step)
    return zo


@pytest.mark.parametrize("mode", ["directions", "data"])
def test_two_workers_equal_one_also_after_one_is_lost(mode: str, tmp_path: Path) -> None:
    expected = dict(single(mode, 8).export())
    logs = run_workers(mode, tmp_path, "first", 5)
    # Worker 1 loses its last steps (torn) and worker 0 everything.
    logs[1].write_bytes(logs[1].read_bytes()[:-7])
    logs[0].unlink()
    logs = run_workers(mode, tmp_path, "second", 8)
    assert logs[0].read_bytes() == logs[1].read_bytes()
    resumed = ZOStep.resume(worker_module().make_model(), logs[0])
    assert resumed.next_step == 8
    for name, tensor in resumed.export():
        assert torch.equal(tensor, expected[name]), name
    resumed.close()


def test_a_worker_is_killed_and_rejoins(tmp_path: Path) -> None:
    """kill -9 of one worker stops the group; started again, it goes on with the same bits."""
    steps = 400
    expected = dict(single("directions", steps).export())
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    children = [
        start("directions", rank, tmp_path / "first", log, steps) for rank, log in enumerate(logs)
    ]
    while all(child.poll() is None for child in children) and not (
        logs[1].exists() and len(read_log(logs[1])[1]) >= 20
    ):
        time.sleep(1e-3)  # polls what the children write; they do not wait for us
    children[1].kill()
    for child in children:
        child.communicate(timeout=120)
    assert children[0].returncode != 0, "a worker alone cannot go on"
    reached = [len(read_log(log)[1]) for log in logs]
    assert max(reached) < steps, "the worker was to be killed in the middle"
    run_workers("directions", tmp_path, "second", steps)
    assert logs[0].read_bytes() == logs[1].read_bytes()
    resumed = ZOStep.resume(worker_module().make_model(), logs[0])
    assert resumed.next_step == steps
    for name, tensor in resumed.export():
        assert torch.equal(tensor, expected[name]), name
    resumed.close()


def test_one_byte_workers_agree_and_learn(tmp_path: Path) -> None:
    logs = run_workers("one byte", tmp_path, "only", 40)
    assert logs[0].read_bytes() == logs[1].read_bytes()
    worker = worker_module()
    _, records = read_log(logs[0])
    assert max(abs(loss) for record in records for loss in record.losses) <= 50.0 * 1e-3
    resumed = ZOStep.resume(worker.make_model(), logs[0])
    fresh = sum(worker.loss_on(worker.make_model(), 99, shard) for shard in range(2))
    with resumed.current():
        assert sum(worker.loss_on(resumed._model, 99, shard) for shard in range(2)) < fresh
    resumed.close()


@given(losses=st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_one_byte_error_is_bounded(losses: list[float]) -> None:
    coder, eps = OneByte(100.0), 1e-1
    mean = sum(losses) / len(losses)
    decoded = coder.decode(coder.encode(losses, eps), eps)
    for loss, value in zip(losses, decoded.tolist(), strict=True):
        wanted = max(-10.0, min(10.0, loss - mean))
        assert abs(value - wanted) <= 10 * (abs(wanted / 10) ** 0.5 / 127 + 1 / 127**2) + 1e-12


def test_one_byte_carries_a_bad_loss() -> None:
    coder = OneByte(1.0)
    assert torch.isnan(coder.decode(coder.encode([1.0, float("inf")], 1e-3), 1e-3)).all()
