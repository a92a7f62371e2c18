"""Held-out loss and state bytes of every recipe against fp32 AdamW.

A small Llama with bf16 weights is trained from scratch on the bytes of the text that the package
ships, with the same batches, schedule and seeds for every recipe.  Rank is a quarter of the width.
AdamW in every encoding runs at the rate that was best for fp32 AdamW of four (5e-4 to 4e-3, 200
steps, ``--grid``, on text that neither trains nor tests).  GaLore, APOLLO, Fira, FRUGAL, GRASS,
APOLLO-Mini, Lion, Adafactor, SGD and signSGD had two to four rates each; APOLLO's and Lion's best
was the largest tried.  FRUGAL also had three scales of its signs, tried after its first held-out
losses were seen.  The other rows take over the rate of their nearest relative.  Three repeats
spread by up to 2 % between encodings of AdamW: a mean below 1 is noise, not a gain.

Every finished run is written to ``--out`` at once, and runs found there are not repeated.

    python benchmarks/quality.py --out quality.json --plot quality.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from optim_common import claim, finish
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from headrace import optim
from headrace.demo import demo_data

WIDTH, LENGTH, BATCH = 128, 128, 4
RANK = WIDTH // 4
BASE = "AdamW"
Recipe = Callable[[nn.Module, float], optim.RuleOptimizer]
Run = dict[str, Any]

#: Loss over AdamW's as published, largest of the sizes that the paper pre-trains on C4; ratios of
#: the logarithms of perplexities at rank h/4.  Baselines differ by more than the gaps do
#: (AdamW at 60 M: 34.06 in GaLore's and APOLLO's tables, 30.05 in SCALE's, arXiv:2506.16659).
PUBLISHED = {
    "GaLore": (math.log(34.88) / math.log(34.06), "arXiv:2403.03507, table 2, 60 M"),
    "APOLLO": (math.log(31.55) / math.log(34.06), "arXiv:2412.05270, table 2, 60 M"),
    "APOLLO-Mini": (math.log(31.93) / math.log(34.06), "arXiv:2412.05270, table 2, 60 M"),
    "Fira": (math.log(31.06) / math.log(34.06), "arXiv:2412.05270, table 2, 60 M"),
}

#: Methods that beat their papers' AdamW are held to ours, which was given the same choice of rates;
#: so is FRUGAL (arXiv:2411.07837), whose table we do not have.
BARS = {
    "GaLore": PUBLISHED["GaLore"][0],
    "APOLLO": 1.0,
    "FRUGAL": 1.0,
    "Fira": 1.0,
}
CLOSE = ("AdamW, split master", "AdamW int8", "AdamW FP8, range expansion", "AdamW FP8")


def recipes() -> dict[str, tuple[Recipe, float]]:
    """Return every recipe with its learning rate; those with claims come first."""
    low: dict[str, Any] = {"rank": RANK, "update_proj_gap": 50}
    full: dict[str, Recipe] = {
        BASE: optim.adamw,
        "AdamW, split master": lambda m, lr: optim.adamw(m, lr, master="split"),
        "AdamW int8": optim.adamw_8bit,
        "AdamW FP8, range expansion": optim.adamw_fp8,
        "AdamW FP8": lambda m, lr: optim.adamw_fp8(m, lr, states="fp8"),
    }
    low_rank: dict[str, tuple[Recipe, float]] = {
        "GaLore": (lambda m, lr: optim.galore_adamw(m, lr, scale=1.0, **low), 4e-3),
        "APOLLO": (lambda m, lr: optim.apollo(m, lr, **low), 1.6e-2),
        # Signs of gradients of 512 tokens are noisy: at the full rate they cost 3 % of the loss.
        "FRUGAL": (
            lambda m, lr: optim.frugal(m, lr, update_gap=50, inactive_lr_scale=0.1), 4e-3,
        ),
        "Fira": (lambda m, lr: optim.fira(m, lr, alpha=1.0, **low), 4e-3),
    }  # fmt: skip
    others: dict[str, tuple[Recipe, float]] = {
        "AdamW, stochastic rounding": (lambda m, lr: optim.adamw(m, lr, master="sr"), LR),
        "AdamW bf16": (lambda m, lr: optim.adamw(m, lr, states="bf16"), LR),
        "AdamW int8, dynamic map": (
            lambda m, lr: optim.adamw_8bit(m, lr, states="int8_dynamic"), LR,
        ),
        "AdamW FP8-LM": (lambda m, lr: optim.adamw_fp8(m, lr, states="fp8_lm"), LR),
        "AdamW int4": (optim.adamw_4bit, LR),
        "AdamW int4, torchao": (lambda m, lr: optim.adamw_4bit(m, lr, states="int4_torchao"), LR),
        "StableAdamW": (optim.stable_adamw, LR),
        "Adam-mini": (optim.adam_mini, LR),
        "Lion": (optim.lion, 1e-3),
        "Lion int8": (optim.lion_8bit, 1e-3),
        "Adafactor": (optim.adafactor, 2e-3),
        "SGD, momentum": (lambda m, lr: optim.sgd(m, lr, momentum=0.9), 0.2),
        "signSGD": (optim.sign_sgd, 5e-4),
        "GaLore, as published": (
            lambda m, lr: optim.galore_adamw(
                m, lr, scale=1.0, method="svd", carry="keep", **low
            ), 4e-3,
        ),
        "FRUGAL, signs at the full rate": (
            lambda m, lr: optim.frugal(m, lr, update_gap=50), 4e-3,
        ),
        "GaLore int8": (lambda m, lr: optim.galore_adamw_8bit(m, lr, scale=1.0, **low), 4e-3),
        "Q-GaLore": (lambda m, lr: optim.q_galore(m, lr, scale=1.0, **low), 4e-3),
        "Natural GaLore": (lambda m, lr: optim.natural_galore(m, lr, scale=1.0, **low), 4e-3),
        "GRASS": (lambda m, lr: optim.grass(m, lr, scale=1.0, **low), 8e-3),
        "APOLLO-Mini": (lambda m, lr: optim.apollo_mini(m, lr, update_proj_gap=50), 4e-3),
        "Q-GaLore, INT8 weights": (q_galore_int8, 4e-3),
        "LoQT, NF4 weights": (loqt, 4e-3),
        "AdamW, momentum reset": (lambda m, lr: optim.adamw(m, lr, restart_every=100), LR),
    }  # fmt: skip
    return {name: (recipe, LR) for name, recipe in full.items()} | low_rank | others


def loqt(model: nn.Module, lr: float) -> optim.RuleOptimizer:
    """Return 8-bit AdamW on LoQT's factors, merged into 4-bit weights every 50 steps."""
    optim.attach_loqt(model, rank=RANK)
    optimizer = optim.adamw_8bit(model, lr)
    optim.LoqtMerges(model, optimizer, gap=50)
    return optimizer


