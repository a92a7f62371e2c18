"""The codecs made for optimizer states: bounds, ranges, zeros, NaN, the smallest code."""

import pytest
import torch

from headrace.quant import CounterGenerator
from headrace.quant.casts import Bfloat16Codec, ScaledFloat16Codec
from headrace.quant.companded import Companded4Codec, Companded8Codec
from headrace.quant.exact import exact_sqrt
from headrace.quant.state_tables import Fp8BlockwiseCodec, State4BitCodec

CODECS = {
    "companded8": Companded8Codec(),
    "companded8-unsigned": Companded8Codec(signed=False),
    "companded4": Companded4Codec(64),
    "companded4-unsigned": Companded4Codec(64, signed=False),
    "state4": State4BitCodec(),
    "state4-unsigned": State4BitCodec(signed=False),
    "fp8": Fp8BlockwiseCodec(),
    "bf16": Bfloat16Codec(),
    "fp16": ScaledFloat16Codec(),
}


def values(name, count=1000):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, generator=generator) * torch.logspace(-9, 2, count)
    return x.abs() if "unsigned" in name else x


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_errors_stay_within_the_bound(name, stochastic):
    codec, x = CODECS[name], values(name)
    generator = CounterGenerator(3) if stochastic else None
    parts = codec.encode(x, generator=generator)
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == {
        k: (s.shape, s.dtype) for k, s in codec.spec((1000,)).items()
    }
    error = (codec.decode(parts, (1000,)) - x).abs()
    assert (error <= codec.max_error(x, stochastic=stochastic)).all()


@pytest.mark.parametrize("name", [n for n in CODECS if n != "fp16"])
def test_ranges_encode_apart(name):
    codec, x = CODECS[name], values(name, 1001)
    cut = 2 * codec.encode_granule((1001,))
    whole = codec.encode(x, generator=CounterGenerator(3))
    pieces = [codec.encode(x[:cut], generator=CounterGenerator(3)),
              codec.encode(x[cut:], generator=CounterGenerator(3, cut))]  # fmt: skip
    for part, tensor in whole.items():
        joined = torch.cat([piece[part].flatten() for piece in pieces])
        assert torch.equal(joined, tensor.flatten()), part


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zero_and_bad_values_show(name):
    codec = CODECS[name]
    assert torch.equal(codec.decode(codec.encode(torch.zeros(300)), (300,)), torch.zeros(300))
    assert codec.decode(codec.encode(torch.zeros(0)), (0,)).numel() == 0
    bad = torch.ones(300)
    bad[5] = torch.nan
    assert codec.decode(codec.encode(bad), (300,))[5].isnan()


@pytest.mark.parametrize("codec", [Companded8Codec(signed=False), Companded4Codec(signed=False)])
def test_what_is_not_zero_never_becomes_code_zero(codec):
    x = torch.zeros(256)
    x[0], x[1] = 1.0, 1e-28
    assert codec.decode(codec.encode(x), (256,))[1] > 0
    assert codec.decode(codec.encode(x, generator=CounterGenerator(1)), (256,))[1] > 0


def test_exact_sqrt_is_correctly_rounded():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact_sqrt(x), x.double().sqrt().float())
    assert exact_sqrt(torch.tensor(4.0)).shape == ()
