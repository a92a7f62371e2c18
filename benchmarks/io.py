"""Disk lanes against fio (and DeepNVMe where deepspeed is installed), beside compute, and commits.

Proves what the README says of the disk: near the best fio can do with direct I/O, huge-page
buffers and the best depth and block size; almost no CPU time; full speed beside a matmul; a
commit that costs next to nothing; a large store that opens at once.

    python benchmarks/io.py --quick --out io.json --folder /nvme/scratch
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.offload.budget import Budget, Tier
from headrace.offload.io import DirectFile, DiskLanes
from headrace.offload.pool import SlabPool
from headrace.offload.store import Region, Store
from headrace.offload.timeline import Timeline

MIB = 1 << 20
GB = 1e9
SLAB_BYTES = 64 * MIB
FIO_CELLS = (
    ("libaio", "1m", 32),
    ("libaio", "4m", 8),
    ("io_uring", "1m", 32),
    ("io_uring", "4m", 8),
    ("libaio", "8m", 4),
)


@dataclass(frozen=True)
class Rate:
    """Bytes per second and CPU seconds per GB of one trial."""

    bytes_per_second: float
    cpu_seconds_per_gb: float


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(nbytes: int, action: Callable[[], None]) -> Rate:
    cpu, start = cpu_seconds(), time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return Rate(nbytes / seconds, (cpu_seconds() - cpu) / (nbytes / GB))


def run_fio(path: Path, direction: str, nbytes: int, cell: tuple[str, str, int]) -> float:
    engine, block, depth = cell
    command = [
        "fio", "--name=x", f"--filename={path}", f"--rw={direction}", f"--size={nbytes}",
        f"--ioengine={engine}", f"--bs={block}", f"--iodepth={depth}", "--direct=1",
        "--overwrite=1", "--output-format=json", "--thread=0",
    ]  # fmt: skip
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job[direction]["bw_bytes"])


class Ours:
    """The lanes over one file, through a ring of slabs that is reused."""

    def __init__(self, path: Path, nbytes: int, lanes: DiskLanes, pool: SlabPool) -> None:
        self._lanes = lanes
        self._pool = pool
        self._nbytes = nbytes
        self._slabs = [pool.acquire(f"ring {index}", SLAB_BYTES) for index in range(3)]
        self.file = DirectFile.create(path, nbytes=nbytes)
        self.write()

    def _stream(self, move: Callable[..., Any]) -> None:
        transfers: list[Any] = []
        for index, offset in enumerate(range(0, self._nbytes, SLAB_BYTES)):
            if len(transfers) >= len(self._slabs):
                transfers[-len(self._slabs)].wait()
            view = self._slabs[index % len(self._slabs)].view
            transfers.append(move(self.file, offset, view, label="stream"))
        for transfer in transfers[-len(self._slabs) :]:
            transfer.wait()

    def read(self) -> None:
        self._stream(self._lanes.read)

    def write(self) -> None:
        self._stream(self._lanes.write)

    def close(self) -> None:
        self.file.close()
        for slab in self._slabs:
            self._pool.release(slab)


def deepnvme_rates(path: Path, nbytes: int) -> dict[str, float]:
    """DeepNVMe with its page-locked buffer, 8 MiB blocks, depth 8."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load().aio_handle(8 * MIB, 8, False, True, 1)
    buffer = handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))
    rates = {}
    for direction, move in (("write", handle.sync_pwrite), ("read", handle.sync_pread)):
        start = time.perf_counter()
        move(buffer, str(path))
        rates[direction] = nbytes / (time.perf_counter() - start)
    handle.free_cpu_locked_tensor(buffer)
    return rates


def compare_rates(folder: Path, nbytes: int, rounds: int, raw: dict[str, Any]) -> None:
    """Interleave the lanes, every fio cell and DeepNVMe, ``rounds`` times."""
    deepnvme = importlib.util.find_spec("deepspeed") is not None
    pool = SlabPool(Budget(Tier.HOST, limit_bytes=4 * SLAB_BYTES))
    with DiskLanes(timeline=Timeline()) as lanes:
        ours = Ours(folder / "ours", nbytes, lanes, pool)
        for _ in range(rounds):
            for direction, action in (("read", ours.read), ("write", ours.write)):
                trial: dict[str, Any] = {"fio": {}}
                before = measured(nbytes, action)
                for cell in FIO_CELLS:
                    name = f"{cell[0]} {cell[1]} qd{cell[2]}"
                    trial["fio"][name] = run_fio(folder / "ours", direction, nbytes, cell)
                after = measured(nbytes, action)
                # Neighbours on both sides: a disk that drifts favours nobody.
                trial["ours"] = (before.bytes_per_second + after.bytes_per_second) / 2
                trial["cpu_seconds_per_gb"] = min(
                    before.cpu_seconds_per_gb, after.cpu_seconds_per_gb
                )
                raw.setdefault(direction, []).append(trial)
            if deepnvme:
                for direction, rate in deepnvme_rates(folder / "deepnvme", nbytes).items():
                    raw[direction][-1]["deepnvme"] = rate
        ours.close()
    pool.close()


