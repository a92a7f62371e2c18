"""The command line: ``headrace COMMAND``, also ``python -m headrace COMMAND``.

Exit codes: 0 done; 2 what the user gave cannot be used (one line on the standard error, nothing
half-written); 1 our fault (a traceback).  Results go to the standard output, as text or with
``--json`` as one JSON object; progress goes to the standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, final

from headrace.offload.errors import HeadraceError

from .budgets import format_bytes
from .errors import InputError

_USER_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors that are our fault are raised."""
    try:
        chosen = _parser().parse_args(arguments)
        output = chosen.run(chosen)
    except KeyboardInterrupt:
        print("headrace: interrupted", file=sys.stderr)
        return 130
    except (HeadraceError, OSError) as error:
        blame = _blame(error)
        if blame is None:
            raise
        print("headrace: " + " ".join(blame.split()), file=sys.stderr)
        return 2
    print(json.dumps(output.record) if chosen.json else output.text)
    return output.exit_code


def _blame(error: BaseException) -> str | None:
    """What the user can change about an error, or None if it is our fault."""
    if isinstance(error, HeadraceError) and isinstance(error, ValueError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _USER_ERRNOS:
            return str(error)
        cause = cause.__cause__
    return None


@final
class _Output:
    """What a command found: text for people, a record for machines, an exit code."""

    def __init__(self, text: str, record: Any, exit_code: int = 0) -> None:
        self.text = text
        self.record = record
        self.exit_code = exit_code


@final
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="headrace",
        description="Fine-tune models as large as your disk on one consumer GPU.",
        epilog="Example: headrace tune --demo --out tuned",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    adders = (
        _add_doctor,
        _add_tune,
        _add_quantize,
        _add_verify,
        _add_export,
        _add_prune,
        _add_recover,
        _add_report,
        _add_zo,
    )
    for add in adders:
        add(commands)
    return parser


def _add_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("--json", action="store_true", default=False, help="print JSON")
    assert isinstance(command, argparse.ArgumentParser)
    return command


# doctor


def _add_doctor(commands: Any) -> None:
    command = _add_command(
        commands,
        "doctor",
        "look at this machine: software, devices, memory, the disk under a folder",
        "  headrace doctor --store /nvme/run1",
    )
    command.add_argument("--store", type=Path, default=Path(), help="folder to look at")
    command.set_defaults(run=_doctor)


def _doctor(chosen: argparse.Namespace) -> _Output:
    from .doctor import examine

    facts = examine(chosen.store)
    width = max(len(fact.name) for fact in facts)
    lines = []
    for fact in facts:
        lines.append(f"{fact.name.ljust(width)}  {fact.value}")
        if fact.advice:
            lines.append(f"{' ' * width}  -> {fact.advice}")
    return _Output("\n".join(lines), [fact.to_json() for fact in facts])


# tune


def _add_tune(commands: Any) -> None:
    from .tune_arguments import add_tune_arguments

    command = _add_command(
        commands,
        "tune",
        "fine-tune a model within byte budgets and save it as a Hugging Face folder",
        "  headrace tune --model Qwen/Qwen3-8B --data chats.jsonl --method lora \\\n"
        "      --device-budget 8GB --host-budget 16GB --out tuned\n"
        "  headrace tune --demo --out tuned      # no network, no GPU needed",
    )
    add_tune_arguments(command)
    command.set_defaults(run=_tune)


def _tune(chosen: argparse.Namespace) -> _Output:
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    from .progress import ConsoleWatcher
    from .tune_arguments import options_of
    from .tuning import tune

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    watcher = ConsoleWatcher()
    options = options_of(chosen, watcher)
    try:
        result = tune(options, watcher=watcher)
    except KeyboardInterrupt:
        store = options.store_folder
        if store is not None and store.is_dir():
            watcher.say(f"to go on: headrace tune --resume {store}")
        raise
    trained = f"{result.steps} steps, {result.num_tokens:,} tokens"
    if result.train_seconds:  # none for a finished run that only had its result to write
        rate = result.num_tokens / result.train_seconds
        trained += f" in {result.train_seconds:.0f} s ({rate:,.0f} tokens/s)"
    lines = [
        f"{trained}; the whole run {result.total_seconds:.0f} s",
        f"saved in {result.out}",
    ]
    if options.store_folder is not None:
        lines.append(f"the store stays in {options.store_folder}; remove it when you are done")
    if result.sample_before is not None:
        lines[:0] = [
            f"sample before: {result.sample_before!r}",
            f"sample after:  {result.sample_after!r}",
        ]
    if result.loss_before is not None and result.loss_after is not None:
        change = result.loss_after - result.loss_before
        lines.insert(
            0,
            f"held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f} nats a token "
            f"({change:+.4f})",
        )
    return _Output("\n".join([*lines, "", str(result.report)]), result.to_json())


# verify


def _add_verify(commands: Any) -> None:
    command = _add_command(
        commands,
        "verify",
        "check a store against its checksums, or a checkpoint's shards against their headers",
        "  headrace verify tuned.store",
    )
    command.add_argument(
        "folders", type=Path, nargs="+", help="every folder of one store, or one checkpoint"
    )
    command.set_defaults(run=_verify)


def _verify(chosen: argparse.Namespace) -> _Output:
    from .verifying import verify

    checks = list(verify(chosen.folders))
    bad = [check for check in checks if not check.ok]
    total = format_bytes(sum(check.nbytes for check in checks))
    lines = [f"{check.name}: {check.reason}" for check in bad]
    lines.append(
        f"{len(bad)} of {len(checks)} parts are damaged"
        if bad
        else f"{len(checks)} parts, {total}: all is well"
    )
    record = {"ok": not bad, "checks": [check.to_json() for check in checks]}
    return _Output("\n".join(lines), record, exit_code=2 if bad else 0)


# export


def _add_export(commands: Any) -> None:
    command = _add_command(
        commands,
        "export",
        "merge the adapters of a tune run into their base and write one ordinary model folder",
        "  headrace export tuned --out merged --host-budget 8GB",
    )
    command.add_argument("folder", type=Path, help="adapter folder, as tune --method lora saves")
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument("--device-budget", default=None, help="bytes (default: what is free)")
    command.add_argument("--host-budget", default=None, help="bytes (default: what is free)")
    command.add_argument(
        "--format",
        default=None,
        help="of the merged weights: same (as the base has them), or one of quantize's "
        "(default: ordinary weights)",
    )
    command.set_defaults(run=_export)


def _export(chosen: argparse.Namespace) -> _Output:
    from .merging import merge_adapters

    base = merge_adapters(
        chosen.folder,
        chosen.out,
        device_budget=chosen.device_budget,
        host_budget=chosen.host_budget,
        format=chosen.format,
    )
    record = {"base": base, "adapters": str(chosen.folder), "out": str(chosen.out)}
    return _Output(f"{base} with the adapters of {chosen.folder} is in {chosen.out}", record)


# prune, recover


def _add_prune(commands: Any) -> None:
    command = _add_command(
        commands,
        "prune",
        "write a smaller model, its widest channels and heads, to train adapters on (LoRAM)",
        "  headrace prune Qwen/Qwen3-8B qwen3-half --keep 0.5\n"
        "  headrace tune --model qwen3-half --data chats.jsonl --method lora --out tuned\n"
        "  headrace recover tuned --out tuned-whole",
    )
    command.add_argument("model", help="folder or hub id")
    command.add_argument("out", type=Path, help="folder to make")
    command.add_argument("--keep", type=float, default=0.5, help="share that stays (default: 0.5)")
    command.add_argument("--device-budget", default=None, help="bytes (default: what is free)")
    command.add_argument("--host-budget", default=None, help="bytes (default: what is free)")
    command.set_defaults(run=_prune)


def _prune(chosen: argparse.Namespace) -> _Output:
    from .loram import prune

    prune(
        chosen.model,
        chosen.out,
        keep=chosen.keep,
        device_budget=chosen.device_budget,
        host_budget=chosen.host_budget,
    )
    record = {"model": chosen.model, "out": str(chosen.out), "keep": chosen.keep}
    return _Output(f"{chosen.keep:g} of the channels and heads are in {chosen.out}", record)


def _add_recover(commands: Any) -> None:
    command = _add_command(
        commands,
        "recover",
        "give adapters that were trained on a pruned model the shapes of the whole one",
        "  headrace recover tuned --out tuned-whole",
    )
    command.add_argument("folder", type=Path, help="adapter folder, as tune --method lora saves")
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.set_defaults(run=_recover)


def _recover(chosen: argparse.Namespace) -> _Output:
    from .loram import recover

    recover(chosen.folder, chosen.out)
    record = {"adapters": str(chosen.folder), "out": str(chosen.out)}
    return _Output(f"the adapters of {chosen.folder} fit the whole model in {chosen.out}", record)


# quantize


def _add_quantize(commands: Any) -> None:
    command = _add_command(
        commands,
        "quantize",
        "write a model's weights in few bits, one layer in memory at a time; resumable",
        "  headrace quantize Qwen/Qwen3-8B qwen3-nf4 --format nf4\n"
        "  headrace quantize Qwen/Qwen3-8B qwen3-gptq --format gptq --calibration text.jsonl \\\n"
        "      --eora-rank 16\n"
        "  headrace tune --model qwen3-nf4 --data chats.jsonl --method lora --out tuned",
    )
    command.add_argument("model", help="folder or hub id")
    command.add_argument("out", type=Path, help="folder to make; an interrupted one is continued")
    command.add_argument(
        "--format",
        default="nf4",
        choices=(
            *("nf4", "nf4-fitted", "fp4", "int8", "int4", "fp8"),
            *("mxfp4", "mxfp8", "nvfp4", "hqq", "gptq"),
        ),
        help="of the linear layers' weights (default: nf4)",
    )
    command.add_argument(
        "--layout",
        default="headrace",
        choices=("headrace", "transformers"),
        help="of the folder: this library's, or one that transformers opens by itself",
    )
    command.add_argument(
        "--keep", nargs="*", default=[], metavar="MODULE", help="modules to leave as they are"
    )
    command.add_argument(
        "--calibration",
        type=Path,
        default=None,
        metavar="FILE",
        help="JSONL text by which codes are chosen (GPTQ), layer by layer; --format gptq needs it",
    )
    command.add_argument(
        "--calibration-rows", type=int, default=128, metavar="N", help="rows of it (default: 128)"
    )
    command.add_argument(
        "--calibration-tokens", type=int, default=512, metavar="N", help="a row (default: 512)"
    )
    command.add_argument(
        "--eora-rank",
        type=int,
        default=0,
        metavar="R",
        help="also write OUT/eora: a LoRA adapter that makes up for what the encoding lost",
    )
    command.add_argument("--device", default="cpu", help="that calibrates (default: cpu)")
    command.set_defaults(run=_quantize)


def _quantize(chosen: argparse.Namespace) -> _Output:
    from headrace.offload.source import SafetensorsIndex

    from .calibrating import read_calibration
    from .foreign_quantizing import quantize_for_transformers
    from .loading import find_folder
    from .quantizing import quantize, quantize_report

    if chosen.layout == "transformers" and chosen.eora_rank:
        raise InputError("--eora-rank goes with --layout headrace")
    folder = find_folder(chosen.model)
    calibration = None
    if chosen.calibration is not None:
        calibration = read_calibration(
            chosen.calibration,
            folder,
            rows=chosen.calibration_rows,
            tokens=chosen.calibration_tokens,
        )
    with SafetensorsIndex.open(folder) as index:
        total_bytes = index.nbytes
    with quantize_report(total_bytes, quiet=chosen.json) as (reports, show):
        common: dict[str, Any] = {
            "format": chosen.format,
            "keep": chosen.keep,
            "calibration": calibration,
            "device": chosen.device,
            "on_tensor": show,
        }
        if chosen.layout == "transformers":
            quantize_for_transformers(folder, chosen.out, **common)
        else:
            quantize(folder, chosen.out, eora_rank=chosen.eora_rank, **common)
    before = sum(r.bytes_before for r in reports)
    after = sum(r.bytes_after for r in reports)
    worst = max(reports, key=lambda r: r.relative_rms)
    record = {
        "out": str(chosen.out),
        "format": chosen.format,
        "bytes_before": before,
        "bytes_after": after,
        "tensors": [dataclasses.asdict(r) for r in reports],
    }
    text = (
        f"{before:,} bytes became {after:,} in {chosen.out}; {len(reports)} tensors, the largest "
        f"relative error {worst.relative_rms:.4f} in {worst.name}"
    )
    return _Output(text, record)


# report


def _add_report(commands: Any) -> None:
    command = _add_command(
        commands,
        "report",
        "show what a finished run did: lanes, peaks against budgets, stalls",
        "  headrace report tuned --html report.html",
    )
    command.add_argument("folder", type=Path, help="the --out folder of a tune run")
    command.add_argument("--html", type=Path, default=None, help="also write the page here")
    command.set_defaults(run=_report)


def _report(chosen: argparse.Namespace) -> _Output:
    from .reporting import read_report

    report = read_report(chosen.folder)
    if chosen.html is not None:
        try:
            report.save_html(chosen.html)
        except OSError as error:
            raise InputError(f"--html {chosen.html}: {error.strerror}") from error
    return _Output(str(report), report.to_json())


# zo


def _add_zo(commands: Any) -> None:
    group = commands.add_parser(
        "zo",
        help="what belongs to zeroth-order runs: rebuild a model from its log",
        description="What belongs to zeroth-order runs (headrace tune --method zo).",
    )
    inner = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _add_command(
        inner,
        "replay",
        "rebuild a fine-tuned model, bit for bit, from its base and its replay log",
        "  headrace zo replay Qwen/Qwen3-8B tuned/replay.zolog rebuilt",
    )
    command.add_argument("base", help="folder or hub id that the run began with")
    command.add_argument("log", type=Path, help="replay log of the run")
    command.add_argument("out", type=Path, help="folder to make; must not exist yet")
    command.add_argument("--threads", type=int, default=None, help="default: every core")
    command.set_defaults(run=_zo_replay)


def _zo_replay(chosen: argparse.Namespace) -> _Output:
    from .progress import ConsoleWatcher, Silent
    from .zo_replaying import replay_run

    if chosen.threads is not None and chosen.threads < 1:
        raise InputError(f"--threads is {chosen.threads}; give 1 or more")
    watcher = Silent() if chosen.json else ConsoleWatcher()
    result = replay_run(
        chosen.base, chosen.log, chosen.out, watcher=watcher, threads=chosen.threads
    )
    text = (
        f"{result.steps} steps ({result.skipped_steps} skipped) applied to "
        f"{result.trained_parameters:,} parameters; the model is in {result.out}"
    )
    return _Output(text, result.to_json())
