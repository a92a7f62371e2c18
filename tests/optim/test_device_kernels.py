"""The device kernels equal the bricks of the CPU bit for bit: interpreted here, and on a GPU.

Without a GPU, Triton's interpreter runs the kernels' source operation by operation on the CPU, and
its compiler shows that what a GPU would run rounds every operation by itself.  Both choose once
for a process, so each has a process of its own: this file run as a script.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.optim import adamw, adamw_4bit, fused_rule, galore_adamw, stable_adamw
from headrace.optim.adam import Adam
from headrace.optim.base import Brick
from headrace.optim.brick_rule import BrickRule
from headrace.optim.device import launch
from headrace.optim.fused_rule import FusedRule
from headrace.optim.lion import Lion
from headrace.optim.sgd import Sgd
from headrace.optim.sign import Sign
from headrace.optim.spec import allocate
from headrace.optim.storage import encoding_of, encodings
from headrace.optim.torch_api import RuleOptimizer, all_gradients_finite

BRICKS: dict[str, Brick] = {
    "adam": Adam(),
    "lion": Lion(),
    "momentum": Sgd(),
    "nesterov": Sgd(nesterov=True),
    "plain": Sgd(with_momentum=False),
    "sign": Sign(),
}
#: Weight dtype, gradient dtype and master.
WEIGHTS = {
    "float32": ("float32", "float32", "fp32"),
    "full": ("bfloat16", "bfloat16", "fp32"),
    "split": ("bfloat16", "bfloat16", "split"),
    "sr": ("bfloat16", "bfloat16", "sr"),
    "float16": ("float16", "float16", "fp32"),
    "mixed": ("float32", "bfloat16", "fp32"),
    "wide": ("bfloat16", "float32", "split"),
}
HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}

ALL = list(itertools.product(BRICKS, launch.ENCODINGS, WEIGHTS))
#: A few in the default suite: every brick, every encoding and every kind of weight.
SOME = [
    *(("adam", e, w) for e, w in zip(launch.ENCODINGS, itertools.cycle(WEIGHTS), strict=False)),
    ("lion", "int8", "sr"),
    ("nesterov", "coat", "split"),
    ("momentum", "int8", "mixed"),
    ("plain", "fp32", "float16"),
    ("sign", "fp32", "sr"),
]
CASES = [
    pytest.param(*case, marks=() if case in SOME else pytest.mark.slow, id="-".join(case))
    for case in ALL
]
needs_triton = pytest.mark.skipif(
    not launch.triton_is_installed(), reason="needs Triton: the extra headrace[kernels]"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def differences(name: str, encoding: str, weight_kind: str, device: str) -> list[str]:
    """Run kernel and bricks for five steps on several sizes; name the tensors that differ."""
    brick, (dtype, gradient, master) = BRICKS[name], WEIGHTS[weight_kind]
    rule = BrickRule(brick, encoding_of(encoding), master=master)
    found = []
    for count, maximize, offset in ((1000, False, 2**32 - 512), (128, True, 0), (5, False, 512)):
        sides = []
        for kernel in (True, False):
            generator = torch.Generator().manual_seed(1)
            weight = torch.randn(count, generator=generator).to(getattr(torch, dtype))
            states = allocate(rule.state_spec((count,), weight.dtype), "cpu")
            rule.init_states(weight, states)
            spread = torch.logspace(-12, 0, count)[torch.randperm(count, generator=generator)]
            if kernel:
                weight = weight.to(device)
                states = {key: value.to(device) for key, value in states.items()}
            for step in range(1, 6):
                grad = torch.randn(count, generator=generator) * spread
                grad[:: step + 2] = 0.0
                grad = grad.to(weight.device, getattr(torch, gradient))
                common = {
                    "step": step,
                    "hyper": {**HYPER, "maximize": maximize},
                    "seed": 9,
                    "element_offset": offset,
                }
                if kernel:
                    launch.fused_update(brick, encoding, master, weight, grad, states, **common)
                else:
                    rule.update(weight, grad, states, **common)
            sides.append({"weight": weight.cpu(), **{k: v.cpu() for k, v in states.items()}})
        mine, oracle = sides
        found += [f"{k} of {count}" for k, v in oracle.items() if not torch.equal(mine[k], v)]
    return found


def in_process(*arguments: str, interpret: bool) -> list[str]:
    """Run this file as a script; return its lines."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def interpreted(request) -> dict[str, list[str]]:
    """Differences of all cases that this run asks for."""
    wanted = [
        "-".join(item.callspec.params[key] for key in ("name", "encoding", "weight_kind"))
        for item in request.session.items
        if item.originalname == "test_the_kernels_source_equals_the_bricks"
    ]
    lines = in_process("interpret", *wanted, interpret=True)
    return dict(json.loads(line) for line in lines)


