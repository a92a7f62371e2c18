"""Recipes: functions that turn a model (or parameters) into a ready optimizer.

Every recipe takes what torch optimizers take, ``(model_or_params, lr, betas, eps, weight_decay)``,
its own settings by keyword, and the common options of ``Common``.  Given a streamed model, the
same recipe drives the streamed update.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

from .adafactor import Adafactor
from .adam import Adam
from .adam_mini import AdamMini
from .base import Brick
from .choose import element_rule
from .lion import Lion
from .parameters import ModelOrParams
from .restart import Restart
from .sgd import Sgd
from .sign import Sign
from .stable_adamw import StableAdam
from .torch_api import RuleChooser, RuleOptimizer


class Common(TypedDict, total=False):
    """Options that every recipe takes.

    ``maximize`` ascends; ``max_grad_norm`` clips by the global norm before each step; ``seed``
    drives stochastic rounding and random projections; ``threads`` update in parallel.
    ``fused``: None updates by fused kernels where a device has them, False by plain torch
    operations everywhere (the same bits), True refuses parameters that would need those.
    """

    maximize: bool
    max_grad_norm: float | None
    seed: int
    threads: int | None
    fused: bool | None


def build(
    model_or_params: ModelOrParams,
    choose: RuleChooser,
    hyper: dict[str, Any],
    common: Common,
) -> RuleOptimizer:
    """Return the optimizer of a recipe: check the numbers, fill the param-group defaults."""
    check_hyper(hyper)
    return RuleOptimizer(
        model_or_params,
        choose,
        {**hyper, "maximize": common.get("maximize", False), "fused": common.get("fused")},
        max_grad_norm=common.get("max_grad_norm"),
        seed=common.get("seed", 0),
        threads=common.get("threads"),
    )


def check_hyper(hyper: dict[str, Any]) -> None:
    """Refuse learning rates, decay rates and the like that cannot work."""
    for name in ("lr", "eps", "weight_decay", "momentum"):
        if name in hyper and not float(hyper[name]) >= 0.0:
            raise ValueError(f"{name}={hyper[name]} must not be negative")
    for beta in hyper.get("betas", ()):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"betas={tuple(hyper['betas'])} must lie in 0 .. 1, 1 excluded")


def adamw(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    states: str = "fp32",
    master: str = "fp32",
    restart_every: int | None = None,
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return AdamW (Loshchilov and Hutter, arXiv:1711.05101) for resident or streamed parameters.

    ``states`` is the encoding of the moments (``storage.encodings``), ``master`` that of the fp32
    value behind a 16-bit weight (``"fp32"``, ``"split"``, ``"sr"``).  fp32 states cost 8 bytes a
    parameter, ``"int8"`` 2.06.  ``restart_every`` steps the moments start anew (the momentum reset
    of arXiv:2505.22922); None: never.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = adamw([weight], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> round(weight[0].item(), 3)
    0.899
    """
    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    brick: Brick = Adam() if restart_every is None else Restart(Adam(), restart_every)
    return build(model_or_params, element_rule(brick, states, master), hyper, common)


def adamw_8bit(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    states: str = "int8",
    master: str = "split",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return AdamW with 8-bit states; ``states="int8_dynamic"`` is bitsandbytes' format.

    >>> from torch import nn
    >>> from headrace.optim import adamw_8bit, memory
    >>> optimizer = adamw_8bit(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), adamw_8bit)["total"]  # bytes
    2162688
    """
    return adamw(
        model_or_params, lr, betas, eps, weight_decay, states=states, master=master, **common
    )


def adamw_4bit(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    states: str = "int4",
    master: str = "split",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return AdamW with 4-bit states; ``states="int4_torchao"`` is torchao's format.

    >>> from torch import nn
    >>> from headrace.optim import adamw_4bit, memory
    >>> optimizer = adamw_4bit(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), adamw_4bit)["total"]  # bytes
    1179648
    """
    return adamw(
        model_or_params, lr, betas, eps, weight_decay, states=states, master=master, **common
    )


