"""Zeroth order over encoded weights: codes stay fixed and are only read.

Two ways to train what lies beside them:

* QZO: the scales of the codes' blocks, by ordinary dense steps::

      zo = ZOStep(model, qzo_settings(lr=1e-7), weights=ResidentWeights(scale_parameters(model)))

* low-rank differences, added to activations (``adapter.Adapter``)::

      zo = ZOStep(model, ZOSettings(directions=LowRank(15), estimator=OneSided(15)),
                  weights=ResidentWeights(encoded_matrices(model)))

With the stream, ``streamed.StreamedWeights`` takes the place of ``ResidentWeights``, and
``trains_scales(model)`` is its ``select`` for QZO.

"Fine-tuning quantized neural networks with zeroth-order optimization" (QZO), 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..quant.encoded import EncodedTensor
from ..quant.linear import EncodedModule, part_parameter_name
from .control import Clip
from .dense import Dense
from .estimate import Estimator
from .settings import ZOSettings
from .two_point import TwoPoint

CODES = "codes"
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scale_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales of a model's encoded weights, by parameter name: the floating parts beside the codes.

    Refuses a weight whose scales are themselves encoded (double quantisation, microscaling).
    Encode with fp32 scales: steps are small beside a bfloat16 scale's last bit and would be lost.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, module, weight_name in _encoded(model):
        others = {
            prefix + name: parameter
            for name, parameter in encoded_part_parameters(module, weight_name).items()
            if name != part_parameter_name(weight_name, CODES)
        }
        nested = any(p.dtype == torch.uint8 for p in others.values())
        scales = {n: p for n, p in others.items() if p.dtype in _SCALE_DTYPES}
        if nested or not scales:
            codec = module.encoded_slots[weight_name].codec
            raise ValueError(
                f"{prefix}{weight_name} is encoded as {codec.name!r}, whose scales are "
                "not floating point and cannot be trained; encode with 'int4_group', "
                "'int8_rowwise' or NF4 without double quantisation"
            )
        found |= scales
    if not found:
        raise ValueError(f"{type(model).__name__} has no encoded weights; encode it first")
    return found


def trains_scales(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """A selection for QZO: exactly the model's ``scale_parameters``."""
    names = frozenset(scale_parameters(model))

    def select(name: str, _: nn.Parameter) -> bool:
        return name in names

    return select


def encoded_matrices(model: nn.Module) -> dict[str, EncodedTensor]:
    """Encoded weights that low-rank directions can train beside their codes, by weight name.

    Two-dimensional weights of linear layers; stacks of experts, whose inputs are not in batch
    order, are left out.
    """
    found: dict[str, EncodedTensor] = {}
    for prefix, module, weight_name in _encoded(model):
        weight = module.encoded_weight(weight_name)
        embedding = isinstance(module, nn.Embedding)
        if weight.dim() == 2 and not embedding and "experts" not in prefix.split("."):
            found[prefix + weight_name] = weight
    return found


def encoded_part_parameters(module: EncodedModule, weight_name: str) -> dict[str, nn.Parameter]:
    """The parameters that hold the parts of one encoded weight, by their name in the module."""
    slot = module.encoded_slots[weight_name]
    names = [part_parameter_name(weight_name, part) for part in slot.codec.spec(slot.shape)]
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return {name: own[name] for name in names}


def encoded_parts(model: nn.Module) -> dict[str, str]:
    """The encoded weight that a parameter is a part of, by parameter name."""
    return {
        prefix + name: prefix + weight_name
        for prefix, module, weight_name in _encoded(model)
        for name in encoded_part_parameters(module, weight_name)
    }


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


def _encoded(model: nn.Module) -> Iterator[tuple[str, EncodedModule, str]]:
    """(prefix of names, module, weight name) of every encoded weight."""
    for path, module in model.named_modules():
        if isinstance(module, EncodedModule):
            for weight_name in module.encoded_slots:
                yield (f"{path}." if path else ""), module, weight_name
