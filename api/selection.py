"""Which weights a run trains: by name, by a measurement of the weights, by how much they move.

``headrace.load(..., train=SELECTION)`` trains the chosen parameters alone; the others are read in
place, cost no store, no state and no writing.  Measurements stream the model once, one chunk in
memory at a time, plus one matrix in fp64.

As text (the command line's ``--train``): ``spectrum:0.25``, ``slimfit:0.5``, or ``regex:PATTERN``.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from headrace.quant.fold import KEPT_MODULES

from .errors import InputError
from .streamed import StreamedModel


class Selection(ABC):
    """A choice of the parameters to train."""

    @abstractmethod
    def choose(self, streamed: StreamedModel) -> frozenset[str]:
        """Return the names of the parameters to train, among those of a freshly loaded model."""

    def after_step(self, streamed: StreamedModel) -> None:  # noqa: B027  most choices are made once
        """Hear of a finished step; a choice that changes during training changes here."""


@final
@dataclass(frozen=True)
class Named(Selection):
    """The parameters whose names one of the regular expressions matches anywhere.

    ``exact`` takes the words as whole names instead.
    """

    patterns: tuple[str, ...]
    exact: bool = False

    def __post_init__(self) -> None:
        for pattern in () if self.exact else self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"train pattern {pattern!r} is no regular expression: {error}"
                ) from error

    def choose(self, streamed: StreamedModel) -> frozenset[str]:
        names = _parameter_names(streamed)
        found: set[str] = set()
        for pattern in self.patterns:
            if self.exact:
                matched = {pattern} & names
            else:
                matched = {name for name in names if re.search(pattern, name)}
            if not matched:
                raise InputError(
                    f"train names {pattern!r}, which no parameter of {type(streamed).__name__} "
                    f"matches; there are {sorted(names)[:4]} and {max(len(names) - 4, 0)} more"
                )
            found |= matched
        return frozenset(found)

    def __str__(self) -> str:
        return f"{'names' if self.exact else 'regex'}:{'|'.join(self.patterns)}"


@final
@dataclass(frozen=True)
class Spectrum(Selection):
    """The matrices of each kind with the largest signal-to-noise ratio (Hartford et al., 2024).

    Of each kind of matrix (``q_proj`` of all layers, ``up_proj`` of all layers, ...) the share
    ``fraction`` is trained, rounded up.  Embeddings, heads, routers, norms and biases are not.
    """

    fraction: float = 0.25

    def __post_init__(self) -> None:
        _check_fraction("spectrum", self.fraction)

    def choose(self, streamed: StreamedModel) -> frozenset[str]:
        ratios = signal_to_noise(streamed)
        kinds: dict[str, list[str]] = {}
        for name in ratios:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
        chosen: set[str] = set()
        for names in kinds.values():
            count = math.ceil(self.fraction * len(names) - 1e-9)
            chosen.update(sorted(names, key=lambda name: (-ratios[name], name))[:count])
        return frozenset(chosen)

    def __str__(self) -> str:
        return f"spectrum:{self.fraction:g}"


@final
@dataclass
class SlimFit(Selection):
    """All matrices at first; then, every few steps, those that moved least rest (2023, ILS).

    After ``every`` steps the share ``frozen`` of the matrices whose values changed least since
    the last look (relative rms, estimated on ``samples`` elements each) is frozen until the next
    look.  A frozen matrix does not move, so it is compared by its last movement, halved at each
    look: what rests long enough is tried again.  Deviation from the paper: one choice for
    ``every`` steps rather than for each, because looking streams the model once.
    """

    frozen: float = 0.5
    every: int = 10
    samples: int = 1024
    _steps: int = 0
    _seen: dict[str, Tensor] = field(default_factory=dict)
    _moved: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_fraction("slimfit", self.frozen)
        if self.frozen == 1.0:
            raise InputError("slimfit is given the share 1: nothing would be left to train")
        if self.every < 1 or self.samples < 1:
            raise InputError(
                f"slimfit looks every {self.every} steps at {self.samples} elements; give 1 or more"
            )

    def choose(self, streamed: StreamedModel) -> frozenset[str]:
        # One object may choose for several models, one after the other.
        self._steps = 0
        self._moved.clear()
        self._seen = self._look(streamed)
        return frozenset(self._seen)

    def after_step(self, streamed: StreamedModel) -> None:
        self._steps += 1
        if self._steps % self.every:
            return
        seen = self._look(streamed)
        parameters = _parameters(streamed)
        for name, values in seen.items():
            before = self._seen[name]
            if parameters[name].requires_grad:
                scale = float(before.norm().clamp(min=1e-30))
                self._moved[name] = float((values - before).norm()) / scale
            else:
                self._moved[name] = self._moved.get(name, 0.0) / 2
        self._seen = seen
        least = sorted(self._moved, key=lambda name: (self._moved[name], name))
        resting = set(least[: int(self.frozen * len(least))])
        for name in seen:
            parameters[name].requires_grad_(name not in resting)

    def _look(self, streamed: StreamedModel) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for _, tensors in streamed.chunk_tensors():
            for name, value in tensors.items():
                if _is_matrix(name, value):
                    flat = value.reshape(-1)
                    stride = max(1, flat.numel() // self.samples)
                    seen[name] = flat[::stride][: self.samples].to(torch.float32, copy=True)
        return seen

    def __str__(self) -> str:
        return f"slimfit:{self.frozen:g}"


def selection_of(train: str | Sequence[str] | Selection) -> Selection:
    """Return the selection that ``train=`` asks for; ``str`` of one gives such a text again.

    >>> str(selection_of("spectrum:0.5"))
    'spectrum:0.5'
    >>> str(selection_of(["model.norm.weight"]))
    'names:model.norm.weight'
    """
    if isinstance(train, Selection):
        return train
    if not isinstance(train, str):
        if not isinstance(train, Sequence) or not all(isinstance(word, str) for word in train):
            raise InputError(f"train is {train!r}; give a word, or a list of parameter names")
        if not train:
            raise InputError("train names no parameter at all; give train='none' to train nothing")
        return Named(tuple(train), exact=True)
    word, _, rest = train.partition(":")
    if word == "regex" and rest:
        return Named((rest,))
    if word == "names" and rest:
        return Named(tuple(rest.split("|")), exact=True)
    if word in ("spectrum", "slimfit"):
        try:
            share = float(rest) if rest else None
        except ValueError as error:
            raise InputError(f"train is {train!r}; give a share, as in {word}:0.25") from error
        if word == "spectrum":
            return Spectrum() if share is None else Spectrum(share)
        return SlimFit() if share is None else SlimFit(share)
    raise InputError(
        f"train is {train!r}; choose adapters, all, none, spectrum:SHARE, slimfit:SHARE or "
        f"regex:PATTERN, or give a list of parameter names"
    )


def train_only(streamed: StreamedModel, chosen: frozenset[str]) -> None:
    """Let the chosen parameters require gradients, and no others."""
    for name, parameter in _parameters(streamed).items():
        parameter.requires_grad_(name in chosen)


def signal_to_noise(streamed: StreamedModel) -> dict[str, float]:
    """Measure every matrix of the decoder layers, streaming the model once; name -> ratio.

    The singular values above the largest that noise of the same spread would have (Marchenko and
    Pastur; the spread from the interquartile range), summed, over the sum of those below, over
    the largest.  A stack of matrices counts with its mean.
    """
    ratios: dict[str, float] = {}
    for _, tensors in streamed.chunk_tensors():
        for name, value in tensors.items():
            if _is_matrix(name, value):
                stack = value.reshape(-1, *value.shape[-2:])
                each = [_ratio(matrix.to(torch.float64)) for matrix in stack]
                ratios[name] = sum(each) / len(each)
    return ratios


def _ratio(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    largest = float(values[0])
    if largest == 0.0:
        return 0.0
    quarters = torch.quantile(values, values.new_tensor([0.25, 0.75]))
    spread = float(quarters[1] - quarters[0]) / 1.349
    shape = min(matrix.shape) / max(matrix.shape)
    threshold = spread * (1.0 + math.sqrt(shape))
    signal = float(values[values > threshold].sum())
    noise = float(values[values <= threshold].sum())
    return signal / max(noise, 1e-30) / largest


def _is_matrix(name: str, value: Tensor) -> bool:
    words = name.split(".")
    owner = words[-2] if words[-1] == "weight" and len(words) > 1 else words[-1]
    return (
        value.dim() >= 2
        and value.is_floating_point()
        and any(word.isdigit() for word in words)
        and owner not in KEPT_MODULES
        and "norm" not in owner
    )


def _parameters(streamed: StreamedModel) -> dict[str, Any]:
    return {
        name: parameter
        for bound in streamed._runtime.bound.values()
        for name, parameter in bound.parameters.items()
    }


def _parameter_names(streamed: StreamedModel) -> set[str]:
    return set(_parameters(streamed))


def _check_fraction(word: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise InputError(f"{word} is given the share {value:g}; give more than 0, at most 1")
