"""Do disk, copies, compute and updates overlap?  Full fine-tuning of a random Llama from disk.

Claims: in a steady-state step the busiest lane is busy at least 85 % of the time; bytes read and
written per step are within 3 % of the formula (16 read, 14 written per parameter for AdamW with
fp32 master and moments); peak RSS over the import baseline stays under the bar.

    python benchmarks/overlap.py            # 436 M parameters, about 15 GB of free disk
    python benchmarks/overlap.py --quick    # 120 M parameters
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    # hidden, intermediate, layers, vocabulary, device budget, host budget, peak RSS bar in MB
    "full": (1024, 4096, 24, 16000, "250MB", "250MB", 900),
    "quick": (768, 3072, 12, 8000, "220MB", "200MB", 700),
}
BUSY_BAR = 0.85
TRAFFIC_BAR = 0.03


def make_model(folder: Path, size: str) -> None:
    """Save a random bf16 Llama; runs in a process of its own, so that its memory does not count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, vocabulary, *_ = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def memory_mb(key: str) -> float:
    """A field of /proc/self/status in MB (10^6 bytes)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def disk_bytes() -> tuple[int, int]:
    """Bytes this process read from and wrote to disks, as the kernel counts them."""
    with open("/proc/self/io") as counters:
        fields = dict(line.split(": ") for line in counters.read().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def run(folder: Path, store: Path, size: str, steps: int) -> dict[str, Any]:
    """Train and measure every step."""
    import torch

    import headrace
    from headrace.optim import adamw

    *_, device_budget, host_budget, _ = SIZES[size]
    warm = torch.randn(64, 64, dtype=torch.bfloat16)
    warm @ warm
    headrace.load  # noqa: B018 - imports what a run imports, before the baseline is taken
    Path("/proc/self/clear_refs").write_text("5")
    baseline = memory_mb("VmRSS")
    model = headrace.load(
        folder,
        train="all",
        device="cpu",
        device_budget=device_budget,
        host_budget=host_budget,
        store=store,
        micro_batch=1,
        update="backward",
    )
    optimizer = adamw(model, lr=1e-4)
    parameters = sum(p.numel() for p in model.parameters())
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (1, 512), generator=generator)
    rows = []
    for step in range(steps):
        read, written = disk_bytes()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        read, written = (
            after - before for after, before in zip(disk_bytes(), (read, written), strict=True)
        )
        lanes = headrace.statistics(model).last_step.lanes
        rows.append(
            {
                "step": step,
                "seconds": seconds,
                "loss": float(loss.detach()),
                "read_bytes_per_parameter": read / parameters,
                "written_bytes_per_parameter": written / parameters,
                "busy": {lane.value: s.busy_seconds / seconds for lane, s in lanes.items()},
            }
        )
    peak = memory_mb("VmHWM") - baseline
    budgets = {
        tier.value: {"peak_bytes": b.peak_bytes, "limit_bytes": b.limit_bytes}
        for tier, b in headrace.statistics(model).budgets.items()
    }
    model.close()
    return {
        "parameters": parameters,
        "rows": rows,
        "peak_rss_over_baseline_mb": peak,
        "budgets": budgets,
    }


def report(result: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """Print the table; return the claims."""
    lanes = list(result["rows"][0]["busy"])
    print(f"{result['parameters'] / 1e6:.0f} M parameters, 512 tokens, busy share of each lane")
    print("step  seconds  read/p  written/p  " + "  ".join(f"{lane:>10}" for lane in lanes))
    for row in result["rows"]:
        print(
            f"{row['step']:4d}  {row['seconds']:7.2f}  {row['read_bytes_per_parameter']:6.2f}  "
            f"{row['written_bytes_per_parameter']:9.2f}  "
            + "  ".join(f"{row['busy'][lane]:10.2f}" for lane in lanes)
        )
    # The first step starts from an empty store and an unlearnt schedule, the second settles it.
    steady = result["rows"][2:]
    busiest = statistics.median(max(row["busy"].values()) for row in steady)
    read = statistics.median(row["read_bytes_per_parameter"] for row in steady)
    written = statistics.median(row["written_bytes_per_parameter"] for row in steady)
    peak = result["peak_rss_over_baseline_mb"]
    bar = SIZES[size][-1]
    print(f"peak RSS over the import baseline: {peak:.0f} MB; budgets {result['budgets']}")
    return [
        {
            "claim": "busiest lane's share of a steady step",
            "value": round(busiest, 3),
            "bar": BUSY_BAR,
            "holds": busiest >= BUSY_BAR,
        },
        {
            "claim": "bytes read per parameter and step over the formula's 16",
            "value": round(read / 16, 3),
            "bar": 1 + TRAFFIC_BAR,
            "holds": read <= 16 * (1 + TRAFFIC_BAR),
        },
        {
            "claim": "bytes written per parameter and step over the formula's 14",
            "value": round(written / 14, 3),
            "bar": 1 + TRAFFIC_BAR,
            "holds": written <= 14 * (1 + TRAFFIC_BAR),
        },
        {
            "claim": "peak RSS over the import baseline, MB",
            "value": round(peak),
            "bar": bar,
            "holds": peak < bar,
        },
    ]


def main() -> int:
    """Run the benchmark; 0 only if every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, the same bars")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write every raw figure to this JSON file")
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = "quick" if arguments.quick else "full"
    if arguments.make_model is not None:
        make_model(arguments.make_model, size)
        return 0
    work = Path(tempfile.mkdtemp(prefix="headrace-overlap-", dir=arguments.folder))
    try:
        command = [sys.executable, __file__, "--make-model", str(work / "model")]
        subprocess.run([*command, *(["--quick"] if arguments.quick else [])], check=True)
        result = run(work / "model", work / "store", size, arguments.steps)
    finally:
        shutil.rmtree(work)
    claims = report(result, size)
    for claim in claims:
        print(json.dumps(claim))
    if arguments.out is not None:
        import torch
        import transformers

        machine = {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }
        arguments.out.write_text(json.dumps({"machine": machine, **result, "claims": claims}))
    return 0 if all(claim["holds"] for claim in claims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
