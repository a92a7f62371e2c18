"""Recipes: functions that turn a model (or parameters) into a ready optimizer."""

from __future__ import annotations

from .adamw import AdamW
from .parameters import ModelOrParams
from .torch_api import RuleOptimizer


def adamw(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    states: str = "fp32",
    master: str = "fp32",
    maximize: bool = False,
    max_grad_norm: float | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> RuleOptimizer:
    """Return AdamW (Loshchilov and Hutter, arXiv:1711.05101) for resident or streamed parameters.

    ``states`` is the encoding of the moments, ``master`` that of the fp32 value behind a 16-bit
    weight (``"fp32"``, ``"split"``, ``"sr"``).  States in fp32 cost 8 bytes a parameter.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = adamw([weight], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> round(weight[0].item(), 3)
    0.899
    """
    if states != "fp32":
        raise ValueError(f"states={states!r} is unknown; choose 'fp32'")
    rule = AdamW(master=master)
    defaults = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    return RuleOptimizer(
        model_or_params,
        lambda info, group: rule,
        defaults,
        max_grad_norm=max_grad_norm,
        seed=seed,
        threads=threads,
    )