def q_galore_int8(model: nn.Module, lr: float) -> optim.RuleOptimizer:
    """Return 8-bit AdamW on the coordinates of weights that are kept in INT8."""
    settings = optim.Int8Settings(rank=RANK, update_proj_gap=50, scale=1.0)
    optim.attach_int8(model, settings)
    optimizer = optim.adamw_8bit(model, lr, master="sr")
    optim.Int8Updates(model, optimizer)
    return optimizer


#: AdamW's rate, whatever keeps its states.
LR = 2e-3


def main() -> int:
    """Run what is missing, print the table and the claims; return 0 only if all hold."""
    arguments = parse()
    steps = arguments.steps or (60 if arguments.quick else 250)
    seeds = [0] if arguments.quick or arguments.grid else [0, 1, 2]
    train, tune, held_out = text()
    if arguments.grid:
        grid(arguments.grid, steps, train, tune)
        return 0
    runs = finished(arguments.out, steps)
    for name, seed in [] if arguments.table else order(seeds):
        recipe, lr = recipes()[name]
        if not any((r["recipe"], r["seed"], r["lr"]) == (name, seed, lr) for r in runs):
            runs = [r for r in runs if (r["recipe"], r["seed"]) != (name, seed)]
            run = trained(recipe, lr, seed, steps, train, held_out)
            runs.append({"recipe": name, "seed": seed, "lr": lr, **run})
            print(f"{name}, seed {seed}: {run['loss']:.4f}", file=sys.stderr, flush=True)
            if arguments.out:
                finish(arguments, {"steps": steps, "runs": runs}, [])
    rows = table(runs, seeds)
    if arguments.plot:
        plot(rows, arguments.plot)
    claims = [
        claim(f"{name}: loss over fp32 AdamW", rows[name]["over_adamw"], 1.005, at_least=False)
        for name in CLOSE
    ] + [
        claim(f"{name}, rank h/4: loss over AdamW", rows[name]["over_adamw"], bar, at_least=False)
        for name, bar in BARS.items()
    ]
    published = {name: {"over_adamw": v, "source": s} for name, (v, s) in PUBLISHED.items()}
    figures = {"steps": steps, "seeds": seeds, "rows": rows, "published": published, "runs": runs}
    return finish(arguments, figures, claims)


