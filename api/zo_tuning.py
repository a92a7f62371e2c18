"""``headrace tune --method zo``: fine-tuning by forwards only, on a streamed model.

All members of a step travel through the model as one batch; weights are read, never written; the
replay log is the checkpoint (``zo_run``).  The loss is that of every label token, computed a few
tokens of logits at a time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headrace.offload.loss import LazyLogits

from .closing import ClosedAfter
from .data import IGNORED_LABEL
from .errors import InputError
from .exporting import write_model
from .options import TuneOptions
from .preparation import Material
from .progress import Watcher
from .reporting import SUMMARY_NAME, report
from .saving import check_room, kept_in, written_whole
from .streamed import StreamedModel, runtime_of, weight_bytes
from .tune_result import TuneResult, evaluated, sampled, step_event
from .zo_run import LOG_NAME, check_plain, check_rows, create_run, read_run

if TYPE_CHECKING:
    from headrace.zo.basis import Basis
    from headrace.zo.settings import ZOSettings
    from headrace.zo.step import ZOStep

TILE_BYTES = 64 << 20  # fp32 logits that exist at a time


def tune_zo(options: TuneOptions, material: Material, watcher: Watcher, began: float) -> TuneResult:
    """Train, save the model, and return what happened; the caller has checked the options."""
    from .loading import load

    path = Path(options.model).expanduser()
    model: Any = load(
        path.absolute() if path.is_dir() else options.model,
        train="none",
        device=options.device,
        device_budget=options.device_budget,
        host_budget=options.host_budget,
    )
    assert isinstance(model, StreamedModel)
    with ClosedAfter(model.close):
        check_plain(
            model,
            options.model,
            "give the checkpoint that they were made of, or train their scales from Python "
            "(headrace.zo.quantised: qzo_settings, trains_scales)",
        )
        check_room(options.out, weight_bytes(model))
        return _run(options, material, model, watcher, began)


def settings_of(options: TuneOptions, basis: Basis | None = None) -> ZOSettings:
    """The method that the options name, ``basis`` for the recommended one."""
    from headrace.zo.settings import ZOSettings, recommended

    lr, eps = options.learning_rate, options.probe_size
    if options.zo_method == "mezo":
        decay = options.weight_decay
        return ZOSettings(lr=lr, eps=eps, seed=options.seed, weight_decay=decay)
    if options.weight_decay:
        raise InputError(
            f"--weight-decay is {options.weight_decay}; low-rank steps leave the base as it is "
            "between merges and have none: leave it out, or give --zo-method mezo"
        )
    copies, rows = options.zo_directions, options.batch_size
    return recommended(lr=lr, eps=eps, seed=options.seed, copies=copies, examples=rows, basis=basis)


def measured_basis(
    options: TuneOptions, material: Material, model: StreamedModel, watcher: Watcher
) -> Basis | None:
    """Input directions of the model's layers on the first batches; None if the method has none."""
    from headrace.zo.basis import MEASURED_BATCHES, measure_basis, why_not_measurable

    if options.zo_method == "mezo":
        return None
    if (reason := why_not_measurable(model)) is not None:
        watcher.say(reason)
        return None
    count = min(MEASURED_BATCHES, material.steps)
    watcher.say(f"measuring the layers' input directions on {count} batches")
    batches = (
        material.batch(material.train, material.order.rows(step), runtime_of(model).device)
        for step in range(count)
    )
    model.eval()
    return measure_basis(model, batches, forward=_without_logits)


def _without_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    assert isinstance(model, StreamedModel)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if model._head is None:
        model(**inputs, use_cache=False, logits_to_keep=1)
        return
    with runtime_of(model).forward_pass(len(batch["labels"]), training=False):
        _before_the_head(model, inputs)


def _run(
    options: TuneOptions, material: Material, model: Any, watcher: Watcher, began: float
) -> TuneResult:
    store = options.store_folder
    assert store is not None
    settings_of(options)  # refuses before anything is made
    if options.resume:
        record = read_run(store)
        check_rows(record, material.train, store)
        measured = record["measured"]
    else:
        measured = {
            "loss_before": evaluated(options, material, model, watcher, "before"),
            "sample_before": sampled(options, material, model, watcher, "before"),
        }
        create_run(store, options, material.train, measured)
    zo = _opened(options, material, model, watcher, store / LOG_NAME)
    with ClosedAfter(zo.close):
        if zo.next_step:
            watcher.say(f"going on after step {zo.next_step} of {material.steps}")
        losses, seconds = _train(options, material, model, zo, watcher)
        tokens = sum(_tokens_of(material, step) for step in range(material.steps))
        final = report(model, tokens_per_step=round(tokens / material.steps))
        with zo.current():
            loss_after = evaluated(options, material, model, watcher, "after")
            sample_after = sampled(options, material, model, watcher, "after")
        result = TuneResult(
            out=options.out,
            steps=material.steps,
            num_tokens=tokens,
            train_seconds=seconds,
            total_seconds=time.perf_counter() - began,
            loss_before=measured["loss_before"],
            loss_after=loss_after,
            sample_before=measured["sample_before"],
            sample_after=sample_after,
            step_losses=tuple(losses),
            report=final,
        )
    watcher.say(f"saving {options.out}")
    with kept_in(store):
        _save(options, material, model, result, store / LOG_NAME)
    return result


