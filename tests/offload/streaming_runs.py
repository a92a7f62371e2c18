"""One comparison: a streamed run and the resident run that it must equal, bit for bit.

A ``Setting`` names everything that may differ between two runs; ``compare`` trains both and
returns what differs.  ``ROWS`` sequences split evenly or with a smaller last micro-batch.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from streaming_cases import batches, make_folder, streamed_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import headrace
from headrace.offload.runtime import EngineStatistics
from headrace.optim import adamw

ROWS, TOKENS, STEPS = 7, 12, 5
MICRO_BATCH = {1: 7, 3: 3, 4: 2}  # micro-batches: sequences in each but the last
MAX_GRAD_NORM = 0.5
LEARNING_RATE = 1e-2
# One tile a micro-batch: several tiles sum the head's gradient in another order.
LOSS_TILE = "1MB"
BIG_BYTES = 64 << 20


@dataclass(frozen=True)
class Setting:
    """Everything in which two comparisons may differ."""

    family: str
    method: str = "full"  # full | lora
    update: str = "forward"  # forward | backward
    micro_batches: int = 3  # 1 | 3 | 4
    placement: str = "big"  # big: all stays | host: device is small | disk: both are small
    precision: str = "fp32"  # fp32 | bf16-fp32 | bf16-split | bf16-sr: weights and master
    clipping: str = "none"  # none | optimizer | model
    frozen: str = "none"  # none | embedding | layers | vectors

    def __str__(self) -> str:
        names = (self.family, self.method, self.update, f"{self.micro_batches}mb", self.placement)
        extra = (self.precision, f"clip_{self.clipping}", f"frozen_{self.frozen}")
        return "-".join((*names, *extra))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """What the recipe takes beside the learning rate."""
        master = self.precision.removeprefix("bf16-")
        return {"lr": LEARNING_RATE, "weight_decay": 0.1, "master": master}


def freeze(model: nn.Module, what: str) -> None:
    """Freeze a part of a model; chunks are frozen wholly (layers) or in part (vectors)."""
    if what == "embedding":
        model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
        return
    for name, parameter in model.named_parameters():
        even = any(f".{i}." in name for i in (0, 2)) and "expert" not in name
        if (what == "layers" and even) or (what == "vectors" and parameter.dim() < 2):
            parameter.requires_grad_(False)


def adapted(model: nn.Module) -> nn.Module:
    """The model with random LoRA adapters on every linear layer."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).train()


@dataclass(frozen=True)
class Outcome:
    """Losses and final trainable parameters of one run."""

    losses: list[float]
    parameters: dict[str, Tensor]
    statistics: EngineStatistics | None = None


