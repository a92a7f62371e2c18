"""Activation subspaces: directions whose right sides lie where a layer's inputs live (AIM-ZO).

The gradient of a linear layer is a sum of ``(output gradient) (input)^T``, so its right side lies
in the span of the inputs.  A ``Basis`` of each layer's strongest input directions is measured once,
by forwards on a few batches; direction i of a step is then ``sqrt(d / k) a_i (Q b_i)^T`` with a_i
[p] and b_i [k] normal.

AIM-ZO: activation-informed subspaces for multi-query zeroth-order fine-tuning, 2026.  Deviations:
its basis follows the activations of every step, and a log would have to carry each; here the basis
is that of the base model, is kept as signed bytes, and lies in the log's header, so that replay
needs neither data nor forwards.  All of the basis is used, not a random choice of its columns.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from .directions import Place
from .factored import Factored, Window
from .noise import Factor, Kind, noise_of_directions
from .perturb import StepUpdate

_GRAIN = np.float32(1 / 127)


@final
@dataclass(frozen=True, slots=True)
class Basis:
    """Input directions of trained matrices: ``rank`` columns each, kept as signed bytes.

    ``names[i]`` are the parameters that share the matrix ``codes[i]``: base64 of int8 [d, rank],
    in units of the largest magnitude of its column over 127 (``scales[i]``, one fp32 a column).
    The columns are orthonormal to about 1 %.

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import measure_basis
    >>> model = nn.Sequential(nn.Linear(8, 4, bias=False))
    >>> forwards = [lambda m: m(torch.eye(8))]
    >>> basis = measure_basis(model, ["0.weight"], forwards, rank=2)
    >>> basis.rank, tuple(basis.matrix("0.weight", 8).shape)
    (2, (8, 2))
    """

    rank: int
    names: tuple[tuple[str, ...], ...]
    codes: tuple[str, ...]
    scales: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be positive, got {self.rank}")
        if not len(self.names) == len(self.codes) == len(self.scales):
            raise ValueError(
                f"a basis needs equally many names, codes and scales, got {len(self.names)}, "
                f"{len(self.codes)} and {len(self.scales)}"
            )
        for names, codes, scales in zip(self.names, self.codes, self.scales, strict=True):
            _check_entry(names, codes, scales, self.rank)

    def matrix(self, name: str, columns: int) -> Tensor:
        """Q of a parameter [p, columns]: fp32 [columns, rank]."""
        index = next((i for i, names in enumerate(self.names) if name in names), None)
        if index is None:
            raise ValueError(f"the basis has no input directions of {name}; measure them")
        raw = base64.b64decode(self.codes[index])
        scales = np.array(self.scales[index], dtype=np.float32)
        if len(raw) != columns * self.rank:
            raise ValueError(
                f"the input directions of {name} take {len(raw)} bytes, expected {columns} rows "
                f"of {self.rank}"
            )
        codes = np.frombuffer(raw, dtype=np.int8).reshape(columns, self.rank)
        return torch.from_numpy(codes.astype(np.float32) * (scales * _GRAIN))


def _check_entry(names: tuple[str, ...], codes: str, scales: tuple[float, ...], rank: int) -> None:
    try:
        base64.b64decode(codes, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"the input directions of {names} are not base64: {error}") from error
    if len(scales) != rank or not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"the input directions of {names} need {rank} finite scales, got {scales}")


@final
@dataclass(frozen=True, slots=True)
class ActivationSubspace(Factored):
    """Rank-1 directions within measured input directions; ``measure_basis`` makes ``basis``.

    Size of a log's header: about 1.4 bytes times ``rank`` an input feature and layer (2.1 MB for
    SmolLM2-135M at rank 16).  State: fp32 [p, rank] a matrix.

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import ActivationSubspace, measure_basis
    >>> model = nn.Sequential(nn.Linear(8, 4, bias=False))
    >>> basis = measure_basis(model, ["0.weight"], [lambda m: m(torch.eye(8))], rank=2)
    >>> ActivationSubspace(directions=4, basis=basis).window_steps
    50
    """

    directions: int
    basis: Basis
    steps: int = 50

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ValueError(f"directions must be positive, got {self.directions}")

    @property
    def window_steps(self) -> int:
        return self.steps

    def open_window(self, place: Place, seed: int) -> ActivationWindow:
        return ActivationWindow(self, place)


@final
class ActivationWindow(Window):
    """One matrix and its input directions; the same in every window."""

    def __init__(self, directions: ActivationSubspace, place: Place) -> None:
        self._count = directions.directions
        self._place = place
        self._right = directions.basis.matrix(place.name, place.shape[1])
        self._scale = float(np.float32(math.sqrt(place.shape[1] / self._right.shape[1])))
        self._left: Tensor | None = None

    @property
    def right(self) -> Tensor:
        return self._right

    @property
    def left(self) -> Tensor | None:
        return self._left

    def directions(self, seed: int) -> Tensor:
        outer, inner = self._factors(seed)
        return outer[:, :, None] * inner[:, None, :]

    def accumulate(self, update: StepUpdate) -> None:
        if self._left is None:
            self._left = torch.zeros(self._place.shape[0], self._right.shape[1])
        outer, inner = self._factors(update.seed)
        # One direction after the other: the order of a library matmul depends on its threads.
        for a, b, scale in zip(outer, inner, update.scales, strict=True):
            self._left -= (a * float(np.float32(scale)))[:, None] * b

    def _factors(self, seed: int) -> tuple[Tensor, Tensor]:
        """a [directions, p] and sqrt(d / rank) b [directions, rank]."""

        def normals(factor: Factor, count: int) -> Tensor:
            return noise_of_directions(
                Kind.GAUSSIAN,
                seed=seed,
                stream=self._place.stream ^ factor,
                directions=self._count,
                count=count,
            )

        outer = normals(Factor.LEFT, self._place.shape[0])
        return outer, normals(Factor.CORE, self._right.shape[1]).mul_(self._scale)


def measure_basis(
    model: nn.Module,
    names: Iterable[str],
    forwards: Iterable[Callable[[nn.Module], Any]],
    *,
    rank: int = 16,
    iterations: int = 4,
) -> Basis:
    """Input directions of linear layers, strongest first, from a few forwards of the model.

    ``names``: trained parameters (``ZOStep.trained_names``), weights of ``nn.Linear``.
    ``forwards``: functions that call the model on a batch.  Memory: fp32 [d, d] a distinct input.
    Subspace iteration on the uncentred second moments, from a fixed start.

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import measure_basis
    >>> model = nn.Sequential(nn.Linear(8, 4, bias=False))
    >>> batches = [torch.eye(8), torch.ones(2, 8)]
    >>> basis = measure_basis(
    ...     model, ["0.weight"], [lambda m, x=x: m(x) for x in batches], rank=2
    ... )
    >>> basis.names
    (('0.weight',),)
    """
    modules = _linears(model, names)
    moments: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            square = (rows.T @ rows).cpu()
            moments[name] = moments[name] + square if name in moments else square

        return hook

    hooks = [m.register_forward_pre_hook(listen(name)) for name, m in modules.items()]
    try:
        with torch.no_grad():
            for forward in forwards:
                forward(model)
    finally:
        for handle in hooks:
            handle.remove()
    missing = modules.keys() - moments.keys()
    if missing:
        raise ValueError(f"no forward reached {min(missing)}; give batches that use every layer")
    shared: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for name, moment in moments.items():
        shared.setdefault(_encoded(_principal(moment, rank, iterations)), []).append(name)
    return Basis(
        rank,
        tuple(tuple(names) for names in shared.values()),
        tuple(codes for codes, _ in shared),
        tuple(scales for _, scales in shared),
    )


def _linears(model: nn.Module, names: Iterable[str]) -> Mapping[str, nn.Module]:
    wanted = set(names)
    found = {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{path}.weight" in wanted
    }
    if wanted - found.keys():
        raise ValueError(f"{min(wanted - found.keys())} is not the weight of a torch.nn.Linear")
    return found


def _principal(moment: Tensor, rank: int, iterations: int) -> Tensor:
    if rank > moment.shape[0]:
        raise ValueError(f"rank is {rank}, but an input has {moment.shape[0]} features; lower it")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(moment.shape[0], rank, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(start)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(moment.double() @ basis)[0]
    return basis


def _encoded(basis: Tensor) -> tuple[str, tuple[float, ...]]:
    columns = basis.float().numpy()
    scales = np.abs(columns).max(axis=0)
    codes = np.rint(columns / (scales * _GRAIN)).clip(-127, 127).astype(np.int8)
    return base64.b64encode(codes.tobytes()).decode("ascii"), tuple(map(float, scales))
