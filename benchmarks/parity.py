"""The same gradients through our optimizers and the reference packages for 50 steps.

Every row says how far the weights end apart, relative to how far they moved, and why where that
is on purpose.  Gradients are a noisy pull to a low-rank target, so both sides see the same ones.

    python benchmarks/parity.py --out parity.json
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from optim_common import claim, finish, parse, peer

from headrace.optim import adamw, galore_adamw

LR = 1e-3
STEPS = 50
Make = Callable[[torch.nn.Parameter], torch.optim.Optimizer]


def main() -> int:
    """Run every pair, print the table and the claims; return 0 only if all hold."""
    arguments = parse((__doc__ or "").split("\n")[0])
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    side = 128 if arguments.quick else 256
    rows = {name: distance(ours, theirs, side) for name, (ours, theirs, _, _) in pairs().items()}
    print(f"{'pair':34s} {'apart/moved':>12s} {'bar':>8s}  difference")
    claims = []
    for name, (_, _, bar, why) in pairs().items():
        print(f"{name:34s} {rows[name]:12.2e} {bar:8.0e}  {why}")
        claims.append(claim(f"{name}: distance over movement", rows[name], bar, at_least=False))
    return finish(arguments, {"rows": rows}, claims)


def pairs() -> dict[str, tuple[Make, Make, float, str]]:
    """Return name -> (ours, theirs, bar, why they may differ)."""
    torchao, bitsandbytes = peer("torchao.optim"), peer("bitsandbytes")
    galore = peer("galore_torch")
    common: dict[str, Any] = {"lr": LR, "weight_decay": 0.01}

    def low_rank(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        group = {"params": [parameter], "rank": 16, "update_proj_gap": 200, "scale": 0.25,
                 "proj_type": "std"}  # fmt: skip
        optimizer: torch.optim.Optimizer = galore.GaLoreAdamW([group], lr=LR, weight_decay=0.0)
        return optimizer

    def states(name: str) -> Make:
        return lambda p: adamw([p], states=name, **common)

    return {
        "fp32, torch eager": (
            states("fp32"),
            lambda p: torch.optim.AdamW([p], foreach=False, **common),
            1e-5,
            "bias corrections multiply: a few roundings of the update",
        ),
        "fp32, torch fused": (
            states("fp32"),
            lambda p: torch.optim.AdamW([p], fused=True, **common),
            1e-5,
            "the same",
        ),
        "8-bit dynamic, torchao": (
            states("int8_dynamic"),
            lambda p: torchao.AdamW8bit([p], **common),
            1e-3,
            "update from fp32 moments on both sides; we lift second moments off code 0",
        ),
        "8-bit dynamic, bitsandbytes": (
            states("int8_dynamic"),
            lambda p: bitsandbytes.optim.AdamW8bit([p], min_8bit_size=1, **common),
            0.02,
            "its CPU kernel rounds through a coarse table and moves zeros",
        ),
        "4-bit, torchao": (
            states("int4_torchao"),
            lambda p: torchao.AdamW4bit([p], block_size=128, **common),
            1e-3,
            "the same codes; ties may round the other way",
        ),
        "FP8, torchao": (
            states("fp8"),
            lambda p: torchao.AdamWFp8([p], **common),
            0.1,
            "states are rounded stochastically here, to nearest there",
        ),
        "GaLore, galore-torch": (
            lambda p: galore_adamw(
                [{"params": [p], "rank": 16}], lr=LR, eps=1e-6, method="svd", carry="keep"
            ),
            low_rank,
            5e-3,
            "eps after bias correction (there before); state 0.375 bytes, not 4.25",
        ),
    }


def distance(ours: Make, theirs: Make, side: int) -> float:
    """Return |ours - theirs| / |moved| after the last step."""
    start = torch.randn(side, 2 * side)
    target = torch.randn(side, 8) @ torch.randn(8, 2 * side) / 3
    mine, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [ours(mine), theirs(other)]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(start.shape, generator=generator)
        gradient = 1e-2 * (start - target + noise)
        for parameter, optimizer in zip((mine, other), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (other.detach() - start).norm()
    return float((mine.detach() - other.detach()).norm() / moved)


if __name__ == "__main__":
    sys.exit(main())
