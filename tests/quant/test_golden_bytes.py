"""Bytes shared with bitsandbytes and torchao, and the error figures the formats are known for."""

import pytest
import torch

from headrace.quant import CounterGenerator
from headrace.quant.fp4 import Fp4Codec
from headrace.quant.fp8 import Fp8Codec
from headrace.quant.int4_group import Int4GroupCodec
from headrace.quant.int8_blockwise import Int8BlockwiseCodec
from headrace.quant.int8_rowwise import Int8RowwiseCodec
from headrace.quant.interop import (
    from_bitsandbytes,
    nf4_from_torchao,
    nf4_to_torchao,
    requantise_magnitudes,
    to_bitsandbytes,
)
from headrace.quant.mxfp4 import Mxfp4Codec
from headrace.quant.mxfp8 import Mxfp8Codec
from headrace.quant.nf4 import Nf4Codec
from headrace.quant.nvfp4 import Nvfp4Codec
from headrace.quant.tables import dynamic_map, fp4_values


def weights(shape=(256, 320), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 0.02
    x.view(-1)[::97] *= 8
    x.view(-1)[5:70] = 0.0
    return x


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed (headrace[bench])"
    )


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao", reason="torchao is not installed (headrace[bench])")


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_the_published_one(bnb, signed):
    theirs = bnb.create_dynamic_map(signed)
    assert torch.equal(torch.tensor(dynamic_map(signed=signed)), theirs)


def test_fp4_table_is_the_one_of_bitsandbytes(bnb):
    assert torch.equal(torch.tensor(fp4_values()), bnb.get_4bit_type("fp4", device="cpu"))


@pytest.mark.parametrize("shape", [(256, 320), (7, 33), (3,), (1000,)], ids=str)
@pytest.mark.parametrize("block_size", [64, 256])
def test_int8_blockwise_bytes_equal_the_reference_rounding(bnb, shape, block_size):
    x = weights(shape)
    # float64 input takes bitsandbytes' table search; float32 its coarse CPU rounding.
    table = bnb.create_dynamic_map(True)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x.double(), table, block_size)
    codec = Int8BlockwiseCodec(block_size)
    parts = codec.encode(x)
    assert torch.equal(parts["absmax"], absmax)
    live = absmax.repeat_interleave(block_size)[: x.numel()].view(shape) > 0
    # An all-zero block is divided by zero over there.
    assert torch.equal(parts["codes"][live], codes[live])
    theirs = torch.ops.bitsandbytes.dequantize_blockwise(
        parts["codes"], absmax, table, block_size, torch.float32
    )
    assert torch.equal(codec.decode(parts, shape), theirs)


@pytest.mark.parametrize("shape", [(256, 320), (7, 33), (3,), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_bytes_equal_bitsandbytes(bnb, shape, dtype, kind):
    x = weights(shape).to(dtype)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=False)
    codec = {"nf4": Nf4Codec, "fp4": Fp4Codec}[kind](double_quantized=False)
    parts = codec.encode(x)
    assert torch.equal(parts["codes"], packed.view(-1))
    live = state.absmax > 1e-37  # over there an all-zero short block gets a tiny magnitude
    assert torch.equal(parts["absmax"][live], state.absmax[live])
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(codec.decode(parts, shape, dtype), theirs.view(shape))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(512, 320), (40, 33)], ids=str)
def test_bitsandbytes_opens_what_we_double_quantise(bnb, kind, shape):
    x = weights(shape)
    codec = {"nf4": Nf4Codec, "fp4": Fp4Codec}[kind]()
    parts = codec.encode(x)
    saved = to_bitsandbytes(codec, parts, shape, torch.bfloat16)
    packed = saved.pop("")
    state = bnb.QuantState.from_dict(dict(saved), device=torch.device("cpu"))
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(codec.decode(parts, shape, torch.bfloat16), theirs)
    again, back, back_shape, dtype = from_bitsandbytes({"": packed, **saved})
    assert (again, back_shape, dtype) == (codec, shape, torch.bfloat16)
    assert all(torch.equal(back[name], part) for name, part in parts.items())


def test_what_bitsandbytes_double_quantises_is_taken_as_it_is(bnb):
    x = weights((512, 320)).to(torch.bfloat16)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    codec, parts, shape, dtype = from_bitsandbytes({"": packed, **state.as_dict(packed=True)})
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(codec.decode(parts, shape, dtype), theirs)
    ours = codec.encode(x)
    assert torch.equal(ours["codes"], parts["codes"])
    assert torch.allclose(ours["nested_offset"], parts["nested_offset"], rtol=1e-6)
    # Their CPU library rounds magnitudes through a coarse table: neighbours, and not always.
    assert (ours["absmax"].int() - parts["absmax"].int()).abs().max() <= 4


def test_damaged_bitsandbytes_states_are_refused(bnb):
    codec = Nf4Codec()
    saved = to_bitsandbytes(codec, codec.encode(weights()), (256, 320), torch.bfloat16)
    name = "quant_state.bitsandbytes__nf4"
    with pytest.raises(ValueError, match="bitsandbytes__"):
        from_bitsandbytes({key: value for key, value in saved.items() if key != name})
    with pytest.raises(ValueError, match="damaged"):
        from_bitsandbytes(saved | {name: saved[name][:20]})
    with pytest.raises(ValueError, match="quant_map"):
        from_bitsandbytes(saved | {"quant_map": saved["quant_map"] * 2})
    with pytest.raises(ValueError, match="codes"):
        from_bitsandbytes(saved | {"": saved[""][:-1]})


