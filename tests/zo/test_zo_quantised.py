"""QZO: codes fixed, scales trained and never negative, replay exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.quant.codec import Codec
from headrace.quant.int4_group import Int4GroupCodec
from headrace.quant.int8_blockwise import Int8BlockwiseCodec
from headrace.quant.int8_rowwise import Int8RowwiseCodec
from headrace.quant.linear import EncodedLinear
from headrace.quant.nf4 import Nf4Codec
from headrace.zo.log import read_log
from headrace.zo.quantised import qzo_settings, scale_parameters
from headrace.zo.replay import replay
from headrace.zo.step import ZOStep
from headrace.zo.weights import ResidentWeights


def make_model(codec: Codec) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
    return nn.Sequential(
        EncodedLinear.from_linear(layers[0], codec),
        nn.Tanh(),
        EncodedLinear.from_linear(layers[1], codec),
    )


def loss(model: nn.Module) -> float:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(32, 64, generator=generator)
    with torch.no_grad():
        return float((model(x) - x.roll(1, 1)).double().square().mean())


@pytest.mark.parametrize(
    "codec", [Int4GroupCodec(scale_dtype="float32"), Int8BlockwiseCodec(), Int8RowwiseCodec()]
)
def test_scales_learn_codes_stay_and_the_log_replays(codec: Codec, tmp_path: Path) -> None:
    model = make_model(codec)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scales = scale_parameters(model)
    assert scales and all(p.is_floating_point() for p in scales.values())
    start = loss(model)
    settings = qzo_settings(lr=2e-6, eps=1e-4)
    zo = ZOStep(model, settings, weights=ResidentWeights(scales), log=tmp_path / "log")
    for _ in range(80):
        zo.step(loss)
    zo.close()
    assert loss(model) < start
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in scales), name
        if name in scales:
            assert p.min() >= 0
    header, records = read_log(tmp_path / "log")
    for name, tensor in replay(before.items(), header, records):
        assert torch.equal(tensor, dict(model.named_parameters())[name]), name


def test_the_floor_holds() -> None:
    model = make_model(Int8RowwiseCodec())
    weights = ResidentWeights(scale_parameters(model))
    zo = ZOStep(model, qzo_settings(lr=1.0), weights=weights)
    zo.step(loss)
    low = min(float(p.min()) for p in weights.parameters.values())
    assert low == 0.0


def test_models_without_trainable_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="'nf4', whose scales are not floating"):
        scale_parameters(make_model(Nf4Codec()))
    with pytest.raises(ValueError, match="no encoded weights"):
        scale_parameters(nn.Linear(4, 4))
