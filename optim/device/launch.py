"""Launching the fused update kernel on a parameter's tensors.

Which bricks and encodings have a kernel, what Triton is asked for, and the arguments: scalars in
double precision rounded once, noise keys, views of 16-bit floats.  Imports Triton when a kernel is
first launched; the module itself needs none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from ...quant.int8_blockwise import Int8BlockwiseCodec
from ...quant.rounding import seed_key
from ...quant.state_tables import State4BitCodec
from ...quant.tables import code_table
from ..adam import Adam
from ..adamw import AdamScalars
from ..arithmetic import fp32
from ..base import Brick
from ..lion import Lion
from ..masters import MasterName
from ..seeds import fold_in
from ..sgd import Sgd
from ..sign import Sign
from ..storage import encoding_of

#: Encodings whose states can be updated block by block; ``fp8_lm`` has one scale for a tensor.
ENCODINGS: Final = (
    "fp32", "bf16", "int8", "int8_dynamic", "fp8", "coat", "int4", "int4_torchao",
)  # fmt: skip

#: Elements that one program works on, if a block is no longer.
TILE: Final = 1024

#: What Triton is asked for: contracted products and sums would round once where bricks round
#: twice.
OPTIONS: Final = {"enable_fp_fusion": False}

#: The numbers of a launch.
_SCALARS: Final = ("lr", "decay", "b1", "b2", "o1", "o2", "c1", "c2", "eps", "sign")


def kernel_name(brick: Brick) -> str | None:
    """Return what the kernel calls a brick, or None if it has none for it.

    >>> kernel_name(Sgd(nesterov=True)), kernel_name(Sgd(with_momentum=False))
    ('nesterov', 'plain')
    """
    match brick:
        case Adam():
            return "adam"
        case Lion():
            return "lion"
        case Sign():
            return "sign"
        case Sgd():
            if not brick.with_momentum:
                return "plain"
            return "nesterov" if brick.nesterov else "momentum"
        case _:
            return None


def has_kernel(brick: Brick, states: str) -> bool:
    """Whether a fused kernel updates this brick's states in this encoding."""
    return kernel_name(brick) is not None and states in ENCODINGS


def triton_is_installed() -> bool:
    """Whether kernels can be compiled at all (not whether a device is there)."""
    return importlib.util.find_spec("triton") is not None


