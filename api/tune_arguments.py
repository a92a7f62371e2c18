"""The options of ``headrace tune`` on the command line, and the demo's own defaults.

Defaults stand in ``TuneOptions`` only: an option that is not given is left to it.  ``--demo``
puts a second set of defaults between the two.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from .demo import DEMO_MODEL, demo_data, demo_model
from .errors import InputError
from .options import CHOICES, TuneOptions, option_default
from .progress import Watcher
from .run_memory import recorded_options

# Chosen by experiment for two CPU cores; see the README for what it prints.
_DEMO = {
    "method": "full",
    "device_budget": "400MB",
    "host_budget": "450MB",
    "steps": 24,
    "batch_size": 4,
    "micro_batch": 2,
    "seq_len": 256,
    "lr": 2e-4,
    "schedule": "linear",
    "warmup": 3,
    "eval_rows": 16,
    "prompt": "Lambdas\n*******\n\n",
    "sample_tokens": 32,
}


def add_tune_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the options of ``tune``."""
    what = command.add_argument_group("what to train")
    _add(what, "model", str, f"folder, hub id, or {DEMO_MODEL} (needs no network)")
    _add(what, "data", Path, "JSONL: lines with 'text', or with chat 'messages'")
    _add(what, "out", Path, "folder of the result; must not exist yet")
    _add(what, "method", str, "adapters on a frozen base, every weight, or forwards only")
    _add(what, "train", str, "weights of a full run: spectrum:0.25, slimfit:0.5 or regex:PATTERN")
    what.add_argument(
        "--demo", action="store_true", help="SmolLM2-135M on Python's help texts; needs no network"
    )
    what.add_argument(
        "--resume",
        type=Path,
        metavar="STORE",
        help="go on with the stopped run that this store holds; its options come with it",
    )
    memory = command.add_argument_group("memory")
    _add(memory, "device", str, "cuda, cuda:1 or cpu (default: the accelerator if there is one)")
    for tier in ("device", "host"):
        _add(memory, f"{tier}_budget", str, "bytes, as 12GB or 512MiB (default: what is free)")
    _add(memory, "store", Path, "folder of what changes (default for full and zo: OUT.store)")
    training = command.add_argument_group("training")
    _add(training, "steps", int, "optimizer steps (default: one epoch)")
    _add(training, "epochs", float, "passes over the data")
    _add(training, "batch_size", int, "rows a step")
    _add(training, "micro_batch", int, "rows through a layer at a time")
    _add(training, "seq_len", int, "tokens a row")
    _add(training, "lr", float, "peak learning rate (default: 2e-4 lora, 2e-5 full, 1e-2 zo)")
    _add(training, "schedule", str, "of the learning rate")
    _add(training, "warmup", float, "steps, or below 1 a fraction of them")
    _add(training, "max_grad_norm", float, "global norm to clip at; 0: off (default: 1)")
    _add(training, "optimizer", str, "update rule")
    _add(training, "weight_decay", float, "decoupled weight decay")
    _add(training, "master", str, "exact copy behind 16-bit weights")
    _add(training, "update", str, "when weights are updated (default: forward if clipping)")
    _add(training, "seed", int, "of shuffling, split and dropout")
    lora = command.add_argument_group("lora")
    _add(lora, "lora_rank", int, "rank of the adapters")
    _add(lora, "lora_alpha", int, "scale of the adapters")
    _add(lora, "lora_dropout", float, "dropout before the adapters")
    zeroth = command.add_argument_group("zo")
    _add(zeroth, "zo_method", str, "probes: of low rank, for every row, or MeZO's two dense")
    _add(zeroth, "zo_directions", int, "probes a row: a step's forwards")
    _add(zeroth, "zo_eps", float, "size of a probe (default: 4e-3, mezo 1e-3)")
    data = command.add_argument_group("data and evaluation")
    _add(data, "labels", str, "tokens of a chat to learn")
    _add(data, "packing", str, "join documents, or one a row (default: pack texts, pad chats)")
    _add(data, "eval_data", Path, "JSONL to measure on, instead of holding out")
    _add(data, "held_out", float, "fraction of documents held out")
    _add(data, "eval_rows", int, "held-out rows measured, at most")
    _add(data, "eval_every", int, "steps between measurements; 0: before and after only")
    _add(data, "prompt", str, "start of the sample (default: of a held-out document)")
    _add(data, "sample_tokens", int, "tokens of the sample; 0: none")


def _add(group: Any, name: str, kind: type, text: str) -> None:
    choices = CHOICES.get(name)
    default = option_default(name)
    if default is not None and "(default" not in text:
        text += f" (default: {default})"
    group.add_argument(
        "--" + name.replace("_", "-"),
        dest=name,
        type=kind,
        choices=None if choices is None else [choice for choice in choices if choice is not None],
        metavar=None if choices is not None else kind.__name__.upper(),
        help=text,
    )


def options_of(chosen: argparse.Namespace, watcher: Watcher) -> TuneOptions:
    """Return the options a command line asks for, the demo's model and text made if need be."""
    given = {
        field.name: getattr(chosen, field.name)
        for field in fields(TuneOptions)
        if field.name in chosen and field.name != "resume"
    }
    if "resume" in chosen:
        return recorded_options(chosen.resume, given)
    demo = "demo" in chosen
    if demo:
        if "epochs" in given:
            given.setdefault("steps", None)
        given = {**_DEMO, "model": DEMO_MODEL, "out": Path("headrace-demo"), **given}
    missing = [name for name in ("model", "data", "out") if name not in given]
    if demo and "data" in missing:
        missing.remove("data")
    if missing:
        raise InputError(
            f"headrace tune needs --{' and --'.join(missing)}; or try: headrace tune --demo"
        )
    # Everything but the model and data is checked before the demo's are made.
    TuneOptions(**{"data": Path(), **given}).check()
    if "data" not in given:
        given["data"] = demo_data()
    if given["model"] == DEMO_MODEL:
        given["model"] = str(demo_model(watcher))
    return TuneOptions(**given)
