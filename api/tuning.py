"""``tune``: one fine-tuning run from a model and a data file to a folder that loads.

The order of work keeps bad input harmless: options, data and tokenizer are checked before the
model is opened, the model (and its budgets) before anything is trained, and the result appears
whole or not at all.  The training step is the plain one: forward, backward, ``optimizer.step()``,
with all rows of the step in one call; micro-batches are the streamed layers' own business.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .closing import ClosedAfter
from .exporting import write_model
from .options import TuneOptions
from .preparation import Material, prepare
from .progress import ConsoleWatcher, Watcher
from .reporting import SUMMARY_NAME, report
from .run_memory import RunMemory
from .saving import check_room, kept_in, numbered_errors, written_whole
from .selection import Selection, selection_of
from .streamed import StreamedModel, streamed_model_of, weight_bytes
from .tune_result import TuneResult, evaluated, sampled, step_event

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tune(options: TuneOptions, *, watcher: Watcher | None = None) -> TuneResult:
    """Fine-tune a model as ``options`` say and save the result as a Hugging Face folder.

    ``method="full"`` and ``"zo"`` save a whole model, ``"lora"`` an adapter folder;
    ``from_pretrained`` opens both.  ``watcher`` None shows a progress bar on the standard error.

    >>> from pathlib import Path
    >>> import headrace
    >>> from headrace.progress import Silent
    >>> options = headrace.TuneOptions(
    ...     model="model-folder", data=Path("texts.jsonl"), out=Path("tuned"), steps=2, seq_len=16
    ... )
    >>> result = headrace.tune(options, watcher=Silent())
    >>> sorted(path.name for path in Path("tuned").glob("adapter*"))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    options.check()
    watcher = watcher or ConsoleWatcher()
    began = time.perf_counter()
    material = prepare(options)
    if options.method == "zo":
        from .zo_tuning import tune_zo

        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            return tune_zo(options, material, watcher, began)
    selection = None if options.train is None else selection_of(options.train)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        with _opened(options, selection) as model:
            tuned, result = _train(options, material, model, watcher, began, selection)
            watcher.say(f"saving {options.out}")
            with kept_in(options.store_folder):
                _save(options, material, tuned, result)
    return result


@contextmanager
def _opened(options: TuneOptions, selection: Selection | None) -> Iterator[PreTrainedModel]:
    from .loading import load

    path = Path(options.model).expanduser()
    model = load(
        # Absolute: an adapter folder names its base, and may be opened from elsewhere.
        path.absolute() if path.is_dir() else options.model,
        train="adapters" if options.method == "lora" else selection or "all",
        device=options.device,
        device_budget=options.device_budget,
        host_budget=options.host_budget,
        store=options.store_folder,
        micro_batch=options.micro_batch,
        update=options.update,
        resume=options.resume,
    )
    assert isinstance(model, StreamedModel)
    with ClosedAfter(model.close):
        yield model


def _with_adapters(options: TuneOptions, model: PreTrainedModel) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(model, config)


def _train(
    options: TuneOptions,
    material: Material,
    opened: PreTrainedModel,
    watcher: Watcher,
    began: float,
    selection: Selection | None,
) -> tuple[Any, TuneResult]:
    """Train, with what is measured before and after; return the model with adapters, and that."""
    from headrace.optim import adamw

    model: Any = _with_adapters(options, opened) if options.method == "lora" else opened
    training = streamed_model_of(opened)._training_side
    memory = RunMemory(options, material.train)
    if options.method == "full":
        check_room(options.out, weight_bytes(opened))  # before a store is made
    training.user_state = memory.capture
    optimizer = adamw(
        model,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        master=options.master,
        max_grad_norm=options.clip_norm,
        seed=options.seed,
    )
    if options.method == "full":
        with kept_in(options.store_folder):
            check_room(options.out, weight_bytes(opened))  # again: the store has its room by now
    steps = material.steps
    first_step = training.steps
    if options.resume:
        assert options.store_folder is not None
        memory.restore(training.resumed_user or {}, options.store_folder)
        watcher.say(f"going on after step {first_step} of {steps}")
    else:
        memory.loss_before = evaluated(options, material, model, watcher, "before")
        memory.sample_before = sampled(options, material, model, watcher, "before")
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = options.learning_rate
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: options.lr_factor(step, steps), last_epoch=first_step - 1
    )
    losses: list[float] = []
    watcher.begin(steps)
    try:
        for step in range(first_step, steps):
            started = time.perf_counter()
            batch = material.batch(material.train, material.order.rows(step), model.device)
            tokens = int(batch["attention_mask"].sum())
            lr = float(optimizer.param_groups[0]["lr"])
            model.train()
            loss = model(**batch, use_cache=False).loss
            losses.append(float(loss.detach()))
            loss.backward()
            del loss
            memory.num_tokens += tokens
            optimizer.step()
            scheduler.step()
            model.zero_grad()
            if selection is not None:
                selection.after_step(streamed_model_of(opened))
            seconds = time.perf_counter() - started
            memory.train_seconds += seconds
            watcher.step(
                step_event(step + 1, steps, losses[-1], lr, tokens, seconds, report(opened))
            )
            if options.eval_every and (step + 1) % options.eval_every == 0 and step + 1 < steps:
                evaluated(options, material, model, watcher, f"after step {step + 1}")
    finally:
        watcher.end()
    final = report(opened, tokens_per_step=round(memory.num_tokens / steps))
    loss_after = evaluated(options, material, model, watcher, "after")
    sample_after = sampled(options, material, model, watcher, "after")
    result = TuneResult(
        out=options.out,
        steps=steps,
        num_tokens=memory.num_tokens,
        train_seconds=memory.train_seconds,
        total_seconds=time.perf_counter() - began,
        loss_before=memory.loss_before,
        loss_after=loss_after,
        sample_before=memory.sample_before,
        sample_after=sample_after,
        step_losses=tuple(losses),
        report=final,
    )
    return model, result


def _save(options: TuneOptions, material: Material, model: Any, result: TuneResult) -> None:
    with written_whole(options.out) as folder:
        if options.method == "lora":
            # Given the adapters, PEFT does not ask the streamed base for all of its weights;
            # "auto" would compare vocabularies with the hub's copy of the base.
            adapters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            with numbered_errors(folder):
                model.save_pretrained(folder, state_dict=adapters, save_embedding_layers=False)
        else:
            write_model(model, folder)
        material.tokenizer.save_pretrained(folder)
        summary = {"options": options.to_json(), "result": result.to_json()}
        (folder / SUMMARY_NAME).write_text(
            json.dumps({**summary, "report": result.report.to_json()}, indent=1) + "\n",
            encoding="utf-8",
        )
        result.report.save_html(folder / "report.html")