def test_nf4_vector():
    codes = Nf4Codec(double_quantized=False).encode(torch.tensor([-1.0, 1.0]))["codes"]
    assert codes.tolist() == [0x0F]


def test_nf4_goes_to_torchao_and_back(torchao):
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    x = weights((512, 320))
    x.view(-1)[5:70] = 0.01  # torchao divides by the magnitude of an all-zero block
    theirs = module.to_nf4(x)
    codec, parts = nf4_from_torchao(
        quantized_data=theirs.quantized_data,
        quantized_scalers=theirs.quantized_scalers,
        quantization_factor=theirs.quantization_factor,
        scaler_mean=theirs.scaler_mean,
        block_size=64,
    )
    ours = codec.encode(x)
    same = (ours["codes"] == theirs.quantized_data).float().mean()
    assert same > 0.999, "only values between the two tables' midpoints may differ"
    limit = 6e-5 * parts["absmax"].max() + 1e-9
    assert (codec.decode(parts, (512, 320)) - theirs.get_original_weight()).abs().max() < limit
    there = nf4_to_torchao(codec, ours, (512, 320))
    assert torch.equal(there["quantized_scalers"], theirs.quantized_scalers)
    assert torch.allclose(there["quantization_factor"], theirs.quantization_factor)
    doubled = requantise_magnitudes(parts)
    error = Nf4Codec().decode(doubled, (512, 320)) - codec.decode(parts, (512, 320))
    assert error.abs().max() < 0.01 * parts["absmax"].max()
    with pytest.raises(ValueError, match="scaler_block_size"):
        nf4_to_torchao(codec, codec.encode(x[:3]), (3, 320))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
@pytest.mark.parametrize("element", ["e2m1", "e4m3", "e5m2"])
def test_mx_bytes_equal_torchao(torchao, dtype, rule, element):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    elements = {
        "e2m1": torch.float4_e2m1fn_x2,
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
    }
    x = weights().to(dtype)
    mode = config.ScaleCalculationMode[rule.upper()]
    scale, data = mx.to_mx(x, elements[element], 32, mode)
    if element == "e2m1":
        codec = Mxfp4Codec(scale_rule=rule)
    else:
        codec = Mxfp8Codec(element=element, scale_rule=rule)
    parts = codec.encode(x)
    assert torch.equal(parts["scale"], scale.view(torch.uint8))
    assert torch.equal(parts["codes"], data.view(torch.uint8).view(parts["codes"].shape))
    theirs = mx.to_dtype(data, scale, elements[element], 32, dtype)
    assert torch.equal(codec.decode(parts, tuple(x.shape), dtype), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_bytes_equal_torchao(torchao, dtype):
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = weights().to(dtype)
    per_tensor = nv.per_tensor_amax_to_scale(x.abs().amax())
    scale, data = nv.nvfp4_quantize(x, per_tensor_scale=per_tensor)
    parts = Nvfp4Codec().encode(x)
    assert torch.equal(parts["global_scale"], per_tensor)
    assert torch.equal(parts["scale"], scale.view(torch.uint8).view(parts["scale"].shape))
    assert torch.equal(parts["codes"], data.view(torch.uint8))


def signal_to_noise(codec, x):
    error = codec.decode(codec.encode(x), tuple(x.shape)) - x
    return 10 * torch.log10(x.square().mean() / error.square().mean()).item()


@pytest.mark.parametrize(
    ("codec", "decibels"),
    [
        (Nf4Codec(), 20.7),
        (Fp4Codec(), 18.3),
        (Int4GroupCodec(), 18.6),
        (Int4GroupCodec(mode="affine", block_size=64), 20.8),
        (Int8RowwiseCodec(), 41.6),
        (Int8BlockwiseCodec(), 39.3),
        (Fp8Codec(), 31.6),
        (Mxfp8Codec(), 31.6),
        (Mxfp4Codec(), 19.0),
        (Mxfp4Codec(scale_rule="rceil"), 18.5),
        (Nvfp4Codec(), 20.4),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_gaussian_weights_have_the_known_error(codec, decibels):
    x = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(1)) * 0.02
    assert signal_to_noise(codec, x) == pytest.approx(decibels, abs=0.25)


def test_stochastic_rounding_of_weights_costs_what_theory_says():
    x = torch.randn(256, 2048, generator=torch.Generator().manual_seed(1)) * 0.02
    codec = Int8RowwiseCodec()
    stochastic = codec.decode(codec.encode(x, generator=CounterGenerator(0)), (256, 2048)) - x
    nearest = codec.decode(codec.encode(x), (256, 2048)) - x
    # Uniform dither doubles the variance: 1/6 of a step squared against 1/12.
    assert (stochastic.square().mean() / nearest.square().mean()).item() == pytest.approx(2, 0.05)
