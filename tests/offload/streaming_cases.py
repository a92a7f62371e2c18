"""Tiny random models of many families, and the resident runs that streamed runs must equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**BASE},
    "mistral": {**BASE, "sliding_window": 8},
    "qwen2": {**BASE, "tie_word_embeddings": True},
    "qwen3": {**BASE, "head_dim": 8},
    "gemma2": {**BASE, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {**BASE, "head_dim": 8, "sliding_window": 8},
    "phi": {**BASE, "num_key_value_heads": 4, "resid_pdrop": 0.0},
    "phi3": {**BASE},
    "opt": {
        "vocab_size": 97,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dropout": 0.0,
    },
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "mixtral": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **BASE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {
        **BASE,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}
VOCABULARY = 97


def make_folder(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny random model of ``family`` as a Hugging Face folder."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    target = folder / family
    model.save_pretrained(target)
    return target


def batches(count: int, *, rows: int = 4, tokens: int = 12) -> list[Tensor]:
    """Deterministic token ids; every batch repeats some tokens."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCABULARY, (rows, tokens), generator=generator) for _ in range(count)]


def resident_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model, wholly in memory, in training mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.train()


def resident_steps(
    model: torch.nn.Module,
    optimizer: Any,
    ids: list[Tensor],
    *,
    micro_batch: int,
    max_grad_norm: float | None = None,
    each: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """The ordinary loop: micro-batch after micro-batch, gradients added up, one step."""
    losses = []
    for step, batch in enumerate(ids):
        count = torch.tensor(batch.shape[0] * (batch.shape[1] - 1))
        total = torch.zeros(())
        for number, start in enumerate(range(0, batch.shape[0], micro_batch)):
            part = batch[start : start + micro_batch]
            extra = {"num_items_in_batch": count} if micro_batch < batch.shape[0] else {}
            loss = model(input_ids=part, labels=part, use_cache=False, **extra).loss
            loss.backward()
            share = loss.detach()
            total = share if number == 0 else total + share
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(
                [p for p in model.parameters() if p.requires_grad], max_grad_norm
            )
        optimizer.step()
        model.zero_grad()
        losses.append(float(total))
        each(step)
    return losses


def streamed_steps(model: Any, optimizer: Any, ids: list[Tensor]) -> list[float]:
    """The streamed loop: the whole batch at once."""
    losses = []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def streamed_weights(model: Any) -> dict[str, Tensor]:
    """All real weights of a streamed model, by name."""
    return {n: t for _, tensors in model.chunk_tensors() for n, t in tensors.items()}
