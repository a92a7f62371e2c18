"""Host update kernels against the memory, torch, bitsandbytes, torchao and DeepSpeed.

One run, interleaved, every candidate on all cores, as the optimizers run them: fused AdamW on bf16
weights and gradients against a loop that moves the same 28 bytes a parameter with trivial
arithmetic, against torch's fused AdamW and DeepSpeed's (where it is installed) with their casts;
encoded states against fp32 ones; 8-bit states of bitsandbytes' format against bitsandbytes and
torchao on fp32 parameters; and GaLore's basis refresh against the reference SVD, on gradients of a
real model (``model_gradients``).  Ratios are medians over rounds of wall seconds: run it on an
otherwise idle machine.  The kernels' figures on one core come with them, without claims.

    python benchmarks/host_kernels.py --quick --out host_kernels.json
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from model_gradients import square_gradients
from numba import njit
from optim_common import claim, finish, interleave, parse, peer, ratio
from torch import Tensor

from headrace.optim.adam import Adam
from headrace.optim.base import StepContext
from headrace.optim.choose import fast_rule
from headrace.optim.host.bits import host_view
from headrace.optim.projector import OrthogonalProjector
from headrace.optim.spec import allocate
from headrace.optim.streamed import UpdateRule

HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
Candidates = dict[str, Callable[[], None]]

#: Our kernels: name -> (states, master).
KERNELS = {
    "adamw": ("fp32", "fp32"),
    "adamw split": ("fp32", "split"),
    "adamw sr": ("fp32", "sr"),
    "adamw int8": ("int8", "fp32"),
    "adamw int8 split": ("int8", "split"),
    "adamw int8_dynamic": ("int8_dynamic", "fp32"),
    "adamw coat": ("coat", "fp32"),
}


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
    count, peer_count = (24_000_000, 4_000_000) if arguments.quick else (100_000_000,) * 2
    rounds, threads = (5 if arguments.quick else 9), os.cpu_count() or 1
    torch.set_num_threads(threads)
    print(f"{threads} threads, {count} parameters")
    times = table(interleave(kernels(count, threads), rounds), count)
    print(f"{threads} threads, {peer_count} fp32 parameters")
    peers = table(interleave(low_bit(peer_count, threads), rounds), peer_count)
    refresh = basis(arguments)
    print(f"basis refresh: {refresh}")
    moved = moved_without_gradient()
    torch.set_num_threads(1)
    print(f"1 thread, {count // 2} parameters")
    alone = table(interleave(kernels(count // 2, 1), 5), count // 2)
    print(f"1 thread, {peer_count // 2} fp32 parameters")
    peers_alone = table(interleave(low_bit(peer_count // 2, 1), 5), peer_count // 2)
    figures = {
        "threads": threads, "count": count, "seconds": times, "peers": peers, "refresh": refresh,
        "moved_without_gradient": moved, "one_thread": {"count": count // 2, "seconds": alone},
        "peer_count": peer_count,
        "one_thread_peers": {"count": peer_count // 2, "seconds": peers_alone},
    }  # fmt: skip
    return finish(arguments, figures, judge(times, peers, refresh, moved))


def judge(
    times: dict[str, Any], peers: dict[str, Any], refresh: dict[str, float], moved: dict[str, int]
) -> list[dict[str, Any]]:
    """Return the claims."""
    low, high = {"at_least": False}, {"at_least": True}
    claims = [
        claim("fused AdamW over a 28-byte traffic loop, speed",
              1 / wall(times, "adamw", "mimic"), 0.95, **high),
        claim("over torch fused AdamW with its casts, speed",
              wall(times, "torch fused", "adamw"), 1.4, **high),
        claim("stochastic over nearest rounding of the same states, time",
              wall(times, "adamw sr", "adamw"), 1.05, **low),
        claim("int8 states over fp32 states, time", wall(times, "adamw int8", "adamw"), 1.1, **low),
        claim("FP8 states with range expansion over fp32 states, time",
              wall(times, "adamw coat", "adamw"), 3.0, **low),
        claim("bitsandbytes AdamW8bit over our kernel of its format, time",
              wall(peers, "bitsandbytes", "int8_dynamic"), 15.0, **high),
        claim("torchao AdamW8bit over the same kernel, time",
              wall(peers, "torchao", "int8_dynamic"), 15.0, **high),
        claim("parameters without gradient that our 8-bit AdamW moves", moved["ours"], 0, **low),
        claim("reference SVD over the basis refresh, time", refresh["speedup"], 40.0, **high),
        claim("energy that the refreshed basis captures, of the optimum", refresh["energy"], 0.995,
              **high),
    ]  # fmt: skip
    if "deepspeed" in times:
        name = "over DeepSpeedCPUAdam with its casts, speed"
        claims.insert(2, claim(name, wall(times, "deepspeed", "adamw"), 1.5, **high))
    else:
        print("deepspeed is not installed: no row of it")
    return claims


def wall(times: dict[str, Any], name: str, over: str) -> float:
    """Return the median ratio of wall seconds."""
    return ratio(times, name, over, clock="wall")


def kernels(count: int, threads: int) -> Candidates:
    """Return the candidates that update ``count`` bf16 weights from bf16 gradients."""
    grad = (torch.randn(count) * 1e-2).bfloat16()
    pool = ThreadPoolExecutor(threads)
    weight, master = torch.randn(count).bfloat16(), torch.randn(count)
    m, v = torch.zeros(count), torch.zeros(count)
    views = [host_view(t) for t in (weight, grad, master, m, v)]
    jobs = [[view[start:stop] for view in views] for start, stop in ranges(count, threads)]
    out: Candidates = {"mimic": lambda: list(pool.map(lambda job: mimic(*job), jobs)) and None}
    shared = {name: torch.zeros(count) for name in ("exp_avg", "exp_avg_sq", "master")}
    ours = torch.randn(count).bfloat16()
    for name, (states, kind) in KERNELS.items():
        rule = fast_rule(Adam(), states, kind)
        out[name] = updater(rule, ours, grad, pool, threads, shared)
    step, wide = torch.tensor(3.0), torch.empty(count)

    def fused() -> None:
        wide.copy_(grad)
        torch._fused_adamw_(
            [master], [wide], [m], [v], [], [step], lr=1e-4, beta1=0.9, beta2=0.999,
            weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        weight.copy_(master)

    out["torch fused"] = fused
    if importlib.util.find_spec("deepspeed") is not None:
        out["deepspeed"] = deepspeed(master, weight, grad, wide)
    return out


def deepspeed(master: Tensor, weight: Tensor, grad: Tensor, wide: Tensor) -> Callable[[], None]:
    """Return a step of DeepSpeed's CPU Adam, with the casts that it leaves to the caller."""
    adam = importlib.import_module("deepspeed.ops.adam")
    parameter = torch.nn.Parameter(master)
    optimizer = adam.DeepSpeedCPUAdam([parameter], lr=1e-4, weight_decay=0.01, adamw_mode=True)

    parameter.grad = wide

    def run() -> None:
        wide.copy_(grad)
        optimizer.step()
        weight.copy_(parameter.detach())

    return run


