"""A process that has imported everything and forks a training run for each line it reads.

Forking keeps a run's start cheap, so that many can be killed.  The parent never runs a tensor
operation, so the children start with no threads to miss.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from streaming_cases import batches, streamed_weights

import headrace
import headrace.loading
import headrace.resuming
from headrace.offload.commit import read_layout, read_record
from headrace.optim import adamw

STEPS = 6


def committed(store: Path) -> bool:
    """Whether the store holds a step to resume."""
    layout = read_layout(store) if store.is_dir() else None
    return layout is not None and read_record(store, layout) is not None


def train(job: dict[str, Any]) -> None:
    """Train to the last step, resuming if there is something to resume; log every loss."""
    torch.set_num_threads(1)
    store, lora = Path(job["store"]), job["mode"] == "lora"
    budgets = {"device": "cpu", "device_budget": "1MB", "host_budget": "3MB"}
    if committed(store):
        base = headrace.resume(store, **budgets)
    else:
        base = headrace.load(
            job["model"],
            train="adapters" if lora else "all",
            store=store,
            micro_batch=None if lora else 2,
            update="backward" if job["mode"] == "backward" else "forward",
            **budgets,
        )
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.25)
    model = get_peft_model(base, config) if lora else base
    model.train()
    torch.manual_seed(9)
    optimizer = adamw(model, lr=1e-2)  # restores the generators when it resumes
    training = base._training_side
    ids = batches(STEPS)
    while training.steps < STEPS:
        step = training.steps
        loss = model(input_ids=ids[step], labels=ids[step]).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        with open(job["log"], "a") as log:
            log.write(f"{step} {float(loss.detach()).hex()}\n")
    if lora:
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    else:
        weights = streamed_weights(base)
    save_file({n: t.contiguous() for n, t in weights.items()}, job["weights"])
    base.close()


def main() -> None:
    """Fork one child for each job on standard input; report its pid, then its end."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train(json.loads(line))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
