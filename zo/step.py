"""The zeroth-order step on a resident model: any objective, forwards only, exact replay.

::

    zo = ZOStep(model, ZOSettings(lr=1e-6, eps=1e-3), log="run.zolog")
    for index, batch in enumerate(data):
        result = zo.step(lambda model: model(**batch).loss, batch=index)

The objective may be any number: a loss, an accuracy, a score of generated text.  It is called under
``no_grad`` once a member.  The model's mode (``eval``: no dropout) is the caller's business.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from ..offload.errors import StoreFormatError
from .control import apply_controls
from .estimate import Member, all_finite
from .factored import FactoredTrace
from .log import LogHeader, ReplayLog, StepRecord
from .members import MemberForward, TrainedMatrix
from .noise import step_seed
from .perturb import StepUpdate
from .replay import places_of, trained_shapes, updates_of
from .residual import Fp32Residual
from .select import select_parameters
from .settings import ZOSettings, check_lr, check_record
from .weights import ResidentWeights, Weights

Objective = Callable[[nn.Module], Any]
MemberObjective = Callable[[nn.Module, int], Sequence[float]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step saw and did.

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import ZOSettings, ZOStep
    >>> model = nn.Linear(2, 1)
    >>> x, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> run = ZOStep(model, ZOSettings(lr=1e-2))
    >>> result = run.step(lambda m: float(((m(x) - y) ** 2).mean()))
    >>> result.record.step, len(result.record.losses)
    (0, 2)
    >>> run.close()
    """

    record: StepRecord
    loss: float
    """Mean over members: the objective at the smoothed weights."""