def fused_update(
    brick: Brick,
    states_name: str,
    master: MasterName,
    weight: Tensor,
    grad: Tensor,
    states: Mapping[str, Tensor],
    *,
    step: int,
    hyper: Mapping[str, Any],
    seed: int,
    element_offset: int,
) -> None:
    """Do one step in place on contiguous tensors of one device, in one launch on its stream.

    Takes what ``UpdateRule.update`` takes and gives the bits of ``BrickRule`` on the CPU.
    """
    from .update import update

    if weight.numel() == 0:
        return
    arguments = kernel_arguments(
        brick, states_name, master, weight, grad, states, step=step, hyper=hyper, seed=seed,
        element_offset=element_offset,
    )  # fmt: skip
    programs = -(-weight.numel() // (arguments["ROWS"] * arguments["BLOCK"]))
    with _current(weight.device):
        try:
            update[(programs,)](**arguments, **OPTIONS)
        except Exception as error:
            error.add_note(
                f"while {type(brick).__name__}'s fused kernel with states={states_name!r} was "
                f"compiled or launched on {weight.device}; fused=False updates by plain torch "
                f"operations instead"
            )
            raise


def kernel_arguments(
    brick: Brick,
    states_name: str,
    master: MasterName,
    weight: Tensor,
    grad: Tensor,
    states: Mapping[str, Tensor],
    *,
    step: int,
    hyper: Mapping[str, Any],
    seed: int,
    element_offset: int,
) -> dict[str, Any]:
    """Return the kernel's arguments by name for one step; they share memory with the tensors."""
    plan = _plan(brick, states_name)
    own_master = "none" if weight.dtype == torch.float32 else master
    extra = {"fp32": "master", "split": "remainder"}.get(own_master)
    arguments: dict[str, Any] = {
        "weight": _pointer(weight),
        "extra": None if extra is None else states[extra],
        "grad": _pointer(grad),
        "count": weight.numel(),
        "BRICK": plan.name,
        "ENCODING": states_name,
        "MASTER": own_master,
        "WEIGHT": _dtype_name(weight),
        "GRAD": _dtype_name(grad),
        "BLOCK": plan.block,
        "ROWS": max(TILE // plan.block, 1),
        **_scalars(plan.name, step, hyper),
    }
    for argument, state in plan.states.items():
        arguments[argument] = None if state is None else _pointer(states[state])
    for prefix, values in plan.tables.items():
        table = None if values is None else code_table(values, weight.device)
        arguments[f"{prefix}_values"] = None if table is None else table.values
        arguments[f"{prefix}_middles"] = None if table is None else table.midpoints
    run_seed = fold_in(seed, step)
    words = (
        ("offset_low", "offset_high", (element_offset & 0xFFFF_FFFF, element_offset >> 32)),
        ("low_key", "high_key", seed_key(run_seed)),
        # The encodings' own noise, as ``Encoding.encode`` makes it.
        ("m_low_key", "m_high_key", seed_key(fold_in(run_seed, 1))),
        ("v_low_key", "v_high_key", seed_key(fold_in(run_seed, 2))),
    )
    for low_name, high_name, (low, high) in words:
        arguments[low_name], arguments[high_name] = _word(low), _word(high)
    return arguments


@final
@dataclass(frozen=True, slots=True)
class _Plan:
    """What the launches of one brick and encoding have in common."""

    name: str
    block: int
    states: Mapping[str, str | None]  # the kernel's argument -> the state's name
    tables: Mapping[str, tuple[float, ...] | None]  # "m" and "v" -> values of the codes


@functools.cache
def _plan(brick: Brick, states_name: str) -> _Plan:
    name = kernel_name(brick)
    assert name is not None and states_name in ENCODINGS, "has_kernel() was asked before"
    encoding = encoding_of(states_name)
    states: dict[str, str | None] = {}
    tables: dict[str, tuple[float, ...] | None] = {}
    slots = [*brick.init_spec((1,)), None, None]
    for prefix, slot, codec in zip("mv", slots, (encoding.signed, encoding.positive), strict=False):
        parts = [] if codec is None else list(codec.spec((1,)))
        scale = next((part for part in parts if part in ("absmax", "scale")), None)
        held = {"codes": "codes", "scale": scale, "power": "power" if "power" in parts else None}
        for argument, part in held.items():
            whole = slot if codec is None and argument == "codes" else None
            encoded = f"{slot}.{part}" if slot and codec and part else None
            states[f"{prefix}_{argument}"] = whole or encoded
        by_table = slot and isinstance(codec, Int8BlockwiseCodec | State4BitCodec)
        tables[prefix] = codec.code_values() if by_table else None  # type: ignore[union-attr]
    return _Plan(name, TILE if encoding.granule == 1 else encoding.granule or TILE, states, tables)


def _scalars(name: str, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
    """Return the step's numbers as the bricks round them."""
    if name in ("adam", "lion"):  # Lion has no eps, and reads none
        return dataclasses.asdict(AdamScalars.of({"eps": 0.0, **hyper}, step))
    lr = float(hyper["lr"])
    numbers = dict.fromkeys(_SCALARS, 0.0)
    numbers["lr"] = fp32(lr)
    numbers["decay"] = fp32(1.0 - lr * float(hyper["weight_decay"]))
    numbers["sign"] = -1.0 if hyper.get("maximize", False) else 1.0
    if name in ("momentum", "nesterov"):
        numbers["b1"] = fp32(float(hyper["momentum"]))
    return numbers


def _pointer(tensor: Tensor) -> Tensor:
    """View bf16 as int16, which is what the kernels round."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _word(word: int) -> int:
    """Return 32 bits as an int32: arguments of one type whatever the value."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device current: kernels are launched there, whatever tensors they get."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