def adamw_fp8(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    states: str = "coat",
    master: str = "split",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return AdamW with FP8 states: ``"coat"`` (range expansion), ``"fp8"`` or ``"fp8_lm"``.

    >>> from torch import nn
    >>> from headrace.optim import adamw_fp8, memory
    >>> optimizer = adamw_fp8(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), adamw_fp8)["total"]  # bytes
    2179072
    """
    return adamw(
        model_or_params, lr, betas, eps, weight_decay, states=states, master=master, **common
    )


def stable_adamw(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    *,
    states: str = "fp32",
    master: str = "fp32",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return StableAdamW, the AdamW-Adafactor hybrid with update clipping (arXiv:2304.13013).

    >>> from torch import nn
    >>> from headrace.optim import stable_adamw, memory
    >>> optimizer = stable_adamw(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), stable_adamw)["total"]  # bytes
    8388608
    """
    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return build(model_or_params, element_rule(StableAdam(), states, master), hyper, common)


def adam_mini(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    states: str = "fp32",
    master: str = "fp32",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return Adam-mini (arXiv:2406.16793) with one second moment for each output row.

    >>> from torch import nn
    >>> from headrace.optim import adam_mini, memory
    >>> optimizer = adam_mini(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), adam_mini)["total"]  # bytes
    4198400
    """
    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return build(model_or_params, element_rule(AdamMini(), states, master), hyper, common)


def lion(
    model_or_params: ModelOrParams,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    *,
    states: str = "fp32",
    master: str = "fp32",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return Lion (arXiv:2302.06675): one moment, 4 bytes a parameter in fp32.

    >>> from torch import nn
    >>> from headrace.optim import lion, memory
    >>> optimizer = lion(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), lion)["total"]  # bytes
    4194304
    """
    hyper = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    return build(model_or_params, element_rule(Lion(), states, master), hyper, common)


def lion_8bit(
    model_or_params: ModelOrParams,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    *,
    states: str = "int8",
    master: str = "split",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return Lion with an 8-bit moment: 1.03 bytes a parameter.

    >>> from torch import nn
    >>> from headrace.optim import lion_8bit, memory
    >>> optimizer = lion_8bit(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), lion_8bit)["total"]  # bytes
    1081344
    """
    return lion(model_or_params, lr, betas, weight_decay, states=states, master=master, **common)


def adafactor(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    *,
    scale_parameter: bool = False,
    clip_threshold: float = 1.0,
    master: str = "fp32",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return Adafactor (arXiv:1804.04235) with an outer learning rate and no momentum.

    >>> from torch import nn
    >>> from headrace.optim import adafactor, memory
    >>> optimizer = adafactor(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), adafactor)["total"]  # bytes
    8192
    """
    brick = Adafactor(clip_threshold=clip_threshold, scale_parameter=scale_parameter)
    hyper = {"lr": lr, "weight_decay": weight_decay}
    return build(model_or_params, element_rule(brick, "fp32", master), hyper, common)


def sgd(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = False,
    states: str = "fp32",
    master: str = "fp32",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return SGD; no state without momentum.  Weight decay is decoupled, unlike torch's.

    >>> from torch import nn
    >>> from headrace.optim import sgd, memory
    >>> optimizer = sgd(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), sgd)["total"]  # bytes
    0
    """
    brick: Brick = Sgd(with_momentum=momentum > 0.0, nesterov=nesterov)
    hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    return build(model_or_params, element_rule(brick, states, master), hyper, common)


def sign_sgd(
    model_or_params: ModelOrParams,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    *,
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return signSGD (arXiv:1802.04434): no state at all.

    >>> from torch import nn
    >>> from headrace.optim import sign_sgd, memory
    >>> optimizer = sign_sgd(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), sign_sgd)["total"]  # bytes
    0
    """
    hyper = {"lr": lr, "weight_decay": weight_decay}
    return build(model_or_params, element_rule(Sign(), "fp32", master), hyper, common)
