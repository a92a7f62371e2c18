"""What a fine-tuning run is asked to do: every choice, its default and its check.

``TuneOptions`` is the one place where defaults live; the command line takes them from here.
``check`` looks at values and paths only: it reads no weights and writes nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, final, get_args

from .budgets import parse_bytes
from .errors import InputError
from .saving import check_new_folder
from .selection import selection_of

Method = Literal["lora", "full", "zo"]
ZOMethod = Literal["recommended", "mezo"]
Schedule = Literal["constant", "linear", "cosine"]
Master = Literal["fp32", "split", "sr"]
Update = Literal["backward", "forward"]
Labels = Literal["assistant", "all"]
Packing = Literal["pack", "pad"]

CHOICES = {
    "method": get_args(Method),
    "schedule": get_args(Schedule),
    "optimizer": ("adamw",),
    "master": get_args(Master),
    "update": (None, *get_args(Update)),
    "labels": get_args(Labels),
    "packing": (None, *get_args(Packing)),
    "zo_method": get_args(ZOMethod),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """One fine-tuning run.

    Where and what: ``model`` (a folder or a hub id), ``data`` (JSONL), ``out`` (the folder of the
    result, which must not exist yet), ``eval_data`` (JSONL; None holds out the fraction
    ``held_out`` of the documents).

    Memory: ``device`` (None: the accelerator if there is one), ``device_budget`` and
    ``host_budget`` (bytes or text; None: what is free less a margin), ``store`` (folder for what
    changes; None: ``<out>.store``, nothing for LoRA), ``resume`` (go on with
    the run that the store holds, which had the same options).

    Training: ``steps`` or ``epochs`` (neither: one epoch), rows a step ``batch_size``, rows
    through a layer at a time ``micro_batch``, tokens a row ``seq_len``, ``lr`` (None: 2e-4 for
    LoRA, 2e-5 for full, 1e-2 for zo, 1e-6 for its mezo), ``schedule``, ``warmup`` (steps, or
    below 1 a fraction of them), ``max_grad_norm`` (None: 1.0, or off for
    ``update="backward"``; 0: off), ``optimizer``, ``weight_decay``, ``master``, ``update``,
    ``seed``.

    ``train`` (full only): the weights to train, None for all of them: ``spectrum:SHARE``,
    ``slimfit:SHARE`` or ``regex:PATTERN``, see ``selection``.

    Zeroth order (``method="zo"``, forwards only; every row of a step passes at once):
    ``zo_method`` (``"recommended"``: ``zo_directions`` low-rank probes for every row of a batch, in
    one forward; ``"mezo"``: two dense ones, for models that fit a tier), ``zo_eps`` (size of a
    probe).

    LoRA: ``lora_rank``, ``lora_alpha``, ``lora_dropout`` on every linear layer but the head.

    Shown: ``eval_every`` steps (0: before and after only), at most ``eval_rows`` rows of it, a
    sample of ``sample_tokens`` tokens (0: none) after ``prompt`` (None: the start of a held-out
    document).

    >>> from pathlib import Path
    >>> import headrace
    >>> options = headrace.TuneOptions(
    ...     model="model-folder", data=Path("texts.jsonl"), out=Path("tuned"), device_budget="8GB"
    ... )
    >>> options.method, options.batch_size, options.seq_len
    ('lora', 8, 512)
    """

    model: str
    data: Path
    out: Path
    eval_data: Path | None = None
    held_out: float = 0.05
    method: Method = "lora"
    train: str | None = None
    device: str | None = None
    device_budget: int | str | None = None
    host_budget: int | str | None = None
    store: Path | None = None
    resume: bool = False
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    micro_batch: int = 1
    seq_len: int = 512
    lr: float | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    max_grad_norm: float | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    master: Master = "fp32"
    update: Update | None = None
    seed: int = 0
    labels: Labels = "assistant"
    packing: Packing | None = None
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    zo_method: ZOMethod = "recommended"
    zo_directions: int = 4
    zo_eps: float | None = None
    eval_every: int = 0
    eval_rows: int = 32
    prompt: str | None = None
    sample_tokens: int = 40

    def __post_init__(self) -> None:
        for name in ("data", "out", "eval_data", "store"):
            if isinstance(getattr(self, name), str):  # a notebook says "chats.jsonl"
                object.__setattr__(self, name, Path(getattr(self, name)))

    def check(self) -> None:
        """Refuse what cannot run, with an ``InputError`` that names the option."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                raise InputError(f"{_flag(name)} is {value!r}; choose one of {known}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise InputError(f"{_flag(name)} is {value}; give {least} or more")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{_flag(name)} is {value}; give more than 0")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{_flag(name)} is {getattr(self, name)}; give 0 or more, below 1")
        if self.train is not None:
            if self.method != "full":
                raise InputError("--train chooses among the model's weights; give --method full")
            selection_of(self.train)
        if self.steps is not None and self.epochs is not None:
            raise InputError("--steps and --epochs were both given; give one of them")
        if self.update == "backward" and self.max_grad_norm:
            raise InputError(
                "--update backward updates a layer before the global norm is known; give "
                "--update forward with --max-grad-norm, or --max-grad-norm 0"
            )
        for name in ("device_budget", "host_budget"):
            if getattr(self, name) is not None:
                parse_bytes(getattr(self, name), what=_flag(name))
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise InputError(f"--device is {self.device!r}; give cpu, cuda, or cuda:1")
        if self.resume and self.store_folder is None:
            raise InputError("a run without a store cannot be resumed; give its --store")
        check_new_folder(self.out)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, default filled in."""
        if self.lr is not None:
            return self.lr
        if self.method == "zo":
            return 1e-6 if self.zo_method == "mezo" else 1e-2
        return 2e-4 if self.method == "lora" else 2e-5

    @property
    def probe_size(self) -> float:
        """The size of a zeroth-order probe, default filled in."""
        if self.zo_eps is not None:
            return self.zo_eps
        return 1e-3 if self.zo_method == "mezo" else 4e-3

    @property
    def clip_norm(self) -> float | None:
        """The global norm to clip at, default filled in; None clips nothing."""
        if self.max_grad_norm is not None:
            return self.max_grad_norm or None
        return None if self.update == "backward" else 1.0

    @property
    def store_folder(self) -> Path | None:
        """The folder of what changes, default filled in; None when nothing needs one."""
        if self.store is not None or self.method == "lora":
            return self.store
        return self.out.parent / f"{self.out.name}.store"

    def warmup_steps(self, steps: int) -> int:
        """Steps until the learning rate reaches its peak."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)

    def lr_factor(self, step: int, steps: int) -> float:
        """Return the share of the peak learning rate that a step (from 0) uses.

        It rises in a straight line over the warm-up, then stays (``constant``), falls in a
        straight line (``linear``) or along half a cosine (``cosine``), to reach 0 after the last.
        """
        warm = self.warmup_steps(steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        done = (step - warm) / max(1, steps - warm)
        if self.schedule == "constant":
            return 1.0
        return 1.0 - done if self.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2

    def to_json(self) -> dict[str, Any]:
        """Return a dict that ``json.dumps`` takes."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "micro_batch": 1,
    "seq_len": 2,
    "warmup": 0,
    "max_grad_norm": 0,
    "weight_decay": 0,
    "seed": 0,
    "lora_rank": 1,
    "zo_directions": 2,
    "eval_every": 0,
    "eval_rows": 1,
    "sample_tokens": 0,
}
_POSITIVE = ("epochs", "lr", "lora_alpha", "zo_eps")
_FRACTIONS = ("held_out", "lora_dropout")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option_default(name: str) -> Any:
    """Return the default of an option for the command line's help; None where there is none."""
    default = next(field.default for field in fields(TuneOptions) if field.name == name)
    return None if default is MISSING else default