def ranges(count: int, threads: int) -> Iterator[tuple[int, int]]:
    """Cut elements into one range a thread, at multiples of every block."""
    step = -(-count // threads // 1024) * 1024
    for start in range(0, count, step):
        yield start, min(start + step, count)


def updater(
    rule: UpdateRule,
    weight: Tensor,
    grad: Tensor,
    pool: ThreadPoolExecutor,
    threads: int,
    shared: dict[str, Tensor],
) -> Callable[[], None]:
    """Return a call that does one more step of a rule; fp32 states are shared to save memory."""
    count = weight.numel()
    own = {k: s for k, s in rule.state_spec((count,), weight.dtype).items() if k not in shared}
    states = allocate(own, "cpu")
    states |= {k: shared[k] for k in rule.state_spec((1,), weight.dtype) if k in shared}
    rule.init_states(weight, states)
    steps = iter(range(1, 1 << 30))

    def part(name: str, start: int, stop: int) -> Tensor:
        if states[name].numel() == count:
            return states[name][start:stop]
        return states[name][start // rule.granule : -(-stop // rule.granule)]

    jobs = [
        (start, weight[start:stop], grad[start:stop], {k: part(k, start, stop) for k in states})
        for start, stop in ranges(count, threads)
    ]

    def run() -> None:
        step = next(steps)
        for done in [
            pool.submit(rule.update, w, g, s, step=step, hyper=HYPER, seed=1, element_offset=start)
            for start, w, g, s in jobs
        ]:
            done.result()

    return run


def low_bit(count: int, threads: int) -> Candidates:
    """Return 8-bit AdamW of ours, of bitsandbytes and of torchao, on fp32 parameters."""
    bitsandbytes, torchao = peer("bitsandbytes"), peer("torchao.optim")
    out: Candidates = {}
    side = int(count**0.5) // 256 * 256
    shape = (side, count // side // 256 * 256)
    pool = ThreadPoolExecutor(threads)
    for states in ("int8_dynamic", "int8"):
        weight, grad = torch.randn(shape).view(-1), torch.randn(shape).view(-1) * 1e-2
        rule = fast_rule(Adam(), states, "fp32")
        out[states] = updater(rule, weight, grad, pool, threads, {})
    for name, cls in (("bitsandbytes", bitsandbytes.optim.AdamW8bit),
                      ("torchao", torchao.AdamW8bit)):  # fmt: skip
        parameter = torch.nn.Parameter(torch.randn(shape))
        parameter.grad = torch.randn(shape) * 1e-2
        out[name] = cls([parameter], lr=1e-4).step
    return out


def moved_without_gradient() -> dict[str, int]:
    """Count parameters that move without a gradient, of 2^16, half of which have one; 30 steps."""
    gradient = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 1e-2
    gradient[:, ::2] = 0.0
    weight = torch.ones(gradient.numel())
    rule = fast_rule(Adam(), "int8_dynamic", "fp32")
    states = allocate(rule.state_spec((weight.numel(),), torch.float32), "cpu")
    rule.init_states(weight, states)
    still = {**HYPER, "weight_decay": 0.0}
    parameter = torch.nn.Parameter(torch.ones(256, 256))
    theirs = peer("bitsandbytes").optim.AdamW8bit([parameter], lr=1e-4, weight_decay=0.0)
    for step in range(1, 31):
        rule.update(
            weight, gradient.view(-1), states, step=step, hyper=still, seed=0, element_offset=0
        )
        parameter.grad = gradient.clone()
        theirs.step()
    zero = gradient == 0
    return {
        "ours": int((weight.view(256, 256)[zero] != 1).sum()),
        "bitsandbytes": int((parameter.detach()[zero] != 1).sum()),
    }


def basis(arguments: argparse.Namespace) -> dict[str, float]:
    """Refresh a GaLore basis for a real model's gradients ten steps later; against the full SVD."""
    side, rank, between = (1024, 128, 3) if arguments.quick else (2048, 128, 10)
    first, second = square_gradients(side, between)
    projector = OrthogonalProjector(rank)
    slots = projector.slots(side, side)
    states = allocate({name: slot.spec for name, slot in slots.items()}, "cpu")
    weight = torch.zeros(side, side)
    projector.refresh(first, states, StepContext(1, HYPER, 0, 0, weight))
    begin = states["projector"].clone()
    exact: list[Tensor] = []

    def ours() -> None:
        states["projector"].copy_(begin)
        projector.refresh(second, states, StepContext(2, HYPER, 0, 0, weight))

    def reference() -> None:
        exact[:] = torch.linalg.svd(second)

    times = interleave({"ours": ours, "svd": reference}, 5)
    # Square matrices are projected on the right.
    optimum = float(exact[1][:rank].square().sum())
    return {
        "speedup": wall(times, "svd", "ours"), "seconds": min(times["ours"]["wall"]),
        "svd_seconds": min(times["svd"]["wall"]),
        "energy": float((second @ states["projector"]).square().sum()) / optimum,
        "stale_energy": float((second @ begin).square().sum()) / optimum,
        "side": float(side), "rank": float(rank),
    }  # fmt: skip


def table(times: dict[str, Any], count: int) -> dict[str, Any]:
    """Print nanoseconds a parameter, best and median, on both clocks; return the times."""
    print(
        f"{'kernel':24s} {'cpu best':>9s} {'cpu med':>9s} {'wall best':>9s} {'wall med':>9s}  ns/p"
    )
    for name, clocks in times.items():
        cells = []
        for clock in ("cpu", "wall"):
            ordered = sorted(clocks[clock])
            cells += [ordered[0], ordered[len(ordered) // 2]]
        print(f"{name:24s} " + " ".join(f"{c / count * 1e9:9.3f}" for c in cells), flush=True)
    return times


if __name__ == "__main__":
    sys.exit(main())
