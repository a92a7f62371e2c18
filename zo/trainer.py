"""``ZOTrainer``: the Hugging Face Trainer with its training step replaced by forwards.

Schedulers, logging, callbacks, evaluation and saving stay the Trainer's own.  No gradient ever
exists.  ``args.learning_rate`` and its schedule are the step sizes; ``settings.lr`` is not used.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import Trainer

from .basis import MEASURED_BATCHES, Basis, measure_basis, why_not_measurable
from .objective import causal_lm_losses
from .settings import ZOSettings, recommended
from .step import ZOStep

Metric = Callable[[nn.Module, dict[str, Any]], float]
PartLosses = Callable[..., Sequence[float]]


@final
class ZOTrainer(Trainer):
    """Trains by zeroth-order steps; everything else is a ``Trainer``.

    ``settings``: the method; by default ``recommended`` for batches of
    ``per_device_train_batch_size`` rows, with input directions measured on the first training
    batches.  ``log``: path of the replay log (must not exist).  ``objective``:
    ``(model, inputs) -> float`` to minimise, differentiable or not; by default the Trainer's own
    loss.  ``select``: which parameters train (see ``ZOStep``).

    An estimator with directions for every example (``PerExample``, of ``recommended()``) needs a
    loss of every part of a batch: ``part_losses``, a function with ``causal_lm_losses``'s
    arguments, which is also the default.  Batches must split into its parts: have as many rows
    (``dataloader_drop_last=True`` leaves out a last one with fewer).

    Dropout is off while members are evaluated, as the comparison of their losses demands.  Refuses
    gradient accumulation (use larger batches) and ``resume_from_checkpoint`` (the log with the base
    model is the checkpoint: ``ZOStep.resume``).
    """

    def __init__(
        self,
        *args: Any,
        settings: ZOSettings | None = None,
        log: str | os.PathLike[str] | None = None,
        objective: Metric | None = None,
        part_losses: PartLosses | None = None,
        select: Callable[[str, nn.Parameter], bool] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError(
                "zeroth-order steps have no gradients to accumulate: set "
                "gradient_accumulation_steps=1 and raise per_device_train_batch_size (got "
                f"{self.args.gradient_accumulation_steps})"
            )
        if not isinstance(self.model, nn.Module):
            raise ValueError("ZOTrainer needs model= or model_init=")
        if settings is None:
            settings = self._recommended(self.model, alone=objective is not None)
        self._parts = settings.estimator.parts
        given = "part_losses" if objective is None else "objective"
        if (objective is not None and self._parts > 1) or (part_losses and self._parts == 1):
            raise ValueError(
                f"{type(settings.estimator).__name__} evaluates {self._parts} parts of a batch and "
                f"cannot use {given}: objective is for estimators of whole batches "
                "(recommended(examples=1)), part_losses for PerExample"
            )
        self._objective = objective
        self._part_losses = part_losses or causal_lm_losses
        self.zo = ZOStep(self.model, settings, log=log, select=select)

    def _recommended(self, model: nn.Module, *, alone: bool) -> ZOSettings:
        examples = 1 if alone else self.args.per_device_train_batch_size
        copies = 15 if alone else 4
        basis = self._measured(model)
        return recommended(seed=self.args.seed, copies=copies, examples=examples, basis=basis)

    def _measured(self, model: nn.Module) -> Basis | None:
        if (reason := why_not_measurable(model)) is not None:
            warnings.warn(reason, stacklevel=4)
            return None
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng():  # the training's own order stays as it is
                batches = itertools.islice(self.get_train_dataloader(), MEASURED_BATCHES)
                return measure_basis(model, map(self._prepare_inputs, batches))
        finally:
            model.train(was_training)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """An optimizer that carries the learning rate for schedulers and finds no gradients."""
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(
                [torch.zeros((), requires_grad=True)], lr=self.args.learning_rate
            )
        return self.optimizer

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; resuming is the log's business."""
        if resume_from_checkpoint:
            raise ValueError(
                "resume_from_checkpoint would start from changed weights; load the base model and "
                "call ZOStep.resume(model, log)"
            )
        return super().train(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One zeroth-order step; returns the mean loss over its members."""
        prepared = self._prepare_inputs(inputs)
        was_training = model.training
        model.eval()

        def evaluate(_: nn.Module) -> float:
            if self._objective is not None:
                return float(self._objective(model, prepared))
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, prepared, num_items_in_batch=num_items_in_batch)
            return float(loss[0] if isinstance(loss, tuple) else loss)

        def together(_: nn.Module, copies: int) -> Sequence[float]:
            return self._part_losses(model, prepared, copies, parts=self._parts)

        step, lr = self.state.global_step, self._get_learning_rate()
        try:
            if self._parts > 1:
                result = self.zo.step_together(together, batch=step, lr=lr)
            else:
                result = self.zo.step(evaluate, batch=step, lr=lr)
        finally:
            model.train(was_training)
        return torch.tensor(result.loss, device=self.args.device)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with pending low-rank updates."""
        with self.zo.current():
            return super().prediction_step(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the weights as trained so far."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.zo.merged())
            super().save_model(*args, **kwargs)