@needs_triton
@pytest.mark.parametrize(("name", "encoding", "weight_kind"), CASES)
def test_the_kernels_source_equals_the_bricks(name, encoding, weight_kind, interpreted):
    assert interpreted["-".join((name, encoding, weight_kind))] == []


@needs_triton
@pytest.mark.parametrize(
    "chip", [90, *(pytest.param(chip, marks=pytest.mark.slow) for chip in (80, 86, 89, 100, 120))]
)
def test_compiled_kernels_round_every_operation_by_itself(chip):
    """No contraction, no flush to zero, no approximate division; whole vectors are moved."""
    cases = SOME if chip == 90 else ALL
    wanted = cases[:3] + cases[-2:] if chip == 90 else cases[::7]
    for line in in_process("compile", str(chip), *map("-".join, wanted), interpret=False):
        case, text = json.loads(line)
        assert not re.findall(r"fma\.|\.ftz|\.approx|div\.full|rcp\.", text), case
        assert "ld.global.v4" in text and "st.global.v" in text, case
        adam = case.startswith("adam")
        assert ("sqrt.rn.f32" in text, "div.rn.f32" in text) == (adam, adam) or not adam, case


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("name", "encoding", "weight_kind"), CASES)
def test_a_gpu_gives_the_bits_of_the_bricks_on_the_cpu(name, encoding, weight_kind):
    assert differences(name, encoding, weight_kind, "cuda") == []


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("states", launch.ENCODINGS)
def test_an_optimizer_on_a_gpu_gives_the_bits_of_one_on_the_cpu(states):
    shapes = [(70, 66), (4096,), (3, 5, 4), (), (0, 5), (1, 1)]
    kept = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(2)
        weights = [
            nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(device))
            for shape in shapes
        ]
        weights.append(nn.Parameter(torch.randn((64, 80), generator=generator).t().to(device)))
        fused = True if device == "cuda" else None
        optimizer = adamw(weights, states=states, master="split", fused=fused)
        for _ in range(4):
            for weight in weights:
                grad = torch.randn(weight.shape, generator=generator)
                weight.grad = grad.to(weight.device, weight.dtype)
            optimizer.step()
        kept.append([weight.detach().cpu() for weight in weights])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@needs_triton
def test_numbers_of_a_step_compile_nothing_anew():
    """Rates, rounds, seeds and offsets are arguments: four steps, one kernel each."""
    assert in_process("specialise", interpret=False) == ["1", "1", "1", "1", "2"]