def parse() -> argparse.Namespace:
    """Return the arguments: those of every benchmark, and the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file of every figure; resumed from")
    parser.add_argument("--plot", type=Path, help="PNG of the table")
    parser.add_argument("--table", action="store_true", help="run nothing: show what --out holds")
    parser.add_argument("--quick", action="store_true", help="60 steps, one seed, the same bars")
    parser.add_argument("--steps", type=int, help="steps of every run")
    parser.add_argument(
        "--grid", nargs="*", metavar="RECIPE=RATE", help="print the loss of these instead"
    )
    return parser.parse_args()


def order(seeds: list[int]) -> list[tuple[str, int]]:
    """Return the runs: recipes with claims first, all their seeds."""
    first = [BASE, *CLOSE, *BARS]
    rest = [name for name in recipes() if name not in first]
    return [(name, seed) for part in (first, rest) for seed in seeds for name in part]


def finished(out: Path | None, steps: int) -> list[Run]:
    """Return the runs of an earlier, stopped or complete, call with the same number of steps."""
    if out is None or not out.exists():
        return []
    saved = json.loads(out.read_text())
    known = recipes()
    return [r for r in saved["runs"] if r["recipe"] in known] if saved["steps"] == steps else []


def grid(pairs: list[str], steps: int, train: Tensor, tune: Tensor) -> None:
    """Print the loss on the tuning text of every RECIPE=RATE."""
    for pair in pairs:
        name, rate = pair.rsplit("=", 1)
        run = trained(recipes()[name][0], float(rate), 0, steps, train, tune)
        print(f"{name:28s} {float(rate):8.1e} {run['loss']:8.4f} {run['seconds']:6.1f} s",
              flush=True)  # fmt: skip


def table(runs: list[Run], seeds: list[int]) -> dict[str, Run]:
    """Print and return the means over the seeds; spread is over seeds, of ratios seed by seed."""
    by = {(run["recipe"], run["seed"]): run for run in runs}
    print(f"{'recipe':28s} {'rate':>7s} {'loss':>7s} {'/ AdamW':>8s} {'spread':>7s} "
          f"{'runs':>4s} {'paper':>7s} {'state B/p':>9s}")  # fmt: skip
    rows: dict[str, Run] = {}
    for name in [name for name in recipes() if (name, seeds[0]) in by]:
        own = [by[name, seed] for seed in seeds if (name, seed) in by]
        ratios = [run["loss"] / by[BASE, run["seed"]]["loss"] for run in own]
        rows[name] = {
            "lr": own[0]["lr"],
            "loss": statistics.mean(run["loss"] for run in own),
            "over_adamw": statistics.mean(ratios),
            "spread": max(ratios) - min(ratios),
            "repeats": len(own),
            "state_bytes_per_parameter": own[0]["state_bytes_per_parameter"],
        }
        row = rows[name]
        paper = f"{PUBLISHED[name][0]:7.4f}" if name in PUBLISHED else " " * 7
        print(f"{name:28s} {row['lr']:7.0e} {row['loss']:7.4f} {row['over_adamw']:8.4f} "
              f"{row['spread']:7.4f} {row['repeats']:4d} {paper} "
              f"{row['state_bytes_per_parameter']:9.3f}")  # fmt: skip
    return rows


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Return the bytes of the shipped text: 80 % to train on, 10 % to tune on, 10 % held out."""
    lines = demo_data().read_text(encoding="utf-8").splitlines()
    joined = "\n\n".join(json.loads(line)["text"] for line in lines).encode()
    data = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
    first, second = data.numel() * 8 // 10, data.numel() * 9 // 10
    return data[:first], data[first:second], data[second:]


def trained(
    recipe: Recipe, lr: float, seed: int, steps: int, train: Tensor, held_out: Tensor
) -> Run:
    """Train one model; return its loss on all of ``held_out``, state bytes and seconds."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH,
            attn_implementation="eager",  # faster than the fused kernel at this size
        )
    ).bfloat16()  # fmt: skip
    count = sum(p.numel() for p in model.parameters())
    optimizer = recipe(model, lr)
    start = time.process_time()
    for step in range(steps):
        warm = min((step + 1) / (steps / 10), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (1.0 - 0.9 * step / steps)
        model(input_ids=(ids := batch(train, seed, step)), labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - start
    rows = held_out[: held_out.numel() // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in rows.split(32)]
    return {
        "loss": sum(losses) / len(rows),
        "state_bytes_per_parameter": sum(optimizer.memory().values()) / count,
        "seconds": seconds,
    }


def batch(data: Tensor, seed: int, step: int) -> Tensor:
    """Return (BATCH, LENGTH) random windows."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, data.numel() - LENGTH, (BATCH,), generator=generator)
    return torch.stack([data[s : s + LENGTH] for s in starts.tolist()])


def plot(rows: dict[str, Run], path: Path) -> None:
    """Draw loss over state bytes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for name, row in rows.items():
        point = (row["state_bytes_per_parameter"], row["over_adamw"])
        axes.scatter(*point)
        axes.annotate(name, point, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("state bytes a parameter (master included)")
    axes.set_ylabel("held-out loss over fp32 AdamW's")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
