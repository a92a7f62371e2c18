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

from headrace.optim import adamw, apollo, galore_adamw, lion
from headrace.optim.projector import RandomProjector
from headrace.optim.seeds import fold_in, parameter_seed

LR = 1e-3
STEPS = 50
Make = Callable[[torch.nn.Parameter], torch.optim.Optimizer]


def main() -> int:
    """Run every pair, print the table and the claims; return 0 only if all hold."""
    arguments = parse((__doc__ or "").split("\n")[0])
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    side = 128 if arguments.quick else 256
    rows = {}
    print(f"{'pair':34s} {'apart/moved':>12s} {'bar':>8s} {'worst':>8s}  difference")
    for name, (ours, theirs, bar, why) in pairs().items():
        rows[name] = row = {**distance(ours, theirs, side), "bar": bar, "difference": why}
        print(f"{name:34s} {row['apart_over_moved']:12.2e} {bar:8.0e} "
              f"{row['worst_over_largest_weight']:8.1e}  {why}", flush=True)  # fmt: skip
    claims = [
        claim(
            f"{name}: distance over movement", row["apart_over_moved"], row["bar"], at_least=False
        )
        for name, row in rows.items()
    ]
    worst = rows["fp32, torch eager"]["worst_over_largest_weight"]
    claims.append(
        claim("fp32, torch eager: worst over largest weight", worst, 1e-6, at_least=False)
    )
    return finish(arguments, {"rows": rows}, claims)


def pairs() -> dict[str, tuple[Make, Make, float, str]]:
    """Return name -> (ours, theirs, bar, why they may differ)."""
    torchao, bitsandbytes = peer("torchao.optim"), peer("bitsandbytes")
    galore, apollo_torch = peer("galore_torch"), peer("apollo_torch")
    common: dict[str, Any] = {"lr": LR, "weight_decay": 0.01}

    def low_rank(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        group = {"params": [parameter], "rank": 16, "update_proj_gap": 200, "scale": 0.25,
                 "proj_type": "std"}  # fmt: skip
        optimizer: torch.optim.Optimizer = galore.GaLoreAdamW([group], lr=LR, weight_decay=0.0)
        return optimizer

    def their_apollo(parameter: torch.nn.Parameter, proj: str) -> torch.optim.Optimizer:
        group = {"params": [parameter], "rank": 16, "update_proj_gap": 20, "scale": 4.0,
                 "scale_type": "channel", "proj": proj, "proj_type": "std"}  # fmt: skip
        optimizer: torch.optim.Optimizer = apollo_torch.APOLLOAdamW([group], lr=LR, eps=1e-8)
        if proj == "random":
            optimizer.state[parameter]["projector"] = OurProjection()
        return optimizer

    def our_apollo(parameter: torch.nn.Parameter, proj: str) -> torch.optim.Optimizer:
        group = {"params": [parameter], "rank": 16, "update_proj_gap": 20, "scale": 4.0,
                 "proj": proj}  # fmt: skip
        return apollo([group], lr=LR)

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
            "eps after bias correction (there before); the state is r (m + 2n), not m^2 + 2nr",
        ),
        "APOLLO on the SVD, apollo-torch": (
            lambda p: our_apollo(p, "svd"),
            lambda p: their_apollo(p, "svd"),
            1e-3,
            "eps after bias correction (there before)",
        ),
        "APOLLO, apollo-torch": (
            lambda p: our_apollo(p, "random"),
            lambda p: their_apollo(p, "random"),
            1e-3,
            "the same, given our noise; other generators draw other projections",
        ),
        "Lion 8-bit, bitsandbytes": (
            lambda p: lion([p], lr=LR, states="int8_dynamic"),
            lambda p: bitsandbytes.optim.Lion8bit([p], lr=LR, min_8bit_size=1),
            0.05,
            "its CPU kernel rounds through a coarse table; a sign that flips moves 2 lr",
        ),
    }


class OurProjection:
    """What apollo-torch asks of its projector, with the noise that our optimizer draws."""

    def project(self, grad: torch.Tensor, step: int) -> torch.Tensor:
        """Return the coordinates of a gradient at a step that counts from 0."""
        projector = RandomProjector(16)
        seed = fold_in(parameter_seed(0, "0.0"), step // 20)
        return projector.down(grad, projector.basis(*grad.shape, {}, seed))


def distance(ours: Make, theirs: Make, side: int) -> dict[str, Any]:
    """Return |ours - theirs| / |moved| after the last step, and the worst single weight."""
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
    apart = mine.detach() - other.detach()
    return {
        "apart_over_moved": float(apart.norm() / moved),
        "worst_over_largest_weight": float(apart.abs().max() / other.detach().abs().max()),
    }


if __name__ == "__main__":
    sys.exit(main())