@final
class ZOStep:
    """Steps a resident model by forwards only.

    Dense directions need a second copy of the trained weights as scratch; low-rank directions need
    their factors only.  ``select`` names the trained parameters (``(name, parameter) -> bool``);
    by default all that require grad, and for low-rank directions of those the matrices of linear
    layers.  With ``log``, a record is on the medium before its update is applied; the file must not
    exist (``ZOStep.resume`` continues one).

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import ZOSettings, ZOStep
    >>> model = nn.Linear(2, 1)
    >>> x, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> run = ZOStep(model, ZOSettings(lr=1e-2), log="step.log")
    >>> result = run.step(lambda m: float(((m(x) - y) ** 2).mean()))
    >>> run.next_step
    1
    >>> run.close()
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ZOSettings,
        *,
        log: str | os.PathLike[str] | None = None,
        select: Callable[[str, nn.Parameter], bool] | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        if weights is None:
            weights = ResidentWeights(select_parameters(model, settings.directions, select))
        elif select is not None:
            raise ValueError("give select to the weights, not to ZOStep, when weights are given")
        self._weights = weights
        shapes = {name: tuple(p.shape) for name, p in weights.parameters.items()}
        places = places_of(shapes, settings.seed)
        self._traces = {name: settings.directions.open(place) for name, place in places.items()}
        self._memories = tuple(control.initial() for control in settings.controls)
        weights.attach(self._traces)
        self._next_step = 0
        self._skipped = 0
        self._log = None if log is None else ReplayLog.create(log, self.header())

    @classmethod
    def resume(
        cls,
        model: nn.Module,
        log: str | os.PathLike[str],
        *,
        weights: Callable[[Callable[[str, nn.Parameter], bool]], Weights] | None = None,
    ) -> Self:
        """Bring a model that holds the *base* weights up to date with a log and continue it.

        ``weights`` makes the weights from a selection, for models that are not resident.
        """
        opened, records = ReplayLog.open(log)
        with contextlib.ExitStack() as refused:
            refused.callback(opened.close)
            settings = ZOSettings.from_json(opened.header.settings.get("method", {}))
            names = trained_shapes(opened.header)

            def select(name: str, _: nn.Parameter) -> bool:
                return name in names

            if weights is None:
                made = cls(model, settings, select=select)
            else:
                chosen = weights(select)
                refused.callback(chosen.close)
                made = cls(model, settings, weights=chosen)
            found = made.header()
            if (found.base, found.settings) != (opened.header.base, opened.header.settings):
                raise StoreFormatError(
                    f"{os.fspath(log)} belongs to base {opened.header.base}, the model's trained "
                    f"weights have fingerprint {found.base}; load the base that the run began with"
                )
            made.catch_up(records)
            refused.pop_all()
        made._log = opened
        return made

    @property
    def settings(self) -> ZOSettings:
        """The method."""
        return self._settings

    @property
    def next_step(self) -> int:
        """Number of the step that comes next."""
        return self._next_step

    @property
    def skipped_steps(self) -> int:
        """Steps whose losses held inf or NaN."""
        return self._skipped

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Names of the trained parameters."""
        return tuple(self._weights.parameters)

    def identity(self) -> str:
        """32 hex digits of settings, trained names, coming step and stored weights."""
        header = self.header()
        text = json.dumps([header.base, header.settings, self._next_step], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Let a resident model's parameters hold the weights as trained so far, for saving."""
        with self._weights.merged():
            yield

    def header(self) -> LogHeader:
        """The log header of a run that starts from the model's present weights."""
        return LogHeader(
            base=self._weights.fingerprint(),
            settings={
                "method": self._settings.to_json(),
                "trained": {name: list(p.shape) for name, p in self._weights.parameters.items()},
            },
            losses=len(self._settings.estimator.members()),
            grads=self._settings.estimator.directions,
        )

    def step(self, objective: Objective, *, batch: int = 0, lr: float | None = None) -> StepResult:
        """Evaluate the objective for every member, one forward after the other, and update."""
        members = range(len(self._settings.estimator.members()))
        return self.finish_step(self.losses_of(objective, members), batch=batch, lr=lr)

    def losses_of(self, objective: Objective, members: Sequence[int]) -> list[float]:
        """The objective for some members of the coming step, by their index."""
        parts = self._settings.estimator.parts
        if parts > 1:
            raise ValueError(
                f"{type(self._settings.estimator).__name__} has members for each of {parts} parts "
                "of a batch and needs a loss of each part: call step_together, or use OneSided "
                "(recommended(examples=1)) for an objective that is one number"
            )
        seed = step_seed(self._settings.seed, self._next_step)
        known = self._settings.estimator.members()
        losses = []
        for index in members:
            with torch.no_grad(), self.evaluating([known[index]], seed):
                losses.append(float(objective(self._model)))
        return losses

    def step_together(
        self, objective: MemberObjective, *, batch: int = 0, lr: float | None = None
    ) -> StepResult:
        """Evaluate all members in one forward: ``objective(model, copies) -> losses``.

        The objective repeats its batch ``copies`` times along the batch axis (copy after copy) and
        returns one loss each; ``objective.causal_lm_losses`` does.  An estimator with ``parts``
        (``PerExample``) needs a loss of every part of every copy, copies first: the helpers'
        ``parts``.  Low-rank only.
        """
        seed = step_seed(self._settings.seed, self._next_step)
        estimator = self._settings.estimator
        with torch.no_grad(), self.evaluating(estimator.members(), seed):
            losses = [float(loss) for loss in objective(self._model, estimator.copies)]
        return self.finish_step(losses, batch=batch, lr=lr)

    @contextlib.contextmanager
    def evaluating(self, members: Sequence[Member], seed: int) -> Iterator[None]:
        """Let the model compute with the weights of these members (several: low-rank only)."""
        factored = {
            name: trace for name, trace in self._traces.items() if isinstance(trace, FactoredTrace)
        }
        eps = self._settings.eps
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._weights.evaluating(members, seed=seed, eps=eps))
            if self._settings.fp32_residual:
                stack.enter_context(Fp32Residual())
            if factored:
                matrices = [
                    TrainedMatrix(
                        name,
                        self._weights.parameters[name],
                        trace.window(self._next_step),
                        self._weights.adapter_of(name),
                    )
                    for name, trace in factored.items()
                ]
                rows_of = self._weights.rows_of
                stack.enter_context(
                    MemberForward(matrices, members, seed=seed, eps=eps, rows_of=rows_of)
                )
            yield

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Let the model compute with the weights as trained so far, for evaluation."""
        with torch.no_grad(), self.evaluating([Member(0, 0)], 0):
            yield

    def finish_step(
        self, losses: Sequence[float], *, batch: int = 0, lr: float | None = None
    ) -> StepResult:
        """Turn losses into an update: estimate, control, log, apply."""
        rate = self._settings.lr if lr is None else lr
        check_lr(rate)
        record = self._record(losses, batch=batch, lr=rate)
        if self._log is not None:
            self._log.append(record)
        self._apply(record)
        return StepResult(record, sum(losses) / len(losses))

    def catch_up(self, records: Sequence[StepRecord]) -> None:
        """Apply steps recorded elsewhere (a log, other workers) and continue after them."""
        for record in records:
            check_record(record, "replay")
        if records and records[0].step != self._next_step:
            raise ValueError(
                f"records start at step {records[0].step}, this run stands at {self._next_step}"
            )
        for record in records:
            self._remember(record.losses, record.eps)
        self._apply_to_all(records)
        if records:
            self._next_step = records[-1].step + 1
            self._weights.settle(self._next_step)
        self._skipped += sum(record.skipped for record in records)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Yield copies of the trained parameters as they stand, pending updates merged."""
        for name, weight in self._weights.stored():
            copy = weight.detach().clone()
            del weight  # a view of memory that the next one may need
            self._weights.finish(name, copy)
            yield name, copy

    def close(self) -> None:
        """Close the log and let go of the model."""
        try:
            self._weights.close()
        finally:
            if self._log is not None:
                self._log.close()

    def _record(self, losses: Sequence[float], *, batch: int, lr: float) -> StepRecord:
        settings = self._settings
        grads, fine = self._remember(tuple(losses), settings.eps)
        return StepRecord(
            step=self._next_step,
            seed=step_seed(settings.seed, self._next_step),
            batch=batch,
            lr=lr,
            eps=settings.eps,
            losses=tuple(losses),
            grads=grads,
            skipped=not fine,
        )

    def _remember(self, losses: Sequence[float], eps: float) -> tuple[tuple[float, ...], bool]:
        """Projected grads after controls, as fp32 numbers; moves the controls' memories."""
        settings = self._settings
        nothing = (0.0,) * settings.estimator.directions
        if not all_finite(losses):
            return nothing, False
        raw = settings.estimator.projected_grads(losses, eps)
        grads, memories = apply_controls(settings.controls, raw, self._memories)
        with np.errstate(over="ignore"):
            rounded = tuple(float(np.float32(grad)) for grad in grads)
        if not all_finite(rounded):
            return nothing, False
        self._memories = memories
        return rounded, True

    def _apply(self, record: StepRecord) -> None:
        self._apply_to_all([record])
        self._next_step = record.step + 1
        self._skipped += record.skipped
        self._weights.settle(self._next_step)

    def _apply_to_all(self, records: Sequence[StepRecord]) -> None:
        # An update depends on a parameter's name by its weight decay only.
        shared: dict[bool, list[StepUpdate]] = {}
        for name in self._weights.parameters:
            decays = self._settings.decays(name)
            if decays not in shared:
                shared[decays] = updates_of(self._settings, records, name)
            self._weights.apply(name, list(shared[decays]))
