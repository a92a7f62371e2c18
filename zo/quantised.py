"""Quantised zeroth order (QZO): codes stay fixed, the scales of their blocks are trained.

Encoded modules (``headrace.quant``) keep their parts as frozen parameters.  This picks the scales
among them; everything else is the ordinary dense step::

    zo = ZOStep(model, qzo_settings(lr=1e-7), weights=ResidentWeights(scale_parameters(model)))

"Fine-tuning quantized neural networks with zeroth-order optimization" (QZO), 2025.
"""

from __future__ import annotations

import torch
from torch import nn

from ..quant.linear import EncodedModule
from .control import Clip
from .dense import Dense
from .estimate import Estimator
from .settings import ZOSettings
from .two_point import TwoPoint


def scale_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales of a model's encoded weights, by parameter name: the floating parts beside the codes.

    Refuses a weight whose scales are themselves encoded (double quantisation, microscaling).
    Encode with fp32 scales: steps are small beside a bfloat16 scale's last bit and would be lost.
    """
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if not isinstance(module, EncodedModule):
            continue
        for weight_name, slot in module.encoded_slots.items():
            prefix = f"{path}." if path else ""
            scales = _scales_of(module, weight_name)
            if not scales:
                raise ValueError(
                    f"{prefix}{weight_name} is encoded as {slot.codec.name!r}, whose scales are "
                    "not floating point and cannot be trained; encode with 'int4_group', "
                    "'int8_rowwise' or NF4 without double quantisation"
                )
            found |= {prefix + name: parameter for name, parameter in scales.items()}
    if not found:
        raise ValueError(f"{type(model).__name__} has no encoded weights; encode it first")
    return found


def qzo_settings(
    *,
    lr: float = 1e-7,
    eps: float = 1e-3,
    clip: float = 100.0,
    seed: int = 0,
    estimator: Estimator | None = None,
) -> ZOSettings:
    """QZO's published step: two dense probes of the scales, clipped directional derivative.

    >>> qzo_settings().directions.minimum
    0.0
    """
    return ZOSettings(
        lr=lr,
        eps=eps,
        seed=seed,
        estimator=TwoPoint() if estimator is None else estimator,
        directions=Dense(minimum=0.0),
        controls=(Clip(clip),),
    )


def _scales_of(module: EncodedModule, weight_name: str) -> dict[str, nn.Parameter]:
    parts = module.encoded_parts(weight_name)
    own = {part.data_ptr(): name for name, part in parts.items() if name != "codes"}
    wide = (torch.float32, torch.bfloat16, torch.float16)
    blocks = {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.data_ptr() in own and parameter.dtype in wide
    }
    nested = any(part.dtype == torch.uint8 for name, part in parts.items() if name != "codes")
    return {} if nested else blocks
