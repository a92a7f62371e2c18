"""What differs between the versions of transformers that Headrace supports (5.0 and later).

Every question is put to the installed functions themselves (their parameters, their results),
never to a version number.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from .errors import InputError


def chosen_dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    """The dtype of the weights: what was asked for, else the checkpoint's."""
    chosen: Any = dtype or getattr(config, "dtype", None) or torch.float32
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise InputError(f"dtype is {dtype!r}; give torch.bfloat16, torch.float16 or torch.float32")
    return chosen


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Which parameters keep another dtype, by pattern, when the model is loaded in ``dtype``."""
    if "_get_dtype_plan" in dir(type(model)):
        return dict(model._get_dtype_plan(dtype))
    return dict(model.dtype_plan)  # type: ignore[arg-type]  # transformers 5.0


def convert_into(model: PreTrainedModel, state: Mapping[str, Any], dtype: torch.dtype) -> list[str]:
    """Run transformers' own conversion of checkpoint tensors; return what went wrong."""
    plan = dtype_plan(model, dtype)
    options: dict[str, Any] = {
        "weight_mapping": get_model_conversion_mapping(model),  # stateful: a fresh one per call
        "device_map": {"": "cpu"},
        "dtype": dtype,
    }
    if "dtype_plan" in inspect.signature(LoadStateDictConfig).parameters:
        options["dtype_plan"] = plan
    accepted = inspect.signature(convert_and_load_state_dict_in_model).parameters
    extra: dict[str, Any] = {"tp_plan": None, "dtype_plan": plan}
    outcome: Any = convert_and_load_state_dict_in_model(
        model,
        dict(state),
        LoadStateDictConfig(**options),
        **{name: value for name, value in extra.items() if name in accepted},
    )
    if len(outcome) == 2:
        info, _ = outcome
        return [*map(str, info.conversion_errors), *map(str, info.mismatched_keys)]
    _, _, mismatched, _, errors = outcome  # transformers 5.0
    return [*map(str, errors), *map(str, mismatched)]