def beside_matmul(folder: Path, seconds: float, rounds: int, raw: dict[str, Any]) -> None:
    """Rates of a matmul thread and of disk reads, alone and together."""
    nbytes = 512 * MIB
    pool = SlabPool(Budget(Tier.HOST, limit_bytes=4 * SLAB_BYTES))
    torch.set_num_threads(1)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def matmuls_until(stop: threading.Event) -> float:
        count, start = 0, time.perf_counter()
        while not stop.is_set():
            torch.mm(left, right)
            count += 1
        return count / (time.perf_counter() - start)

    with DiskLanes(timeline=Timeline()) as lanes:
        ours = Ours(folder / "overlap", nbytes, lanes, pool)

        def reads_until(stop: threading.Event) -> float:
            moved, start = 0, time.perf_counter()
            while not stop.is_set():
                ours.read()
                moved += nbytes
            return moved / (time.perf_counter() - start)

        def for_a_while(*works: Callable[[threading.Event], float]) -> list[float]:
            stop, rates = threading.Event(), [0.0] * len(works)

            def run(index: int) -> None:
                rates[index] = works[index](stop)

            threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            stop.set()
            for thread in threads:
                thread.join()
            return rates

        # Short slices in turn, so that whatever else the machine does falls on all alike.
        for _ in range(rounds):
            [reads_alone] = for_a_while(reads_until)
            [matmuls_alone] = for_a_while(matmuls_until)
            reads_beside, matmuls_beside = for_a_while(reads_until, matmuls_until)
            trial = {
                "reads_alone": reads_alone,
                "matmuls_alone": matmuls_alone,
                "reads_beside": reads_beside,
                "matmuls_beside": matmuls_beside,
            }
            raw.setdefault("overlap", []).append(trial)
        ours.close()
    pool.close()


def commit_cost(folder: Path, steps: int, raw: dict[str, Any]) -> None:
    """Steps that read and write 0.5 GB each, with commits that are waited for and that are not."""
    count, nbytes = 8, 64 * MIB
    pool = SlabPool(Budget(Tier.HOST, limit_bytes=3 * SLAB_BYTES))
    slabs = [pool.acquire(f"ring {index}", nbytes) for index in range(2)]
    with (
        DiskLanes(timeline=Timeline()) as lanes,
        Store.create(
            [folder / "store"],
            [Region(f"weights/layers.{index}", nbytes) for index in range(count)],
            durability="step",
            fingerprint={},
            meta=None,
            lanes=lanes,
        ) as store,
    ):
        trials: list[dict[str, Any]] = []
        for step in range(steps + 3):
            waits = step % 2 == 0
            start, waited = time.perf_counter(), store.statistics().waited_for_commit_seconds
            for index in range(count):
                slab, name = slabs[index % 2], f"weights/layers.{index}"
                if store.written(name):
                    store.read(name, slab.view).wait()
                store.write(name, slab.view).wait()
            moved = time.perf_counter()
            # What this step's writes waited for is a cost of the commit before.
            waited = store.statistics().waited_for_commit_seconds - waited
            if trials:
                trials[-1]["blocked_seconds"] += waited
            pending = store.commit_async({"step": step}, blobs={"rng": bytes(5000)})
            if waits:
                pending.wait()
            trials.append(
                {
                    "kind": "commit" if waits else "commit_async",
                    "step_seconds": moved - start - waited,
                    "blocked_seconds": time.perf_counter() - moved,
                }
            )
        # The first two write extents for the first time; the last has no step behind it.
        for trial in trials[2:-1]:
            raw.setdefault(trial.pop("kind"), []).append(trial)
    for slab in slabs:
        pool.release(slab)
    pool.close()


