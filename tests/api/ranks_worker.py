"""One rank of the data-parallel tests; prints one JSON line.

python ranks_worker.py MODE RANK COUNT RENDEZVOUS FOLDER STORE STEPS [DIE_AT]

Every rank takes its rows of the same batches.  With DIE_AT the rank kills itself before it
commits that step, while the others may already have theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import headrace
from headrace.offload.store import Store
from headrace.optim import adamw

ROWS, TOKENS, VOCABULARY = 8, 12, 97


def batch_of(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step % 2)
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)


def opened(mode: str, folder: str, store: Path) -> tuple[Any, Any]:
    begun = any(store.rglob("commit.json"))
    if begun:
        model = headrace.resume(store, device="cpu", device_budget="8MB", host_budget="16MB")
    else:
        model = headrace.load(
            folder,
            train="adapters" if mode == "lora" else "all",
            store=store,
            device="cpu",
            device_budget="8MB",
            host_budget="16MB",
            update="backward" if mode == "backward" else "forward",
        )
    wrapped = model
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        # Each rank initialises other adapters: the first one's count.
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    norm = None if mode == "backward" else 0.5
    return wrapped, adamw(wrapped, lr=1e-3, eps=1e-6, max_grad_norm=norm)


def main() -> None:
    mode, rank_text, count_text, rendezvous, folder, store_text, steps = sys.argv[1:8]
    die_at = int(sys.argv[8]) if len(sys.argv) > 8 else None
    rank, count, store = int(rank_text), int(count_text), Path(store_text)
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count
        )
    if die_at is not None:
        commit = Store.commit_async

        def dies(self: Store, user: Any, **more: Any) -> Any:
            if self.step + 1 == die_at + 1:  # the first commit is the untrained model
                os.kill(os.getpid(), signal.SIGKILL)
            return commit(self, user, **more)

        Store.commit_async = dies  # type: ignore[method-assign]
    model, optimizer = opened(mode, folder, store)
    streamed = headrace.runtime_of(model)
    first = streamed.updates.steps if streamed.updates is not None else optimizer_steps(streamed)
    losses: list[float] = []
    for step in range(first, int(steps)):
        rows = batch_of(step)[rank * ROWS // count : (rank + 1) * ROWS // count]
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if count > 1:
            dist.all_reduce(mean)
            mean /= count
        losses.append(float(mean))
    streamed.flush()
    digest = hashlib.sha256()
    for name, tensor in weights_of(model):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert streamed.store is not None
    state_bytes = sum(r.nbytes for r in streamed.store.regions if r.name.startswith("states/"))
    print(
        json.dumps(
            {
                "first": first,
                "losses": losses,
                "state_bytes": state_bytes,
                "weights": digest.hexdigest(),
            }
        )
    )
    streamed.close()
    if count > 1:
        dist.destroy_process_group()


def optimizer_steps(streamed: Any) -> int:
    user = streamed.store.last_user
    return int(user["training"]["steps"])


def weights_of(model: Any) -> list[tuple[str, torch.Tensor]]:
    adapters = [(n, p.detach()) for n, p in model.named_parameters() if "lora_" in n]
    if adapters:
        return adapters
    return [(n, t) for _, tensors in model.chunk_tensors() for n, t in sorted(tensors.items())]


if __name__ == "__main__":
    main()
