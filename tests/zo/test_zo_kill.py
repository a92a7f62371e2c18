"""kill -9 at random instants of a run, then resume: the log of an undisturbed run, to the byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "zo_kill_worker.py"


def start(method: str, log: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), method, str(log), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def killed_run(method: str, folder: Path, *, kills: int, steps: int) -> None:
    calm = start(method, folder / "calm", steps)
    calm.communicate(timeout=120)
    assert calm.returncode == 0
    chance = random.Random(kills)
    done = 0
    for _ in range(kills):
        child = start(method, folder / "killed", steps)
        assert child.stdout is not None
        wanted = min(done + chance.randint(1, max(1, 2 * steps // (kills + 1))), steps - 1)
        while done < wanted:
            line = child.stdout.readline()
            if not line:
                break
            done = int(line)
        # A little later, in the middle of whatever comes next.
        timer = threading.Timer(chance.uniform(0, 5e-3), os.kill, (child.pid, signal.SIGKILL))
        timer.start()
        child.communicate(timeout=120)
        timer.join()
    last = start(method, folder / "killed", steps)
    last.communicate(timeout=120)
    assert last.returncode == 0
    assert (folder / "killed").read_bytes() == (folder / "calm").read_bytes()


def test_killed_once_and_resumed(tmp_path: Path) -> None:
    killed_run("low rank", tmp_path, kills=1, steps=60)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mezo", "low rank"])
def test_killed_fifty_times(method: str, tmp_path: Path) -> None:
    killed_run(method, tmp_path, kills=50, steps=4000)