def resident_run(setting: Setting, folder: Path, device: str, *, steps: int = STEPS) -> Outcome:
    """The ordinary loop on a model that is wholly in memory."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=setting.dtype)
    model = model.to(device).train()
    if setting.method == "lora":
        model = adapted(model)
    freeze(model, setting.frozen)
    optimizer = adamw(model, **setting.optimizer_options)
    losses = []
    for batch in batches(steps, rows=ROWS, tokens=TOKENS):
        losses.append(resident_step(model, batch.to(device), setting.micro_batches))
        if setting.clipping != "none":
            nn.utils.clip_grad_norm_(
                [p for p in model.parameters() if p.requires_grad], MAX_GRAD_NORM
            )
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(losses, {n: p.detach().cpu() for n, p in model.named_parameters()})


def resident_step(model: nn.Module, batch: Tensor, micro_batches: int) -> float:
    """Forward and backward, micro-batch after micro-batch; the loss of the batch."""
    size = MICRO_BATCH[micro_batches]
    extra: dict[str, Any] = {}
    if micro_batches > 1:
        count = batch.shape[0] * (batch.shape[1] - 1)
        extra["num_items_in_batch"] = torch.tensor(count, device=batch.device)
    total: Tensor | None = None
    for start in range(0, batch.shape[0], size):
        part = batch[start : start + size]
        loss = model(input_ids=part, labels=part, use_cache=False, **extra).loss
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return float(total)


def load_streamed(
    folder: Path, setting: Setting, device: str, store: Path, budgets: tuple[int, int], **more: Any
) -> Any:
    """The streamed model of a setting."""
    options: dict[str, Any] = {
        "train": "all" if setting.method == "full" else "adapters",
        "device": device,
        "device_budget": budgets[0],
        "host_budget": budgets[1],
        "store": store,
        "micro_batch": MICRO_BATCH[setting.micro_batches],
        "update": setting.update,
        "loss_tile": LOSS_TILE,
        "dtype": setting.dtype,
    }
    return headrace.load(folder, **{**options, **more})


def budgets_for(setting: Setting, folder: Path, device: str, store: Path) -> tuple[int, int]:
    """(device, host) bytes that put the chunks where the setting says, near the least that works.

    What the computation itself needs is measured by one step under large budgets.
    """
    if setting.placement == "big":
        return BIG_BYTES, BIG_BYTES
    base = load_streamed(folder, setting, device, store, (BIG_BYTES, BIG_BYTES))
    try:
        model = adapted(base) if setting.method == "lora" else base.train()
        freeze(model, setting.frozen)
        optimizer = adamw(model, **setting.optimizer_options)
        (batch,) = batches(1, rows=ROWS, tokens=TOKENS)
        model(input_ids=batch.to(device), labels=batch.to(device)).loss.backward()
        optimizer.step()
        runtime = base._runtime
        sizes = sorted((c.layout.nbytes for c in runtime.engine.chunks.values()), reverse=True)
        gradients = 0 if setting.method == "lora" else sum(sizes[:2])
        in_shards = max(c.backing.host_nbytes for c in runtime.engine.chunks.values())
        device_bytes = runtime.workspace.nbytes + gradients + sizes[0] * 9 // 8
    finally:
        base.close()
        shutil.rmtree(store)
    if setting.placement == "host":
        return device_bytes, BIG_BYTES
    if setting.method == "lora":
        return device_bytes, 2 * in_shards
    # Two weights and two gradients, and two tiles of states (per weight: master and moments).
    states = {"fp32": 2, "bf16-fp32": 6, "bf16-split": 5, "bf16-sr": 4}[setting.precision]
    return device_bytes, sizes[0] * (5 + 2 * states)


def streamed_run(
    setting: Setting,
    folder: Path,
    device: str,
    store: Path,
    budgets: tuple[int, int],
    *,
    steps: int = STEPS,
) -> Outcome:
    """The streamed loop: the whole batch at once."""
    base = load_streamed(folder, setting, device, store, budgets)
    try:
        model = adapted(base) if setting.method == "lora" else base.train()
        freeze(model, setting.frozen)
        clip = MAX_GRAD_NORM if setting.clipping == "optimizer" else None
        optimizer = adamw(model, max_grad_norm=clip, **setting.optimizer_options)
        losses = []
        for batch in batches(steps, rows=ROWS, tokens=TOKENS):
            batch = batch.to(device)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            if setting.clipping == "model" and setting.method == "full":
                base.clip_grad_norm_(MAX_GRAD_NORM)
            elif setting.clipping == "model":
                nn.utils.clip_grad_norm_(
                    [p for p in model.parameters() if p.requires_grad], MAX_GRAD_NORM
                )
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        statistics = base._runtime.statistics()
        if setting.method == "lora":
            found = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        else:
            found = streamed_weights(base)
        return Outcome(losses, found, statistics)
    finally:
        base.close()
        shutil.rmtree(store, ignore_errors=True)


def differences(streamed: Outcome, resident: Outcome) -> list[str]:
    """What is not the same to the last bit, in words."""
    found = []
    if streamed.losses != resident.losses:
        found.append(f"losses {streamed.losses} against {resident.losses}")
    for name, value in streamed.parameters.items():
        other = resident.parameters[name]
        if value.dtype != other.dtype or not torch.equal(value, other):
            distance = (value.double() - other.double()).abs().max().item()
            found.append(f"{name}: up to {distance:.3g} apart")
    return found


def folder_of(setting: Setting, parent: Path) -> Path:
    """The tiny model of a setting, made once per family and dtype."""
    kind = str(setting.dtype).removeprefix("torch.")
    folder = parent / kind / setting.family
    if not (folder / "config.json").exists():
        make_folder(setting.family, parent / kind, setting.dtype)
    return folder
