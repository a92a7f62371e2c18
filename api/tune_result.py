"""What every kind of ``tune`` run shares: its result, and what is measured around its steps.

Held-out loss and sample are taken with the model as it stands, streamed, and say so to the
watcher; nothing here changes a weight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

from .data import IGNORED_LABEL
from .options import TuneOptions
from .preparation import Material
from .progress import StepEvent, Watcher
from .reporting import Report


@final
@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a run produced; losses are nats a token on held-out rows, None if none are held out.

    ``step_losses`` are those of this process: a resumed run has those of its later part.

    >>> from pathlib import Path
    >>> import headrace
    >>> from headrace.progress import Silent
    >>> options = headrace.TuneOptions(
    ...     model="model-folder", data=Path("texts.jsonl"), out=Path("first"), steps=2, seq_len=16
    ... )
    >>> result = headrace.tune(options, watcher=Silent())
    >>> result.steps, len(result.step_losses), result.out.name
    (2, 2, 'first')
    """

    out: Path
    steps: int
    num_tokens: int
    train_seconds: float
    total_seconds: float
    loss_before: float | None
    loss_after: float | None
    sample_before: str | None
    sample_after: str | None
    step_losses: tuple[float, ...]
    report: Report

    def to_json(self) -> dict[str, Any]:
        """Return a dict that ``json.dumps`` takes."""
        return {**asdict(self), "out": str(self.out)}


def step_event(
    step: int, steps: int, loss: float, lr: float, tokens: int, seconds: float, done: Report
) -> StepEvent:
    moved = {lane.lane: lane.nbytes for lane in done.lanes}
    return StepEvent(
        step=step,
        steps=steps,
        loss=loss,
        lr=lr,
        num_tokens=tokens,
        seconds=seconds,
        busy_lane=done.busiest.lane.replace("_", " ") if done.busiest else "none",
        read_bytes=moved.get("disk_read", 0),
        write_bytes=moved.get("disk_write", 0),
    )


@torch.no_grad()
def evaluated(
    options: TuneOptions, material: Material, model: Any, watcher: Watcher, when: str
) -> float | None:
    """Mean loss in nats a token over the held-out rows; None if there are none."""
    rows = material.held_out
    if rows is None:
        return None
    model.eval()
    total, weight = 0.0, 0
    count = min(len(rows), options.eval_rows)
    for first in range(0, count, options.batch_size):
        chosen = list(range(first, min(first + options.batch_size, count)))
        batch = material.batch(rows, chosen, model.device)
        num_labels = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += float(model(**batch, use_cache=False).loss) * num_labels
        weight += num_labels
    watcher.say(f"held-out loss {when}: {total / weight:.4f} nats a token ({weight:,} tokens)")
    return total / weight


@torch.no_grad()
def sampled(
    options: TuneOptions, material: Material, model: Any, watcher: Watcher, when: str
) -> str | None:
    """What the model writes after the prompt, greedily; None if no sample is asked for."""
    if not options.sample_tokens:
        return None
    model.eval()
    tokenizer = material.tokenizer
    prompt = tokenizer(
        material.prompt,
        return_tensors="pt",
        add_special_tokens=not material.prompt_is_rendered,
        truncation=True,
        max_length=options.seq_len,
    ).to(model.device)
    output = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=options.sample_tokens,
        do_sample=False,
        pad_token_id=material.pad_id,
    )
    written = output[0, prompt["input_ids"].shape[1] :]
    text = str(tokenizer.decode(written, skip_special_tokens=True))
    watcher.say(f"sample {when}: {material.prompt!r} ->\n    {text!r}")
    return text