def resume_seconds(folder: Path, raw: dict[str, Any]) -> None:
    """Open a store of 5 GB of regions (10 GB of files) of 32 MiB each."""
    regions = [Region(f"states/layers.{index}", 32 * MIB) for index in range(160)]
    paths = [folder / "large"]
    data = memoryview(bytes(32 * MIB))
    with DiskLanes(timeline=Timeline()) as lanes:
        with Store.create(
            paths, regions, durability="step", fingerprint={}, meta=None, lanes=lanes
        ) as store:
            for region in regions:
                store.write(region.name, data).wait()
            store.commit({})
        start = time.perf_counter()
        Store.open(paths, lanes=lanes).close()
        raw["resume_seconds"] = time.perf_counter() - start
        raw["resume_bytes"] = sum(region.nbytes for region in regions)


def claims_of(raw: dict[str, Any]) -> list[dict[str, Any]]:
    claims: list[tuple[str, float, float, bool]] = []
    for direction in ("read", "write"):
        ratios = [trial["ours"] / max(trial["fio"].values()) for trial in raw[direction]]
        claims.append((f"disk {direction} / best fio", statistics.median(ratios), 0.92, True))
        cpu = statistics.median(trial["cpu_seconds_per_gb"] for trial in raw[direction])
        claims.append((f"disk {direction}: CPU seconds a GB", cpu, 0.02, False))
        if "deepnvme" in raw[direction][0]:
            ratios = [trial["ours"] / trial["deepnvme"] for trial in raw[direction]]
            claims.append((f"disk {direction} / DeepNVMe", statistics.median(ratios), 1.4, True))
    for kind in ("matmuls", "reads"):
        beside, alone = (
            sum(trial[f"{kind}_{how}"] for trial in raw["overlap"]) for how in ("beside", "alone")
        )
        claims.append((f"{kind} kept beside the other", beside / alone, 0.95, True))
    # Training commits without waiting; the commit that is waited for is only printed.
    share = [
        trial["blocked_seconds"] / (trial["step_seconds"] + trial["blocked_seconds"])
        for trial in raw["commit_async"]
    ]
    name = "share of a step that moves 1 GB spent in its commit"
    claims.append((name, statistics.median(share), 0.02, False))
    claims.append(("seconds to open a store of 5 GB", raw["resume_seconds"], 5.0, False))
    return [
        {
            "claim": claim,
            "value": round(value, 4),
            "bar": bar,
            "holds": value >= bar if at_least else value <= bar,
        }
        for claim, value, bar, at_least in claims
    ]


def print_table(raw: dict[str, Any]) -> None:
    print(f"{'':34}{'read GB/s':>12}{'write GB/s':>12}")
    rows = {"headrace": lambda trial: trial["ours"]}
    for cell in raw["read"][0]["fio"]:
        rows[f"fio {cell}"] = lambda trial, cell=cell: trial["fio"][cell]
    if "deepnvme" in raw["read"][0]:
        rows["DeepNVMe, locked buffer"] = lambda trial: trial["deepnvme"]
    for name, pick in rows.items():
        rates = [statistics.median(map(pick, raw[way])) / GB for way in ("read", "write")]
        print(f"{name:34}{rates[0]:12.2f}{rates[1]:12.2f}")
    for kind in ("commit", "commit_async"):
        step = statistics.median(trial["step_seconds"] for trial in raw[kind])
        blocked = statistics.median(trial["blocked_seconds"] for trial in raw[kind])
        print(f"{kind}: {blocked * 1e3:.2f} ms of a step of {step * 1e3:.0f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, within 5 minutes")
    parser.add_argument("--out", type=Path, help="write every raw figure to this JSON file")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    if shutil.which("fio") is None:
        print("fio is missing: install it with your system's packages (apt install fio)")
        return 2
    raw: dict[str, Any] = {}
    nbytes, rounds = (512 * MIB, 3) if arguments.quick else (4096 * MIB, 7)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        compare_rates(folder, nbytes, rounds, raw)
        beside_matmul(folder, 0.5, 60, raw)  # short slices: it takes many to tell 0.95
        commit_cost(folder, 10 if arguments.quick else 40, raw)
        resume_seconds(folder, raw)
    print_table(raw)
    claims = claims_of(raw)
    if arguments.out is not None:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kernel": platform.release(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        }
        report = {"machine": machine, "raw": raw, "claims": claims}
        arguments.out.write_text(json.dumps(report, indent=1))
    for claim in claims:
        print(json.dumps(claim))
    return 0 if all(claim["holds"] for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
