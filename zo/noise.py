"""Noise as a pure function of (seed, parameter name, direction, element index).

Any slice of any tensor's noise can be made anywhere, in any order, on any device, with the same
bits, so chunking never changes a result and nothing is stored.  The counter of Philox4x32-10 is
(element block low, element block high, stream, direction) and its key is the 64-bit step seed.

A *stream* is 32 bits of a parameter's name; a parameter's factors (left, right, rounding) have
streams of their own.  ``assign_streams`` gives a model's names distinct streams.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from . import philox
from .host import noise_kernels


class Kind(enum.Enum):
    """Distribution of the noise; every kind has mean 0 and variance 1.

    >>> from headrace.zo import Kind
    >>> [kind.value for kind in Kind]
    ['gaussian', 'rademacher', 'irwin_hall']
    """

    GAUSSIAN = "gaussian"
    """Standard normal by Box-Muller (about 1.7 ns a value and core on the host)."""
    RADEMACHER = "rademacher"
    """Random signs; one Philox call makes 128 of them."""
    IRWIN_HALL = "irwin_hall"
    """Sum of four bytes, scaled: nearly normal (kurtosis 2.70, at most 3.45), integer-derived."""

    @property
    def elements_per_block(self) -> int:
        """Values that one counter block yields."""
        return 128 if self is Kind.RADEMACHER else 4


class Factor(enum.IntEnum):
    """Which of a parameter's noise tensors is meant; the value is xor-ed into its stream."""

    DENSE = 0
    LEFT = 0x3C6EF372
    RIGHT = 0x54FF53A5
    CORE = 0x1F83D9AB
    CHOICE = 0x5BE0CD19
    ROUNDING = 0x510E527F


MAX_DIRECTIONS = 1 << 32
_SEEDS = 1 << 64


def stream_of(name: str) -> int:
    """Stream of a name alone: its CRC-32.

    >>> hex(stream_of("model.layers.0.mlp.up_proj.weight"))
    '0xcd6f9c90'
    """
    return zlib.crc32(name.encode("utf-8"))


def assign_streams(names: Iterable[str]) -> Mapping[str, int]:
    """Give every name a stream such that no two names share one, nor one of their factors.

    A name's stream is ``stream_of(name)`` unless an earlier name (in sorted order) holds it; then
    the name is salted until a free stream is found.  The result depends on the set of names only.
    """
    taken: set[int] = set()
    streams: dict[str, int] = {}
    for name in sorted(set(names)):
        salt = 0
        while True:
            stream = stream_of(name if salt == 0 else f"{name}\0{salt}")
            family = {stream ^ factor for factor in Factor}
            if taken.isdisjoint(family):
                break
            salt += 1
        taken |= family
        streams[name] = stream
    return MappingProxyType(streams)


def step_seed(run_seed: int, step: int) -> int:
    """64-bit seed of a step: one Philox block of the step number under the run's seed."""
    check_seed(run_seed)
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    words = philox.block_words(step, 1, seed=run_seed, stream=0, direction=0)[0]
    return int(words[0]) | (int(words[1]) << 32)


def check_seed(seed: int) -> None:
    """Refuse a seed that is not an unsigned 64-bit integer (0 is a seed like any other)."""
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")


def noise(
    kind: Kind,
    *,
    seed: int,
    stream: int,
    direction: int,
    start: int,
    count: int,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """Elements ``start .. start + count - 1`` of one noise tensor, flat, in fp32.

    ``out``, if given, is a contiguous fp32 tensor of ``count`` elements (any shape) that is filled
    in place, flattened and returned; its device is then the device used.  The host uses a kernel
    that needs no memory beyond ``out``; other devices use the reference arithmetic, whose integer
    temporaries take about 100 bytes an element, so give it tiles.

    >>> whole = noise(Kind.GAUSSIAN, seed=1, stream=2, direction=0, start=0, count=10)
    >>> part = noise(Kind.GAUSSIAN, seed=1, stream=2, direction=0, start=3, count=4)
    >>> torch.equal(whole[3:7], part)
    True
    """
    check_seed(seed)
    if not 0 <= stream < 1 << 32 or not 0 <= direction < MAX_DIRECTIONS:
        raise ValueError(f"stream and direction must be in [0, 2**32), got {stream}, {direction}")
    if start < 0 or count < 0:
        raise ValueError(f"start and count must be at least 0, got {start}, {count}")
    if out is None:
        out = torch.empty(count, dtype=torch.float32, device=device)
    elif out.dtype != torch.float32 or out.numel() != count or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous float32 tensor of {count} elements, got "
            f"{out.dtype} of shape {tuple(out.shape)} and strides {out.stride()}"
        )
    flat = out.view(-1)
    if flat.device.type == "cpu":
        noise_kernels.fill(
            flat.numpy(), noise_kernels.KIND_CODES[kind.value], start, seed, stream, direction
        )
    else:
        flat.copy_(
            reference_noise(
                kind,
                seed=seed,
                stream=stream,
                direction=direction,
                start=start,
                count=count,
                device=flat.device,
            )
        )
    return flat


def noise_of_directions(
    kind: Kind, *, seed: int, stream: int, directions: int, count: int
) -> Tensor:
    """The first ``count`` elements of directions 0, 1, ...: fp32 [directions, count], on the host.

    One call for what ``noise`` gives direction by direction; small factors need many.
    """
    check_seed(seed)
    out = torch.empty(directions, count, dtype=torch.float32)
    noise_kernels.fill_directions(out.numpy(), noise_kernels.KIND_CODES[kind.value], seed, stream)
    return out


def reference_noise(
    kind: Kind,
    *,
    seed: int,
    stream: int,
    direction: int,
    start: int,
    count: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What ``noise`` returns, by the torch specification in ``philox`` (slow, any device)."""
    per_block = kind.elements_per_block
    first = start // per_block
    blocks = -(-(start + count) // per_block) - first
    words = philox.block_words(
        first, blocks, seed=seed, stream=stream, direction=direction, device=device
    )
    values = {
        Kind.GAUSSIAN: philox.gaussian_from_words,
        Kind.RADEMACHER: philox.rademacher_from_words,
        Kind.IRWIN_HALL: philox.irwin_hall_from_words,
    }[kind](words)
    skip = start - first * per_block
    return values[skip : skip + count]
