"""Calibrated encoding: GPTQ and EoRA against rounding to nearest, HQQ against its start."""

import math

import pytest
import torch

from headrace.quant import gptq_refine
from headrace.quant.eora import eora
from headrace.quant.fp4 import Fp4Codec
from headrace.quant.fp8 import Fp8Codec
from headrace.quant.gptq import InputMoments, gptq, output_error
from headrace.quant.gptq_refine import fitted_parts, free_block_width
from headrace.quant.hqq import hqq
from headrace.quant.int4_group import Int4GroupCodec
from headrace.quant.int8_rowwise import Int8RowwiseCodec
from headrace.quant.mxfp4 import Mxfp4Codec
from headrace.quant.nf4 import Nf4Codec
from headrace.quant.nvfp4 import Nvfp4Codec

CODECS = [
    Int4GroupCodec(),
    Int4GroupCodec(mode="affine", block_size=64),
    Nf4Codec(),
    Mxfp4Codec(),
    Nvfp4Codec(),
    Fp8Codec(),
    Int8RowwiseCodec(),
]


def problem(out=96, width=256, tokens=2048, seed=0):
    """A Gaussian weight and inputs that are correlated and have a few strong channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * 0.02
    mix = torch.randn(width, width // 8, generator=generator) / math.sqrt(width // 8)
    x = torch.randn(tokens, width // 8, generator=generator) @ mix.t()
    x += 0.2 * torch.randn(tokens, width, generator=generator)
    x[:, ::50] *= 8
    moments = InputMoments(width)
    for piece in x.split(300):
        moments.add(piece)
    return weight, x, moments.matrix()


def decibels(ratio):
    return -20 * math.log10(ratio)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize(("by_importance", "refinements"), [(True, 0), (False, 0), (True, 2)])
def test_gptq_beats_rounding_to_nearest_on_the_output(codec, by_importance, refinements):
    weight, x, moments = problem()
    result = gptq(weight, moments, codec, by_importance=by_importance, refinements=refinements)
    shape = tuple(weight.shape)
    nearest = codec.decode(codec.encode(weight), shape)
    decoded = codec.decode(result.parts, shape)
    exact = x @ weight.t()
    measured = [((x @ w.t() - exact).norm() / exact.norm()).item() for w in (nearest, decoded)]
    assert measured == pytest.approx([result.nearest_error, result.error], rel=1e-2)
    gain = decibels(result.error) - decibels(result.nearest_error)
    assert gain > 4, f"{codec.name}: {gain:.1f} dB"
    assert output_error(weight, decoded, moments) == pytest.approx(result.error)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_gptq_without_correlation_is_rounding_to_nearest(codec):
    weight, _, _ = problem()
    result = gptq(weight, torch.eye(256), codec, refinements=0)
    nearest = codec.decode(codec.encode(weight), (96, 256))
    decoded = codec.decode(result.parts, (96, 256))
    # The same codes, but for values near a midpoint: GPTQ measures with the scale as stored
    # (NF4 stores its magnitudes rounded).
    assert (nearest != decoded).float().mean() < (1e-2 if codec.name == "nf4" else 1e-3)
    assert result.error == pytest.approx(result.nearest_error, rel=1e-3)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_refinements_lower_the_output_error(codec):
    weight, _, moments = problem()
    errors = [gptq(weight, moments, codec, refinements=count).error for count in (0, 2)]
    free = free_block_width(codec, 256) > 0
    assert free == (codec in (Int4GroupCodec(), Nf4Codec()))
    assert decibels(errors[1]) - decibels(errors[0]) > (0.6 if free else 0.1)


def test_refined_scales_are_read_by_everyone_and_survive_zeros():
    """Only the stored numbers change: layout and decoder are the codec's own."""
    weight, _, moments = problem()
    weight[3] = 0
    for codec in (Nf4Codec(), Nf4Codec(double_quantized=False), Int4GroupCodec(block_size=64)):
        result = gptq(weight, moments, codec)
        assert {n: p.shape for n, p in result.parts.items()} == {
            name: torch.Size(spec.shape) for name, spec in codec.spec((96, 256)).items()
        }
        decoded = codec.decode(result.parts, (96, 256))
        assert torch.isfinite(decoded).all()
        assert not decoded[3].any()
        assert output_error(weight, decoded, moments) == pytest.approx(result.error)
        assert result.error < gptq(weight, moments, codec, refinements=0).error
    with pytest.raises(ValueError, match="refinements"):
        gptq(weight, moments, Nf4Codec(), refinements=-1)