def _opened(
    options: TuneOptions, material: Material, model: Any, watcher: Watcher, log: Path
) -> ZOStep:
    from headrace.zo.step import ZOStep
    from headrace.zo.streamed import StreamedWeights

    runtime = runtime_of(model)
    if not log.exists():
        settings = settings_of(options, measured_basis(options, material, model, watcher))
        weights = StreamedWeights(model, runtime, settings.directions)
        return ZOStep(model, settings, log=log, weights=weights)

    directions = settings_of(options).directions

    def again(select: Callable[[str, nn.Parameter], bool]) -> StreamedWeights:
        return StreamedWeights(model, runtime, directions, select=select)

    return ZOStep.resume(model, log, weights=again)


def _train(
    options: TuneOptions, material: Material, model: Any, zo: ZOStep, watcher: Watcher
) -> tuple[list[float], float]:
    losses: list[float] = []
    seconds = 0.0
    steps = material.steps
    runtime = runtime_of(model)
    model.eval()
    watcher.begin(steps)
    try:
        for step in range(zo.next_step, steps):
            started = time.perf_counter()
            runtime.begin_step()
            batch = material.batch(material.train, material.order.rows(step), model.device)
            lr = options.learning_rate * options.lr_factor(step, steps)

            def objective(
                model: nn.Module, copies: int, batch: dict[str, Tensor] = batch
            ) -> list[float]:
                return member_losses(model, batch, copies, parts=zo.settings.estimator.parts)

            losses.append(zo.step_together(objective, batch=step, lr=lr).loss)
            runtime.end_step()
            taken = time.perf_counter() - started
            seconds += taken
            tokens = int(batch["attention_mask"].sum())
            watcher.step(step_event(step + 1, steps, losses[-1], lr, tokens, taken, report(model)))
            if options.eval_every and (step + 1) % options.eval_every == 0 and step + 1 < steps:
                with zo.current():
                    evaluated(options, material, model, watcher, f"after step {step + 1}")
    finally:
        watcher.end()
    return losses, seconds


def member_losses(
    model: nn.Module, batch: dict[str, Tensor], copies: int, *, parts: int = 1
) -> list[float]:
    """Mean next-token cross-entropy of every member, from one forward of a streamed model.

    ``copies`` and ``parts``: see ``causal_lm_losses``.  Logits exist for a few tokens of each row
    at a time: ``TILE_BYTES`` in fp32, or one token's.  Losses are taken in fp32 and summed in fp64.
    """
    from headrace.zo.objective import causal_lm_losses, repeat_batch

    assert isinstance(model, StreamedModel)
    head = model._head
    if head is None:
        return causal_lm_losses(model, batch, copies, parts=parts)
    labels = batch["labels"][:, 1:]
    counts = (labels != IGNORED_LABEL).view(parts, -1).sum(1).cpu()
    if not counts.any():
        raise InputError(f"a batch of {len(labels)} rows has no label to learn from")
    inputs = repeat_batch({n: value for n, value in batch.items() if n != "labels"}, copies)
    rows = len(labels) * copies
    sums = torch.zeros(rows, dtype=torch.float64)
    with runtime_of(model).forward_pass(rows, training=False):
        hidden, operations, vocabulary = _before_the_head(model, inputs)
        targets = labels.repeat(copies, 1).to(hidden.device)
        width = max(1, TILE_BYTES // (4 * rows * vocabulary))
        for first in range(0, targets.shape[1], width):
            # All rows together: dense members split them, each with its own head.
            part = slice(first, min(first + width, targets.shape[1]))
            logits = head.logits(hidden[:, part])
            for operation in operations:
                logits = operation(logits)
            losses = nn.functional.cross_entropy(
                logits.float().flatten(0, 1),
                targets[:, part].flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="none",
            )
            sums += losses.view(rows, -1).double().sum(1).cpu()
    return (sums.view(copies, parts, -1).sum(2) / counts.clamp(min=1)).flatten().tolist()


def _before_the_head(
    model: StreamedModel, inputs: dict[str, Any]
) -> tuple[Tensor, tuple[Callable[[Tensor], Tensor], ...], int]:
    """Last hidden states, what the model does to its logits, and the size of the vocabulary."""
    head = model._head
    assert head is not None
    head.loss_expected = True
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        head.loss_expected = False
    if not isinstance(logits, LazyLogits):
        raise InputError(f"{type(model).__name__} computes its logits in a way of its own")
    _, hidden, operations = logits.parts()
    return hidden, operations, logits.shape[-1]


def _tokens_of(material: Material, step: int) -> int:
    rows = material.train
    return sum(int(rows.starts[row + 1] - rows.starts[row]) for row in material.order.rows(step))


def _save(
    options: TuneOptions, material: Material, model: Any, result: TuneResult, log: Path
) -> None:
    from headrace.zo.log import read_log
    from headrace.zo.replay import Replayer

    header, records = read_log(log)
    with (
        Replayer(header, records, threads=max(1, torch.get_num_threads())) as replayer,
        written_whole(options.out) as folder,
    ):
        write_model(model, folder, change=lambda _, tensors: replayer.apply(tensors))
        replayer.check_complete()
        material.tokenizer.save_pretrained(folder)
        shutil.copyfile(log, folder / LOG_NAME)
        summary = {"options": options.to_json(), "result": result.to_json()}
        (folder / SUMMARY_NAME).write_text(
            json.dumps({**summary, "report": result.report.to_json()}, indent=1) + "\n",
            encoding="utf-8",
        )
        result.report.save_html(folder / "report.html")
