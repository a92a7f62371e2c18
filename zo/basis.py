"""Input directions of linear layers: what their gradients' right sides are made of.

The gradient of a linear layer is a sum of ``(output gradient) (input)^T``, so its right side lies
in the span of the inputs.  A ``Basis`` holds each layer's strongest input directions, measured by
forwards on a few batches of the base model.  It is small (signed bytes) and lies in a log's header,
so that replay needs neither data nor forwards, and every device probes the same directions.
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

from ..quant.linear import EncodedModule
from .select import matrices_of

_GRAIN = np.float32(1 / 127)
MEASURED_BATCHES = 4
_LONGEST = 8  # rows a layer keeps whole
_OVERSAMPLE = 16  # columns of the sketch beyond the rank: the strongest ones come out exactly

Batch = Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Basis:
    """Input directions of trained matrices: ``rank`` columns each, kept as signed bytes.

    ``names[i]`` are the parameters that share the matrix ``codes[i]``: base64 of int8 [d, rank],
    in units of the largest magnitude of its column over 127 (``scales[i]``, one fp32 a column).
    The columns are orthogonal to about 1 %, of length 1 or shorter.

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import measure_basis
    >>> model = nn.Sequential(nn.Linear(8, 4, bias=False))
    >>> basis = measure_basis(model, [{"input": torch.eye(8)}], rank=3)
    >>> basis.rank, tuple(basis.matrix("0.weight", 8).shape)
    (3, (8, 3))
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

    def __contains__(self, name: str) -> bool:
        return any(name in names for names in self.names)

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


def call_model(model: nn.Module, batch: Batch) -> object:
    """``model(**batch)``: how ``measure_basis`` calls a model that is not told otherwise."""
    return model(**batch)