@pytest.mark.gpu
@needs_gpu
def test_a_step_runs_on_the_callers_stream():
    """A gradient that is ready on a side stream only."""
    weight = nn.Parameter(torch.zeros(1 << 20, device="cuda"))
    optimizer = adamw([weight], lr=1.0, weight_decay=0.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert bool((weight < 0).all())


# -- which rule a parameter gets ----------------------------------------------------------------


def test_every_recipe_of_single_elements_has_a_kernel():
    for brick, states in itertools.product(BRICKS.values(), encodings()):
        assert launch.has_kernel(brick, states) == (states != "fp8_lm")


def test_fused_chooses_kernels_bricks_or_refuses():
    weight = nn.Parameter(torch.ones(70, 70))
    assert isinstance(adamw([weight]).rule_for(weight), FusedRule)
    assert isinstance(adamw([weight], fused=False).rule_for(weight), BrickRule)
    assert isinstance(adamw([weight], fused=True).rule_for(weight), FusedRule)
    for recipe in (stable_adamw, galore_adamw):
        with pytest.raises(ValueError, match="no fused kernel"):
            recipe([weight], fused=True)
    four_bit = adamw_4bit([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="no fused kernel for a parameter on cpu"):
        four_bit.step()


def test_bricks_and_host_kernels_give_the_same_weights():
    kept = []
    for fused in (None, False):
        weight = nn.Parameter(torch.linspace(-1, 1, 70 * 70).reshape(70, 70).bfloat16())
        optimizer = adamw([weight], states="int8", master="split", fused=fused)
        for step in range(3):
            weight.grad = torch.sin(torch.arange(4900.0) * (step + 1)).reshape(70, 70).bfloat16()
            optimizer.step()
        kept.append(weight.detach().clone())
    assert torch.equal(*kept)


class _Elsewhere:
    """A weight that says that it lies on CUDA."""

    device = torch.device("cuda", 0)


def test_a_missing_triton_is_said_aloud(monkeypatch):
    monkeypatch.setattr(fused_rule, "triton_is_installed", lambda: False)
    taken = []
    monkeypatch.setattr(BrickRule, "update", lambda self, *_, **__: taken.append(self))
    arguments = {"step": 1, "hyper": HYPER, "seed": 0, "element_offset": 0}
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        FusedRule(Adam(), "int8").update(_Elsewhere(), None, {}, **arguments)
    assert len(taken) == 1
    with pytest.raises(ValueError, match="pip install"):
        FusedRule(Adam(), "int8", required=True).update(_Elsewhere(), None, {}, **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_elsewhere_are_asked_all_at_once(value):
    """The question that accelerators are asked, here to the CPU's own tensors."""
    fine = [torch.ones(3), torch.empty(0), torch.ones(2, dtype=torch.bfloat16)]
    bad = [*fine, torch.tensor([1.0, value, 2.0])]
    assert all_gradients_finite(fine) and not all_gradients_finite(bad)
    norm = torch.nn.utils.get_total_norm([one for one in bad if one.numel()], float("inf"))
    assert not torch.isfinite(norm)


def test_a_step_of_another_device_leaves_threads_alone(monkeypatch):
    """Only tiles of CPU tensors go to the pool."""
    weight = nn.Parameter(torch.ones(8, device="meta"))
    optimizer = RuleOptimizer([weight], lambda info, group: BrickRule(Sign(), encoding_of("fp32")),
                              {"lr": 0.1, "weight_decay": 0.0}, threads=4)  # fmt: skip
    monkeypatch.setattr("headrace.optim.torch_api.ThreadPoolExecutor", None)
    weight.grad = torch.ones_like(weight)
    optimizer._run([weight])
    assert int(optimizer.state[weight]["step"]) == 1


# -- the script ---------------------------------------------------------------------------------


def compiled(case: str, chip: int) -> str:
    """Compile the kernel of a case for a chip that need not be there; return its assembly."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from headrace.optim.device.update import update

    name, encoding, weight_kind = case.split("-")
    arguments = launch.kernel_arguments(
        BRICKS[name], encoding, WEIGHTS[weight_kind][2], **_tensors(name, encoding, weight_kind),
        step=1, hyper=HYPER, seed=9, element_offset=0,
    )  # fmt: skip
    types = {torch.float32: "fp32", torch.float16: "fp16", torch.int16: "i16", torch.uint8: "u8"}
    signature, constants, attributes = {}, {}, {}
    for i, key in enumerate(update.arg_names):
        value = arguments[key]
        if value is None or key.isupper():
            signature[key], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[key] = f"*{types[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[key] = "fp32" if isinstance(value, float) else "i32"
            if key == "count":
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=update, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", chip, 32)
    return str(triton.compile(source, target=target, options=launch.OPTIONS).asm["ptx"])


class _NoDevice:
    """What Triton asks about the device before it launches: enough to compile for one."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def specialised() -> None:
    """Print the number of kernels after each of several different steps, compiled only."""
    from triton.runtime import driver

    from headrace.optim.device.update import update

    driver.set_active(_NoDevice())
    steps = [
        (4096, HYPER, 0, 0),
        (8192, {**HYPER, "lr": 1.0, "weight_decay": 0.0}, 1, 16),
        (4096, {**HYPER, "betas": (0.0, 0.9), "eps": 0.0}, 2**63, 2**35),
        (65536, {**HYPER, "maximize": True}, 2**64 - 1, 2**31),
        (4099, HYPER, 0, 0),  # whole vectors no longer
    ]
    for step, (count, hyper, seed, offset) in enumerate(steps, 1):
        arguments = launch.kernel_arguments(
            Adam(), "int8", "split", **_tensors("adam", "int8", "split", count),
            step=step, hyper=hyper, seed=seed, element_offset=offset,
        )  # fmt: skip
        update.warmup(**arguments, **launch.OPTIONS, grid=(1,))
        print(len(update.device_caches[0][0]))


def _tensors(
    name: str, encoding: str, weight_kind: str, count: int = 4096
) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
    dtype, gradient, master = WEIGHTS[weight_kind]
    weight = torch.ones(count, dtype=getattr(torch, dtype))
    rule = BrickRule(BRICKS[name], encoding_of(encoding), master=master)
    states = allocate(rule.state_spec((count,), weight.dtype), "cpu")
    return {"weight": weight, "grad": weight.to(getattr(torch, gradient)), "states": states}


def main(work: str, *arguments: str) -> None:
    if work == "interpret":
        for case in arguments:
            print(json.dumps([case, differences(*case.split("-"), device="cpu")]))
        return
    if work == "specialise":
        specialised()
        return
    chip, *cases = arguments
    for case in cases:
        print(json.dumps([case, compiled(case, int(chip))]))


if __name__ == "__main__":
    assert Path(__file__).is_absolute()
    main(*sys.argv[1:])
