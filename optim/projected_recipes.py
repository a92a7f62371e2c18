"""Recipes whose moments live in a projection: GaLore and its relatives.

Matrices (a model's linear layers, or two-dimensional parameters) are projected; embeddings, the
output head, norms and biases get AdamW.  Keys of a param group override a recipe's own settings,
under the names that the reference packages gave them; a value of theirs that means something
else here is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

from .adam import Adam
from .apollo import Apollo, Scaling
from .base import Brick, chain
from .choose import BrickOf, matrix_rule, projected_groups
from .fira import Fira
from .frugal import Frugal
from .galore import GaLore
from .grass import Selection
from .grass import grass as grass_brick
from .natural_galore import NaturalGradient
from .parameters import ModelOrParams
from .projected import Carry, LazyRefresh
from .projector import Method, OrthogonalProjector, Projector, RandomProjector, Side
from .recipes import Common, build
from .slices import CoordinateProjector, SliceProjector
from .torch_api import RuleOptimizer

Betas = tuple[float, float]


def galore_adamw(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: Side = "std",
    method: Method = "power",
    carry: Carry = "re-project",
    states: str = "fp32",
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return GaLore (arXiv:2403.03507): AdamW in the gradient's leading singular subspace.

    ``method="svd", carry="keep"`` is the published algorithm.  State of an m x n matrix, m <= n:
    4 (m + 2 n) rank bytes with fp32 states.

    >>> import torch
    >>> model = torch.nn.Linear(64, 32, bias=False)
    >>> galore_adamw(model, rank=4).memory()
    {'exp_avg': 1024, 'exp_avg_sq': 1024, 'projector': 512}
    """

    def brick(group: Mapping[str, Any]) -> Brick:
        projector = OrthogonalProjector(
            group.get("rank", rank), group.get("proj_type", proj_type), method=method
        )
        gap = group.get("update_proj_gap", update_proj_gap)
        return GaLore(Adam(), projector, gap=gap, carry=carry, scale=group.get("scale", scale))

    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _projected(model_or_params, brick, states, master, hyper, common)


