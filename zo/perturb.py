"""Perturbed weights as scratch, and updates with one rounding: the dense arithmetic of a step.

The stored weights are never moved by +eps, -2 eps, +eps: a probe's weights are written to scratch,
``round(w + scale * z)``, and an update is ``round(w * decay - sum_d c_d z_d)``, computed in fp32
and rounded once.  Both act on any contiguous range of a parameter's elements, so that any
chunking, tiling or placement gives the same bits.

Host tensors in float32 and bfloat16 take fused kernels that need no memory; everything else (other
devices, float16, float64) takes the reference arithmetic in tiles of ``TILE_ELEMENTS``.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from . import philox
from .host import noise_kernels, weight_kernels
from .noise import Factor, Kind, noise

TILE_ELEMENTS = 1 << 20


class Rounding(enum.Enum):
    """How an updated weight returns to its storage dtype.

    >>> from headrace.zo import Dense, Rounding
    >>> Dense(rounding=Rounding.STOCHASTIC).rounding.value
    'stochastic'
    """

    NEAREST = "nearest"
    """Ties to even."""
    STOCHASTIC = "stochastic"
    """Unbiased, with 16 counter-based random bits; bfloat16 weights only."""


@dataclass(frozen=True, slots=True)
class StepUpdate:
    """What one step does to every parameter: ``w * decay - sum_d scales[d] * z(seed, d)``.

    ``grads`` are the projected grads as logged (fp32 numbers); ``decay`` is
    ``1 - lr * weight_decay``; ``step`` is the number that windows of factored directions count by.
    """

    seed: int
    lr: float
    grads: tuple[float, ...]
    decay: float = 1.0
    step: int = 0
    scales: tuple[float, ...] = field(init=False, repr=False)
    """Learning rate times projected grad over the number of directions; used as fp32."""

    def __post_init__(self) -> None:
        count = len(self.grads)
        # Made once: every parameter asks for them.
        scales = tuple(self.lr * grad / count for grad in self.grads)
        object.__setattr__(self, "scales", scales)


def write_perturbed(
    out: Tensor,
    weight: Tensor,
    *,
    scale: float,
    kind: Kind,
    seed: int,
    stream: int,
    direction: int,
    start: int = 0,
) -> None:
    """Write ``round(weight + scale * z)`` to ``out``; ``weight`` is only read.

    ``weight`` and ``out`` are contiguous, of one shape, dtype and device; ``start`` is the index of
    their first element within the whole parameter.  ``out`` may be ``weight`` itself.

    >>> w = torch.ones(3)
    >>> plus = torch.empty(3)
    >>> write_perturbed(
    ...     plus, w, scale=0.5, kind=Kind.RADEMACHER, seed=0, stream=1, direction=0
    ... )
    >>> plus
    tensor([0.5000, 1.5000, 1.5000])
    """
    _check_pair(out, weight)
    source, target = weight.detach().view(-1), out.detach().view(-1)
    if _has_kernel(source):
        weight_kernels.perturb(
            _as_array(target),
            _as_array(source),
            scale=scale,
            kind=noise_kernels.KIND_CODES[kind.value],
            start=start,
            seed=seed,
            stream=stream,
            direction=direction,
        )
        return
    factor = float(np.float32(scale))
    for low, high in _tiles(source.numel()):
        z = noise(
            kind,
            seed=seed,
            stream=stream,
            direction=direction,
            start=start + low,
            count=high - low,
            device=source.device,
        )
        target[low:high] = source[low:high].to(_compute_dtype(source)) + z * factor


def apply_update(
    weight: Tensor,
    updates: Sequence[StepUpdate],
    *,
    kind: Kind,
    stream: int,
    start: int = 0,
    rounding: Rounding = Rounding.NEAREST,
) -> None:
    """Apply the updates of one or many steps, in order, in place, rounding after each.

    ``weight`` is contiguous; ``start`` is the index of its first element within the parameter.
    Many steps in one call cost one pass over the weights (which is how a log is replayed) and give
    the bits of as many calls.

    >>> w = torch.ones(3)
    >>> step = StepUpdate(seed=0, lr=0.25, grads=(1.0,))
    >>> apply_update(w, [step], kind=Kind.RADEMACHER, stream=1)
    >>> w
    tensor([1.2500, 0.7500, 0.7500])
    """
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {weight.stride()}")
    if rounding is Rounding.STOCHASTIC and weight.dtype != torch.bfloat16:
        raise ValueError(
            f"stochastic rounding is for bfloat16 weights, got {weight.dtype}; use Rounding.NEAREST"
        )
    flat = weight.detach().view(-1)
    if not updates or not flat.numel():
        return
    if len({len(update.grads) for update in updates}) != 1:
        raise ValueError("updates applied in one call must have equally many directions")
    if _has_kernel(flat):
        weight_kernels.update(
            _as_array(flat),
            stochastic=rounding is Rounding.STOCHASTIC,
            kind=noise_kernels.KIND_CODES[kind.value],
            start=start,
            seeds=np.array([update.seed for update in updates], dtype=np.uint64),
            stream=stream,
            rounding_stream=stream ^ Factor.ROUNDING,
            directions=np.arange(len(updates[0].grads), dtype=np.uint32),
            scales=np.array([update.scales for update in updates], dtype=np.float32),
            decays=np.array([update.decay for update in updates], dtype=np.float32),
        )
        return
    for low, high in _tiles(flat.numel()):
        tile = flat[low:high]
        for update in updates:
            _reference_update(
                tile, update, kind=kind, stream=stream, start=start + low, rounding=rounding
            )


def _reference_update(
    tile: Tensor, update: StepUpdate, *, kind: Kind, stream: int, start: int, rounding: Rounding
) -> None:
    count = tile.numel()
    total = torch.zeros(count, dtype=torch.float32, device=tile.device)
    for direction, scale in enumerate(update.scales):
        z = noise(
            kind,
            seed=update.seed,
            stream=stream,
            direction=direction,
            start=start,
            count=count,
            device=tile.device,
        )
        total = total + z * float(np.float32(scale))
    value = tile.to(_compute_dtype(tile)) * float(np.float32(update.decay)) - total
    if rounding is Rounding.STOCHASTIC:
        value = _stochastic_bfloat16(value, seed=update.seed, stream=stream, start=start)
    tile.copy_(value)


def _stochastic_bfloat16(value: Tensor, *, seed: int, stream: int, start: int) -> Tensor:
    first = start // 8
    blocks = -(-(start + value.numel()) // 8) - first
    words = philox.block_words(
        first,
        blocks,
        seed=seed,
        stream=stream ^ Factor.ROUNDING,
        direction=0,
        device=value.device,
    )
    skip = start - first * 8
    random = philox.halves_from_words(words)[skip : skip + value.numel()]
    truncated = ((value.view(torch.int32) + random) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(value), truncated, value)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _has_kernel(flat: Tensor) -> bool:
    return flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.bfloat16)


def _as_array(flat: Tensor) -> np.ndarray:
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.uint16).numpy()
    return flat.numpy()


def _tiles(count: int) -> Iterator[tuple[int, int]]:
    for low in range(0, count, TILE_ELEMENTS):
        yield low, min(low + TILE_ELEMENTS, count)


def _check_pair(out: Tensor, weight: Tensor) -> None:
    if not out.is_contiguous() or not weight.is_contiguous():
        raise ValueError(
            f"out and weight must be contiguous, got strides {out.stride()} and {weight.stride()}"
        )
    if (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
        raise ValueError(
            f"out and weight must agree, got {tuple(out.shape)} {out.dtype} on {out.device} and "
            f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
