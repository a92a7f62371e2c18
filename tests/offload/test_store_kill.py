"""SIGKILL at any instant, inside commits too: the store opens at exactly the last commit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.offload.io import DiskLanes
from headrace.offload.store import Store
from headrace.offload.timeline import Timeline

# The child trains a store whose bytes are a function of the step, until it is killed.  Arguments:
# folder, operation and count of the system call at which it kills itself ("-" and 0 for none).
CHILD = """
import random, sys
from pathlib import Path
from headrace.offload.errors import StoreError
from headrace.offload.faults import Fault, FaultKind, Operation, ScriptedFaults
from headrace.offload.io import DiskLanes
from headrace.offload.store import Region, Store
from headrace.offload.timeline import Timeline

folder, operation, nth = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
faults = []
if nth:
    kind = None if operation == "-" else Operation(operation)
    faults = [Fault(FaultKind.KILL, kind, nth=nth)]
sizes = {"weights/0": 300_000, "states/0": 777, "weights/1": 4096}

def content(name, step):
    return memoryview(random.Random(f"{name} {step}").randbytes(sizes[name]))

with DiskLanes(timeline=Timeline(), request_bytes=65536, faults=ScriptedFaults(faults)) as lanes:
    try:
        store = Store.open([folder], lanes=lanes)
    except StoreError:
        regions = [Region(name, nbytes) for name, nbytes in sizes.items()]
        store = Store.create([folder], regions, durability="step", fingerprint={}, meta=None,
                             lanes=lanes)
    print("ready", flush=True)
    with store:
        pending = None
        while True:
            step = store.step + 1
            for name in sizes:
                store.write(name, content(name, step))
            blobs = {"rng": content("states/0", step).tobytes()}
            if step % 2:
                store.commit({"step": step}, blobs=blobs)
                print(step, flush=True)
            else:
                store.commit_async({"step": step}, blobs=blobs)
"""


def _run_until_killed(folder: Path, chance: random.Random) -> int:
    """Run the child once and return the last step that it said was committed, or 0."""
    inside = chance.random() < 0.5
    operation = chance.choice(["-", "write", "sync", "rename"]) if inside else "-"
    nth = chance.randint(1, {"-": 80, "write": 40, "sync": 20, "rename": 4}[operation])
    arguments = [sys.executable, "-c", CHILD, str(folder), operation, str(nth if inside else 0)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        if not inside:
            assert child.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.0, 0.05))  # the random instant
            child.kill()
        said = child.stdout.read().split()
    assert child.returncode == -signal.SIGKILL
    return max((int(word) for word in said if word != "ready"), default=0)


def _assert_exactly_one_commit(folder: Path, least: int) -> int:
    sizes = {"weights/0": 300_000, "states/0": 777, "weights/1": 4096}
    with DiskLanes(timeline=Timeline()) as lanes, Store.open([folder], lanes=lanes) as store:
        step = store.step
        assert step >= least
        assert store.last_user == {"step": step}
        for name, nbytes in sizes.items():
            view = memoryview(bytearray(nbytes))
            store.read(name, view).wait()
            assert view == random.Random(f"{name} {step}").randbytes(nbytes)
        rng = random.Random(f"states/0 {step}").randbytes(777)
        assert store.last_blobs == {"rng": rng}
    return step


def _kill_many(folder: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    committed = 0
    for _ in range(count):
        said = _run_until_killed(folder, chance)
        if not (folder / "commit.json").exists():
            assert committed == said == 0
            continue
        committed = _assert_exactly_one_commit(folder, max(committed, said))
    assert committed > 0  # the runs did make progress between the kills


def test_killed_at_a_dozen_instants(tmp_path: Path) -> None:
    _kill_many(tmp_path / "run", 12, seed=1)


@pytest.mark.slow
def test_killed_at_two_hundred_instants(tmp_path: Path) -> None:
    for seed in range(4):
        _kill_many(tmp_path / f"run {seed}", 50, seed=seed)
