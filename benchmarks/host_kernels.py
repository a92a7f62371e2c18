"""Host update kernels against the memory, torch, bitsandbytes, torchao and DeepSpeed.

One run, interleaved, one thread each: fused AdamW on bf16 weights and gradients against a loop
that moves the same 28 bytes a parameter with trivial arithmetic, against torch's fused AdamW with
its casts, against 8-bit peers; and GaLore's basis refresh against the reference SVD.  Ratios are
medians over rounds of CPU seconds, which other work on the machine disturbs least.

    python benchmarks/host_kernels.py --quick --out host_kernels.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from optim_common import claim, finish, interleave, parse, peer, ratio

from headrace.optim.adam import Adam
from headrace.optim.base import StepContext
from headrace.optim.choose import fast_rule
from headrace.optim.host.bits import host_view
from headrace.optim.projector import OrthogonalProjector
from headrace.optim.spec import allocate
from headrace.optim.streamed import UpdateRule

HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@njit(nogil=True, error_model="numpy")
def mimic(weight: Any, grad: Any, master: Any, m: Any, v: Any) -> None:
    """Read and write what mixed-precision AdamW does, with next to no arithmetic."""
    one = np.float32(0.5)
    for i in range(weight.shape[0]):
        g = np.float32(grad[i])
        m[i] = m[i] + g
        v[i] = v[i] * one
        master[i] = master[i] * one
        weight[i] = grad[i]


def main() -> int:
    """Run, print the table and the claims; return 0 only if all hold."""
    arguments = parse((__doc__ or "").split("\n")[0])
    torch.set_num_threads(1)
    count = 24_000_000 if arguments.quick else 100_000_000
    times = interleave(kernels(count), 5 if arguments.quick else 9)
    small = 400_000 if arguments.quick else 4_000_000
    peers = interleave(low_bit(small), 3)
    refresh = basis(arguments)
    table(times, count)
    table(peers, small)
    print(f"{'basis refresh':42s} {refresh}")
    claims = [
        claim("fused AdamW over a 28-byte traffic loop, speed", 1 / ratio(times, "adamw", "mimic"),
              0.95, at_least=True),
        claim("over torch fused AdamW with its casts, speed", ratio(times, "torch fused", "adamw"),
              1.4, at_least=True),
        claim("stochastic over nearest rounding of the same states, time",
              ratio(times, "adamw sr", "adamw"), 1.05, at_least=False),
        claim("int8 states over fp32 states, time", ratio(times, "adamw int8", "adamw"), 1.1,
              at_least=False),
        claim("bitsandbytes AdamW8bit over our int8, time", ratio(peers, "bitsandbytes", "int8"),
              15.0, at_least=True),
        claim("torchao AdamW8bit over our int8, time", ratio(peers, "torchao", "int8"), 15.0,
              at_least=True),
        claim("reference SVD over the basis refresh, time", refresh["speedup"], 40.0,
              at_least=True),
        claim("energy that the refreshed basis captures, of the optimum", refresh["energy"], 0.995,
              at_least=True),
    ]  # fmt: skip
    return finish(arguments, {"count": count, "seconds": times, "peers": peers,
                              "refresh": refresh}, claims)  # fmt: skip


def kernels(count: int) -> dict[str, Callable[[], None]]:
    """Return the candidates that update ``count`` bf16 weights from bf16 gradients."""
    grad = (torch.randn(count) * 1e-2).bfloat16()
    out: dict[str, Callable[[], None]] = {}
    weight, master = torch.randn(count).bfloat16(), torch.randn(count)
    m, v = torch.zeros(count), torch.zeros(count)
    views = [host_view(t) for t in (weight, grad, master, m, v)]
    out["mimic"] = lambda: mimic(*views)
    for name, states, kind in (("adamw", "fp32", "fp32"), ("adamw split", "fp32", "split"),
                               ("adamw sr", "fp32", "sr"), ("adamw int8", "int8", "fp32"),
                               ("adamw int8 split", "int8", "split")):  # fmt: skip
        out[name] = updater(fast_rule(Adam(), states, kind), count, grad)
    step = torch.tensor(3.0)

    def fused() -> None:
        wide = grad.float()
        torch._fused_adamw_(
            [master], [wide], [m], [v], [], [step], lr=1e-4, beta1=0.9, beta2=0.999,
            weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        weight.copy_(master)

    out["torch fused"] = fused
    return out


def updater(rule: UpdateRule, count: int, grad: torch.Tensor) -> Callable[[], None]:
    """Return a call that does one more step of a rule."""
    weight = torch.randn(count).bfloat16()
    states = allocate(rule.state_spec((count,), torch.bfloat16), "cpu")
    rule.init_states(weight, states)
    steps = iter(range(1, 1 << 30))
    return lambda: rule.update(
        weight, grad, states, step=next(steps), hyper=HYPER, seed=1, element_offset=0
    )


def low_bit(count: int) -> dict[str, Callable[[], None]]:
    """Return 8-bit AdamW of ours, of bitsandbytes and of torchao, on fp32 parameters."""
    bitsandbytes, torchao = peer("bitsandbytes"), peer("torchao.optim")
    out: dict[str, Callable[[], None]] = {}
    rule = fast_rule(Adam(), "int8", "fp32")
    grad = torch.randn(count) * 1e-2
    out["int8"] = updater(rule, count, grad)
    side = int(count**0.5) // 256 * 256
    for name, cls in (("bitsandbytes", bitsandbytes.optim.AdamW8bit),
                      ("torchao", torchao.AdamW8bit)):  # fmt: skip
        parameter = torch.nn.Parameter(torch.randn(side, count // side // 256 * 256))
        parameter.grad = torch.randn_like(parameter) * 1e-2
        optimizer = cls([parameter], lr=1e-4)
        out[name] = optimizer.step
    return out


def basis(arguments: argparse.Namespace) -> dict[str, float]:
    """Refresh a GaLore basis of a drifting low-rank gradient; compare with the full SVD."""
    side, rank = (1024, 128) if arguments.quick else (2048, 128)
    torch.manual_seed(0)
    spectrum = torch.arange(1, side + 1).float().pow(-0.8)
    left, right = (torch.linalg.qr(torch.randn(side, side))[0] for _ in range(2))
    first = left * spectrum @ right.T
    second = first + 0.05 * spectrum.mean() * torch.randn(side, side)
    projector = OrthogonalProjector(rank)
    slots = projector.slots(side, side)
    states = allocate({name: slot.spec for name, slot in slots.items()}, "cpu")
    weight = torch.zeros(side, side)
    projector.refresh(first, states, StepContext(1, HYPER, 0, 0, weight))
    exact: list[torch.Tensor] = []

    def ours() -> None:
        projector.refresh(second, states, StepContext(201, HYPER, 0, 0, weight))

    def reference() -> None:
        exact[:] = [torch.linalg.svd(second, full_matrices=False)[0][:, :rank]]

    times = interleave({"ours": ours, "svd": reference}, 1)
    found = states["projector"]
    # Square matrices are projected on the right.
    captured = float((second @ found).square().sum())
    optimum = float((exact[0].T @ second).square().sum())
    return {"speedup": ratio(times, "svd", "ours"), "energy": captured / optimum,
            "side": float(side), "rank": float(rank)}  # fmt: skip


def table(times: dict[str, dict[str, list[float]]], count: int) -> None:
    """Print nanoseconds a parameter, best and median, on both clocks."""
    print(
        f"{'kernel':24s} {'cpu best':>9s} {'cpu med':>9s} {'wall best':>9s} {'wall med':>9s}  ns/p"
    )
    for name, clocks in times.items():
        cells = []
        for clock in ("cpu", "wall"):
            ordered = sorted(clocks[clock])
            cells += [ordered[0], ordered[len(ordered) // 2]]
        print(f"{name:24s} " + " ".join(f"{c / count * 1e9:9.3f}" for c in cells))


if __name__ == "__main__":
    sys.exit(main())
