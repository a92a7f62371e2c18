"""Which rule a parameter gets: by its role, by its size, or by keys of its param group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .adam import Adam
from .base import Brick
from .brick_rule import BrickRule
from .device.launch import has_kernel
from .encoded_adamw import is_fused
from .fused_rule import FusedRule
from .masters import check_master
from .parameters import ModelOrParams, ParameterInfo, parameter_groups
from .storage import encoding_of
from .streamed import UpdateRule
from .torch_api import RuleChooser

#: Parameters with fewer elements than this keep fp32 states: there is nothing to save.
SMALLEST_ENCODED = 4096

BrickOf = Callable[[Mapping[str, Any]], Brick]


def element_rule(brick: Brick, states: str, master: str) -> RuleChooser:
    """Return a chooser that gives every parameter one brick; small ones keep fp32 states."""
    encoding_of(states)
    check_master(master)

    def choose(info: ParameterInfo, group: Mapping[str, Any]) -> UpdateRule:
        small = _numel(info) < SMALLEST_ENCODED
        return fast_rule(brick, "fp32" if small else states, master, group.get("fused"))

    return choose


def matrix_rule(
    is_matrix: Callable[[ParameterInfo, Mapping[str, Any]], bool],
    brick_of: BrickOf,
    *,
    states: str,
    master: str,
) -> RuleChooser:
    """Return a chooser: matrices get ``brick_of(their group)``, all else gets AdamW.

    ``states`` is the encoding of the moments of both kinds.
    """
    encoding_of(states)
    check_master(master)

    def choose(info: ParameterInfo, group: Mapping[str, Any]) -> UpdateRule:
        small = _numel(info) < SMALLEST_ENCODED
        own = "fp32" if small else states
        if not is_matrix(info, group):
            return fast_rule(Adam(), own, master, group.get("fused"))
        return fast_rule(brick_of(group), own, master, group.get("fused"))

    return choose


def fast_rule(
    brick: Brick, states: str, master: str, fused: bool | None = None
) -> FusedRule | BrickRule:
    """Return the rule of a brick and an encoding: fused kernels where there are any.

    ``fused=False`` takes the bricks everywhere, ``fused=True`` refuses to.
    """
    encoding = encoding_of(states)
    kernels = is_fused(brick, states) or has_kernel(brick, states)
    if fused or (kernels and fused is None):
        return FusedRule(brick, states, master=master, required=fused is True)
    return BrickRule(brick, encoding, master=master)


def projected_groups(
    model_or_params: ModelOrParams,
) -> tuple[ModelOrParams, Callable[[ParameterInfo, Mapping[str, Any]], bool]]:
    """Return the parameters, and the test of which ones are projected.

    A model's linear layers are; so are two-dimensional parameters of an iterable.  If any param
    group has a ``rank``, ``density`` or true ``is_proj_params`` key (as users of galore-torch,
    apollo-torch and FRUGAL write them), only matrices of groups with such a key are.
    """
    if isinstance(model_or_params, nn.Module):
        return model_or_params, lambda info, group: info.role == "matrix"
    groups = parameter_groups(model_or_params)
    if any(_marked(group) for group in groups):
        return groups, lambda info, group: len(info.shape) >= 2 and _marked(group)
    return groups, lambda info, group: info.role == "matrix"


def _marked(group: Mapping[str, Any]) -> bool:
    return bool(group.get("is_proj_params", "rank" in group or "density" in group))


def _numel(info: ParameterInfo) -> int:
    count = 1
    for extent in info.shape:
        count *= extent
    return count