def measure_basis(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    names: Iterable[str] | None = None,
    rank: int = 4,
    forward: Callable[[nn.Module, Batch], object] = call_model,
) -> Basis:
    """Input directions of linear layers, strongest first, from a few forwards of the model.

    ``batches``: inputs of the model; rows that an ``attention_mask`` [rows, tokens] hides do not
    count.  ``MEASURED_BATCHES`` of the run are enough.  ``names``: weights of linear layers; by
    default all that low-rank directions train, less those that no batch reaches and those with
    fewer than ``rank`` input features.  ``model`` may be resident or streamed.

    A few tokens (a text's first, often) have inputs hundreds of times as long as the rest, in
    layers that make "massive activations"; whatever lies along them moves the model out of all
    proportion.  So every row counts alike, whatever its length, and a column is shortened until no
    row's product with it exceeds the length of a typical row.

    Memory while it measures: about 200 bytes an input feature of every layer (0.25 GB for 8e9
    parameters), outside of any budget.  Method: a randomised (Nystrom) sketch of the uncentred
    second moments, with a fixed start.

    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> from headrace.zo import measure_basis
    >>> model = AutoModelForCausalLM.from_pretrained("model-folder")
    >>> basis = measure_basis(model, [{"input_ids": torch.randint(0, 250, (4, 8))}])
    >>> basis.rank, len(basis.names[0])  # query, key and value have one input
    (4, 3)
    """
    modules = _all_linears(model, rank) if names is None else _linears(model, names)
    starts = {width: _start(width, rank) for width in {m.in_features for m in modules.values()}}
    sketches = {name: _Sketch(starts[module.in_features]) for name, module in modules.items()}
    mask: Tensor | None = None

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            sketches[name].add(inputs[0].detach(), mask)

        return hook

    hooks = [m.register_forward_pre_hook(listen(name)) for name, m in modules.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                for sketch in sketches.values():
                    sketch.rows_of_batch = 0
                forward(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    missing = [name for name, sketch in sketches.items() if not sketch.num_rows]
    if missing and (names is not None or len(missing) == len(sketches)):
        raise ValueError(f"no forward reached {missing[0]}; give batches that use every layer")
    shared: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for name, sketch in sketches.items():
        if name in missing:
            continue
        shared.setdefault(_encoded(sketch.principal(rank)), []).append(name)
    return Basis(
        rank,
        tuple(tuple(names) for names in shared.values()),
        tuple(codes for codes, _ in shared),
        tuple(scales for _, scales in shared),
    )


def _named(model: nn.Module) -> dict[str, nn.Linear]:
    return {f"{p}.weight": m for p, m in model.named_modules() if isinstance(m, nn.Linear)}


def measurable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that ``measure_basis`` looks at by default, by weight; GPT-2 has none.

    >>> from torch import nn
    >>> sorted(measurable(nn.Sequential(nn.Linear(8, 4), nn.ReLU())))
    ['0.weight']
    """
    usable = matrices_of(model)
    return {
        name: module
        for name, module in _named(model).items()
        if (isinstance(module, EncodedModule) and "experts" not in name.split("."))
        or id(module._parameters.get("weight")) in usable
    }


def why_not_measurable(model: nn.Module) -> str | None:
    """What to tell a user whose model has no input directions to measure; None if it has some."""
    if measurable(model):
        return None
    return (
        f"{type(model).__name__} has no linear layers of torch: directions are drawn, not "
        "measured, and learn more slowly"
    )


def _all_linears(model: nn.Module, rank: int) -> Mapping[str, nn.Linear]:
    found = measurable(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer whose input directions could be measured; "
            "leave the basis out"
        )
    wide = {name: module for name, module in found.items() if module.in_features >= rank}
    if not wide:
        most = max(module.in_features for module in found.values())
        raise ValueError(f"rank is {rank}, but no input has more than {most} features; lower it")
    return wide


def _linears(model: nn.Module, names: Iterable[str]) -> Mapping[str, nn.Linear]:
    linears, wanted = _named(model), list(names)
    for name in wanted:
        if name not in linears:
            raise ValueError(f"{name} is not the weight of a torch.nn.Linear")
    return {name: linears[name] for name in wanted}


def _start(columns: int, rank: int) -> Tensor:
    if rank > columns:
        raise ValueError(f"rank is {rank}, but an input has {columns} features; lower it")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(columns, min(rank + _OVERSAMPLE, columns), generator=generator)


@final
class _Sketch:
    """Second moments M [d, d] of one layer's input rows of length 1, as M times fixed columns."""

    def __init__(self, start: Tensor) -> None:
        self._start = start
        self._moved = torch.zeros(start.shape, dtype=torch.float64)
        self._longest = torch.zeros(0, start.shape[0])
        self._lengths: list[Tensor] = []
        self.rows_of_batch = 0  # a streamed layer gets a batch in several calls

    @property
    def num_rows(self) -> int:
        """Rows taken so far."""
        return sum(len(lengths) for lengths in self._lengths)

    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        """Take the rows of one call [..., d]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if mask is not None and inputs.dim() == 3 and inputs.shape[1] == mask.shape[-1]:
            first = self.rows_of_batch
            self.rows_of_batch += inputs.shape[0]
            shown = mask[first : self.rows_of_batch].reshape(-1).bool()
            if shown.numel() == len(rows):
                rows = rows[shown.to(rows.device)]
        lengths = rows.norm(dim=1)
        self._lengths.append(lengths.cpu())
        long = rows[lengths.topk(min(_LONGEST, len(rows))).indices].cpu()
        known = torch.cat([self._longest, long])
        self._longest = known[known.norm(dim=1).topk(min(_LONGEST, len(known))).indices]
        rows = nn.functional.normalize(rows, dim=1)
        self._moved += (rows.T @ (rows @ self._start.to(rows.device))).cpu()

    def principal(self, rank: int) -> Tensor:
        """The strongest directions of M, strongest first, shortened as ``measure_basis`` says."""
        start, moved = self._start.double(), self._moved
        basis, triangle = torch.linalg.qr(moved)
        inner = start.T @ moved
        core = triangle @ torch.linalg.pinv((inner + inner.T) / 2, hermitian=True) @ triangle.T
        vectors = torch.linalg.eigh((core + core.T) / 2).eigenvectors.flip(1)
        columns = (basis @ vectors[:, :rank]).float()
        typical = torch.cat(self._lengths).median()
        reach = (self._longest @ columns).abs().amax(dim=0)
        return columns * (typical / reach.clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1.0)


def _encoded(basis: Tensor) -> tuple[str, tuple[float, ...]]:
    columns = basis.numpy()
    scales = np.maximum(np.abs(columns).max(axis=0), np.finfo(np.float32).tiny)
    codes = np.rint(columns / (scales * _GRAIN)).clip(-127, 127).astype(np.int8)
    return base64.b64encode(codes.tobytes()).decode("ascii"), tuple(map(float, scales))