@pytest.mark.parametrize("shape", [(96, 256), (3, 32, 64), (50, 33), (7,), (0, 64)])
@pytest.mark.parametrize(
    "codec",
    [
        Nf4Codec(),
        Nf4Codec(double_quantized=False),
        Fp4Codec(),
        Int4GroupCodec(block_size=64),
        Int4GroupCodec(block_size=0),
        Mxfp4Codec(),
    ],
    ids=str,
)
def test_fitted_scales_lower_the_error_for_the_same_decoder(codec, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    parts, nearest = fitted_parts(weight, codec), codec.encode(weight)
    codec.check_parts(parts, shape)
    fitted, before = (codec.decode(p, shape) - weight for p in (parts, nearest))
    free = isinstance(codec, (Nf4Codec, Fp4Codec, Int4GroupCodec)) and weight.numel() > 1000
    if isinstance(codec, Int4GroupCodec):
        free = free and shape[-1] % (codec.block_size or shape[-1]) == 0
    elif weight.numel() % 64:
        free = False
    if free:
        assert fitted.square().sum() < 0.97 * before.square().sum()
    else:
        assert all(torch.equal(parts[name], nearest[name]) for name in nearest)


def test_fitting_a_block_of_zeros_leaves_it_zero():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    weight[2, :64] = 0
    for codec in (Nf4Codec(double_quantized=False), Int4GroupCodec(block_size=64)):
        decoded = codec.decode(fitted_parts(weight, codec), (8, 128))
        assert torch.isfinite(decoded).all() and not decoded[2, :64].any()


def test_solving_a_few_rows_at_once_solves_the_same(monkeypatch):
    weight, _, moments = problem()
    whole = gptq(weight, moments, Nf4Codec(double_quantized=False))
    monkeypatch.setattr(gptq_refine, "_SYSTEM_NUMBERS", 7 * 4 * 4)  # 7 rows of 4 blocks
    pieces = gptq(weight, moments, Nf4Codec(double_quantized=False))
    assert torch.allclose(whole.parts["absmax"], pieces.parts["absmax"], rtol=1e-3)
    assert pieces.error == pytest.approx(whole.error, rel=1e-3)


def test_blocks_that_cross_rows_keep_their_scales():
    weight, _, moments = problem(width=96)
    codec = Nf4Codec(double_quantized=False)
    result = gptq(weight, moments, codec)
    assert torch.equal(result.parts["absmax"], codec.encode(weight)["absmax"])
    assert result.error < gptq(weight, moments, codec, refinements=0).error


def test_gptq_survives_dead_inputs_and_refuses_nonsense():
    weight, x, _ = problem()
    x[:, 10:20] = 0
    moments = InputMoments(256)
    moments.add(x)
    result = gptq(weight, moments.matrix(), Nf4Codec())
    assert result.error < result.nearest_error
    with pytest.raises(ValueError, match="moments"):
        gptq(weight, torch.eye(255), Nf4Codec())
    with pytest.raises(ValueError, match="NaN"):
        gptq(weight, torch.full((256, 256), math.nan), Nf4Codec())
    with pytest.raises(ValueError, match="positive definite"):
        gptq(weight, -torch.eye(256), Nf4Codec())
    with pytest.raises(ValueError, match="calibration"):
        InputMoments(4).matrix()


def test_eora_is_the_best_correction_of_its_rank():
    weight, _, moments = problem()
    codec = Nf4Codec()
    decoded = codec.decode(codec.encode(weight), (96, 256))
    moments = moments.double()
    power, directions = torch.linalg.eigh(moments)
    weighted = (weight - decoded).double() @ directions * power.clamp(min=0).sqrt()
    singular = torch.linalg.svdvals(weighted)
    signal = ((weight.double() @ moments) * weight.double()).sum()
    for rank in (1, 8, 32, 96):
        a, b = eora(weight, decoded, moments, rank=rank)
        assert (a.shape, b.shape) == ((rank, 256), (96, rank))
        error = output_error(weight, decoded + b @ a, moments)
        best = (singular[rank:].square().sum() / signal).sqrt().item()
        assert error == pytest.approx(best, rel=2e-3, abs=1e-4)
    plain = torch.linalg.svd(weight - decoded, full_matrices=False)
    svd = (plain.U[:, :16] * plain.S[:16]) @ plain.Vh[:16]
    a, b = eora(weight, decoded, moments, rank=16)
    gain = decibels(output_error(weight, decoded + b @ a, moments))
    assert gain > decibels(output_error(weight, decoded + svd, moments)) + 3
    assert gain > decibels(output_error(weight, decoded, moments)) + 4


def test_gptq_and_eora_add_up():
    weight, _, moments = problem()
    codec = Nf4Codec()
    result = gptq(weight, moments, codec)
    decoded = codec.decode(result.parts, (96, 256))
    a, b = eora(weight, decoded, moments, rank=16)
    both = output_error(weight, decoded + b @ a, moments)
    assert both < result.error < result.nearest_error
    assert decibels(both) > decibels(result.nearest_error) + 7


def test_eora_refuses_shapes_that_do_not_fit():
    weight = torch.randn(4, 6)
    with pytest.raises(ValueError, match="do not fit"):
        eora(weight, weight, torch.eye(4), rank=1)
    with pytest.raises(ValueError, match="rank 5"):
        eora(weight, weight, torch.eye(6), rank=5)


@pytest.mark.parametrize("tails", ["gaussian", "student"])
def test_hqq_lowers_the_error_of_affine_groups(tails):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(128, 512, generator=generator) * 0.02
    if tails == "student":
        weight /= torch.randn(128, 512, 5, generator=generator).square().mean(-1).sqrt()
    codec = Int4GroupCodec(block_size=64, mode="affine", scale_dtype="float16")
    before = codec.decode(codec.encode(weight), (128, 512)) - weight
    parts = hqq(weight, codec)
    after = codec.decode(parts, (128, 512)) - weight
    assert after.abs().mean() < before.abs().mean()
    assert decibels(after.norm() / weight.norm()) > decibels(before.norm() / weight.norm()) + 0.1
    with pytest.raises(ValueError, match="affine"):
        hqq(weight, Int4GroupCodec())
    with pytest.raises(ValueError, match="whole groups"):
        hqq(weight[:, :500], codec)