def galore_adamw_8bit(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: Side = "std",
    method: Method = "power",
    carry: Carry = "re-project",
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return GaLore with 8-bit moments.

    >>> from torch import nn
    >>> from headrace.optim import RuleOptimizer, galore_adamw_8bit, memory
    >>> def recipe(model: nn.Module) -> RuleOptimizer:
    ...     return galore_adamw_8bit(model, lr=1e-4, rank=64)
    ...
    >>> memory(nn.Linear(1024, 1024, bias=False), recipe)["total"]  # bytes
    397312
    """
    return galore_adamw(
        model_or_params,
        lr,
        betas,
        eps,
        weight_decay,
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        proj_type=proj_type,
        method=method,
        carry=carry,
        states="int8",
        master=master,
        **common,
    )


def q_galore(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: Side = "std",
    cos_threshold: float = 0.4,
    gamma_proj: float = 2.0,
    queue_size: int = 5,
    quant_group_size: int = 128,
    carry: Carry = "re-project",
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return Q-GaLore (arXiv:2407.08296): int4 basis, 8-bit moments, lazy refresh.

    Weights are kept by ``master`` (stochastic rounding); for the paper's INT8 see ``attach_int8``.

    >>> from torch import nn
    >>> from headrace.optim import RuleOptimizer, q_galore, memory
    >>> def recipe(model: nn.Module) -> RuleOptimizer:
    ...     return q_galore(model, lr=1e-4, rank=64)
    ...
    >>> memory(nn.Linear(1024, 1024, bias=False), recipe)["total"]  # bytes
    170028
    """

    def brick(group: Mapping[str, Any]) -> Brick:
        projector = OrthogonalProjector(
            group.get("rank", rank),
            group.get("proj_type", proj_type),
            int4=bool(group.get("quant", True)),
            int4_block=group.get("quant_group_size", quant_group_size),
        )
        return GaLore(
            Adam(),
            projector,
            gap=group.get("update_proj_gap", update_proj_gap),
            carry=carry,
            lazy=LazyRefresh(
                group.get("cos_threshold", cos_threshold),
                group.get("queue_size", queue_size),
                group.get("gamma_proj", gamma_proj),
            ),
            scale=group.get("scale", scale),
        )

    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _projected(model_or_params, brick, "int8", master, hyper, common)


def natural_galore(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: Side = "std",
    natural_history: int = 20,
    damping: float = 1e-3,
    carry: Carry = "re-project",
    states: str = "fp32",
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return Natural GaLore (arXiv:2410.16029): natural gradients in GaLore's subspace.

    The history costs ``natural_history`` times the projected gradient, in fp32.

    >>> from torch import nn
    >>> from headrace.optim import RuleOptimizer, natural_galore, memory
    >>> def recipe(model: nn.Module) -> RuleOptimizer:
    ...     return natural_galore(model, lr=1e-4, rank=64)
    ...
    >>> memory(nn.Linear(1024, 1024, bias=False), recipe)["total"]  # bytes
    6029312
    """

    def brick(group: Mapping[str, Any]) -> Brick:
        projector = OrthogonalProjector(group.get("rank", rank), group.get("proj_type", proj_type))
        inner = chain(NaturalGradient(natural_history, damping), Adam())
        gap = group.get("update_proj_gap", update_proj_gap)
        return GaLore(inner, projector, gap=gap, carry=carry, scale=group.get("scale", scale))

    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _projected(model_or_params, brick, states, master, hyper, common)


def apollo(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 1.0,
    scale_type: Scaling = "channel",
    proj: Literal["random", "svd"] = "random",
    proj_type: Side = "std",
    states: str = "fp32",
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return APOLLO (arXiv:2412.05270): gradients scaled as a random projection of them would be.

    State of an m x n matrix: 8 max(m, n) rank bytes with fp32 states, no basis.  ``proj="svd"``
    projects on the leading singular subspace instead, and keeps that basis.

    >>> from torch import nn
    >>> from headrace.optim import RuleOptimizer, apollo, memory
    >>> def recipe(model: nn.Module) -> RuleOptimizer:
    ...     return apollo(model, lr=1e-4, rank=64)
    ...
    >>> memory(nn.Linear(1024, 1024, bias=False), recipe)["total"]  # bytes
    524292
    """

    def brick(group: Mapping[str, Any]) -> Brick:
        used, side = group.get("rank", rank), group.get("proj_type", proj_type)
        projector: Projector = RandomProjector(used, side)
        if _choice(group, "proj", proj, ("random", "svd")) == "svd":
            projector = OrthogonalProjector(used, side, method="svd")
        return Apollo(
            Adam(),
            projector,
            gap=group.get("update_proj_gap", update_proj_gap),
            carry="keep",
            scale=group.get("scale", scale),
            scaling=group.get("scale_type", scale_type),
        )

    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _projected(model_or_params, brick, states, master, hyper, common)


def apollo_mini(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    update_proj_gap: int = 200,
    scale: float = 128.0,
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return APOLLO-Mini: rank 1, one scaling factor a tensor, 8 bytes a long-side channel.

    >>> from torch import nn
    >>> from headrace.optim import apollo_mini, memory
    >>> optimizer = apollo_mini(nn.Linear(8, 8), lr=1e-4, max_grad_norm=1.0)
    >>> memory(nn.Linear(1024, 1024, bias=False), apollo_mini)["total"]  # bytes
    8196
    """
    return apollo(
        model_or_params,
        lr,
        betas,
        eps,
        weight_decay,
        rank=1,
        update_proj_gap=update_proj_gap,
        scale=scale,
        scale_type="tensor",
        master=master,
        **common,
    )


def grass(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    selection: Selection = "top",
    states: str = "fp32",
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return GRASS (arXiv:2406.17660): AdamW on ``rank`` rows or columns chosen by gradient norm.

    ``selection``: ``"top"`` (largest norms), ``"multinomial"`` (drawn by norm) or ``"uniform"``.

    >>> from torch import nn
    >>> from headrace.optim import RuleOptimizer, grass, memory
    >>> def recipe(model: nn.Module) -> RuleOptimizer:
    ...     return grass(model, lr=1e-4, rank=64)
    ...
    >>> memory(nn.Linear(1024, 1024, bias=False), recipe)["total"]  # bytes
    524552
    """

    def brick(group: Mapping[str, Any]) -> Brick:
        return grass_brick(
            Adam(),
            rank=group.get("rank", rank),
            gap=group.get("update_proj_gap", update_proj_gap),
            scale=group.get("scale", scale),
            selection=selection,
        )

    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _projected(model_or_params, brick, states, master, hyper, common)


def frugal(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    density: float = 0.25,
    update_gap: int = 200,
    inactive_lr_scale: float = 1.0,
    proj_params_lr_scale: float = 1.0,
    projection: Literal["columns", "coordinates"] = "columns",
    states: str = "fp32",
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return FRUGAL (arXiv:2411.07837): AdamW on ``density`` of a matrix, signSGD on the rest.

    ``projection`` draws whole columns (of the shorter side) or single coordinates.
    ``inactive_lr_scale=0.1`` suits fine-tuning.  State: 8 density bytes a parameter.

    >>> from torch import nn
    >>> from headrace.optim import RuleOptimizer, frugal, memory
    >>> def recipe(model: nn.Module) -> RuleOptimizer:
    ...     return frugal(model, lr=1e-4, density=0.25)
    ...
    >>> memory(nn.Linear(1024, 1024, bias=False), recipe)["total"]  # bytes
    2097160
    """

    def brick(group: Mapping[str, Any]) -> Brick:
        share = group.get("density", density)
        _choice(group, "inactive_update_rule", "sign_sgd", ("sign_sgd",))
        projector: Projector = SliceProjector(density=share, choice="random")
        if _choice({}, "projection", projection, ("columns", "coordinates")) == "coordinates":
            projector = CoordinateProjector(share)
        return Frugal(
            Adam(),
            projector,
            gap=group.get("update_gap", update_gap),
            carry="reset" if group.get("reset_statistics", True) else "keep",
            state_free_scale=group.get("inactive_lr_scale", inactive_lr_scale),
            scale=group.get("proj_params_lr_scale", proj_params_lr_scale),
        )

    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _projected(model_or_params, brick, states, master, hyper, common)


def fira(
    model_or_params: ModelOrParams,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    alpha: float = 0.25,
    proj_type: Side = "std",
    method: Method = "power",
    carry: Carry = "re-project",
    states: str = "fp32",
    master: str = "sr",
    **common: Unpack[Common],
) -> RuleOptimizer:
    """Return Fira (arXiv:2410.01623): GaLore plus the scaled residual of the projection.

    >>> from torch import nn
    >>> from headrace.optim import RuleOptimizer, fira, memory
    >>> def recipe(model: nn.Module) -> RuleOptimizer:
    ...     return fira(model, lr=1e-4, rank=64)
    ...
    >>> memory(nn.Linear(1024, 1024, bias=False), recipe)["total"]  # bytes
    786436
    """

    def brick(group: Mapping[str, Any]) -> Brick:
        projector = OrthogonalProjector(
            group.get("rank", rank), group.get("proj_type", proj_type), method=method
        )
        gap = group.get("update_proj_gap", update_proj_gap)
        return Fira(Adam(), projector, gap=gap, carry=carry, scale=group.get("alpha", alpha))

    hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _projected(model_or_params, brick, states, master, hyper, common)


def _projected(
    model_or_params: ModelOrParams,
    brick: BrickOf,
    states: str,
    master: str,
    hyper: dict[str, Any],
    common: Common,
) -> RuleOptimizer:
    params, is_matrix = projected_groups(model_or_params)

    def checked(group: Mapping[str, Any]) -> Brick:
        _choice(group, "dim", 2, (2,))
        _choice(group, "quant_n_bit", 4, (4,))
        return brick(group)

    choose = matrix_rule(is_matrix, checked, states=states, master=master)
    return build(params, choose, hyper, common)


def _choice(group: Mapping[str, Any], key: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    """Return a group's value of a key, or the default; refuse values that are not offered."""
    value = group.get(key, default)
    if value not in allowed:
        raise ValueError(f"{key}={value!r} is not offered; choose one of {list(allowed)}")
    return value
