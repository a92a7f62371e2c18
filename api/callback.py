"""``HeadraceCallback``: what the lanes did, in the logs and the progress bar of a ``Trainer``.

Figures go into the Trainer's own logs, so that its history, its bar and every reporter
(TensorBoard and others) show them; nothing is measured that the engine does not measure anyway.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, final

from torch import nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from headrace.offload.budget import Tier
from headrace.offload.runtime import Runtime
from headrace.offload.timeline import LaneName

from .errors import InputError
from .reporting import Report, report
from .streamed import runtime_of

_PREFIX = "headrace/"
_LOGGER = logging.getLogger("headrace")


@final
class HeadraceCallback(TrainerCallback):
    """Adds the figures of the last step to every log of a ``Trainer`` over a streamed model.

    Each training log gains ``headrace/<lane>_busy`` (share of the step that the lane was busy,
    0 to 1), ``headrace/read_bytes`` and ``headrace/written_bytes`` (of the step),
    ``headrace/step_seconds``, and ``headrace/device_peak_bytes`` and
    ``headrace/host_peak_bytes`` (of the run).  At the end ``report`` is the run's ``Report``;
    with ``page`` it is also written there as one HTML file.

    ``attach(trainer)`` puts the callback before the reporters, so that TensorBoard and others
    see the figures, and names the bottleneck in the progress bar.  Given as
    ``Trainer(callbacks=[...])`` it comes after them: history and printed logs have the figures.

    >>> import headrace
    >>> from headrace.optim import adamw
    >>> from transformers import Trainer, TrainingArguments
    >>> model = headrace.load("model-folder", train="all", store="run", device="cpu")
    >>> rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 2
    >>> args = TrainingArguments(
    ...     "out", max_steps=1, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True
    ... )
    >>> optimizers = (adamw(model, lr=1e-3), None)
    >>> trainer = Trainer(model, args, train_dataset=rows, optimizers=optimizers)
    >>> watcher = headrace.HeadraceCallback().attach(trainer)
    >>> _ = trainer.train()
    {'loss': ...}
    >>> sorted(name for name in trainer.state.log_history[0] if name.endswith("_busy"))
    ['headrace/compute_busy', ...]
    >>> watcher.report.steps
    1
    >>> model.close()
    """

    def __init__(self, *, page: str | Path | None = None) -> None:
        self.report: Report | None = None
        self._page = None if page is None else Path(page)
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> HeadraceCallback:
        """Join a trainer in front of its other callbacks; return the callback."""
        handler = trainer.callback_handler
        handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]
        self._trainer = trainer
        return self

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to a training log."""
        if logs is None or "loss" not in logs:
            return
        figures = _figures(_runtime_of(kwargs.get("model")))
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
        self._show(figures)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make the report, log it, and write the page if one was asked for."""
        model = kwargs["model"]
        _runtime_of(model)
        self.report = report(model)
        _LOGGER.info("%s", self.report)
        if self._page is not None:
            self.report.save_html(self._page)

    def _show(self, figures: dict[str, float]) -> None:
        """Name the busiest lane in the progress bar, if there is one within reach."""
        busy = {n: v for n, v in figures.items() if n.endswith("_busy")}
        if self._trainer is None or not busy:
            return
        lane = max(busy, key=lambda name: busy[name])
        words = lane.removeprefix(_PREFIX).removesuffix("_busy").replace("_", " ")
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(f"{words} busy {busy[lane]:.0%}")


def _runtime_of(model: nn.Module | None) -> Runtime:
    try:
        return runtime_of(nn.Module() if model is None else model)
    except InputError as error:
        raise ValueError(
            f"HeadraceCallback watches a streamed model, but the Trainer's model is a "
            f"{type(model).__name__}. Open it with headrace.load, or leave the callback out."
        ) from error


def _figures(runtime: Runtime) -> dict[str, float]:
    last = runtime.last_step()
    if last is None:
        return {}
    lanes = last.lanes
    figures = {
        f"{_PREFIX}{name.value}_busy": round(lane.busy_seconds / last.seconds, 4)
        for name, lane in lanes.items()
    }
    return {
        **figures,
        f"{_PREFIX}step_seconds": last.seconds,
        f"{_PREFIX}read_bytes": lanes[LaneName.DISK_READ].nbytes,
        f"{_PREFIX}written_bytes": lanes[LaneName.DISK_WRITE].nbytes,
        **{
            f"{_PREFIX}{tier.value}_peak_bytes": budget.statistics().peak_bytes
            for tier, budget in (
                (Tier.DEVICE, runtime.device_budget),
                (Tier.HOST, runtime.host_budget),
            )
        },
    }
