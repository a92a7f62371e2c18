"""Products in FP8 and INT8, and smaller saved activations, against exact references."""

import pytest
import torch
from torch import nn

from headrace.quant.fp8_linear import Fp8Linear
from headrace.quant.int8_fallback import BlockInt8, FallbackLinear, block_product
from headrace.quant.micro_linear import MicroscaledLinear, rounded_rows
from headrace.quant.minifloat import E4M3, E5M2
from headrace.quant.mxfp4 import Mxfp4Codec
from headrace.quant.mxfp8 import Mxfp8Codec
from headrace.quant.nvfp4 import Nvfp4Codec
from headrace.quant.saved import CompactLinear, EncodedSaved, compact_linear, sign_projection
from headrace.quant.scaled_matmul import (
    DeviceScaledMatmul,
    EmulatedScaledMatmul,
    Fp8Matrix,
    scaled_matmul_for,
)
from headrace.quant.switchback import SwitchBackLinear, int8_product, int8_rows


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    (y * weights).sum().backward()
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def twin_of(layer):
    twin = nn.Linear(layer.in_features, layer.out_features)
    twin.load_state_dict(dict(layer.named_parameters()))
    return twin


@pytest.mark.parametrize(
    ("make", "limits"),
    [
        (
            lambda: Fp8Linear(64, 48, matmul=EmulatedScaledMatmul()),
            (0.05, 0.08, 0.08),
        ),
        (lambda: SwitchBackLinear(64, 48), (0.02, 0.02, 1e-6)),
        (lambda: FallbackLinear(64, 48, block=16), (0.02, 0.02, 1e-6)),
        (lambda: MicroscaledLinear(64, 48, codec=Mxfp8Codec()), (0.05, 0.05, 0.05)),
        (lambda: MicroscaledLinear(64, 48, codec=Nvfp4Codec()), (0.2, 0.2, 0.2)),
        (lambda: MicroscaledLinear(64, 48, codec=Mxfp4Codec(), seed=3), (0.25, 0.3, 0.3)),
        (lambda: CompactLinear(64, 48, rank=64, seed=1), (1e-6, 1e-6, 1.5)),
    ],
    ids=["fp8", "switchback", "fallback", "mxfp8", "nvfp4", "mxfp4", "compact"],
)
def test_low_precision_layers_stay_near_the_exact_one(make, limits):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(3, 20, 64)
    found, exact = gradients(layer, x), gradients(twin_of(layer), x)
    for value, reference, limit in zip(found[:3], exact[:3], limits, strict=True):
        assert value.shape == reference.shape
        assert relative(value, reference) < limit
    assert torch.allclose(found[3], exact[3], rtol=1e-5)


def test_fp8_emulation_is_the_product_of_the_rounded_values():
    torch.manual_seed(0)
    x, w = torch.randn(5, 32), torch.randn(7, 32)
    for by_row in (False, True):
        a = Fp8Matrix.from_values(x, E4M3, by_row=by_row)
        b = Fp8Matrix.from_values(w, E5M2, by_row=by_row)
        product = EmulatedScaledMatmul().multiply(a, b, torch.float32, fast_accumulation=False)
        exact = (a.unit().double() * a.scale) @ (b.unit().double() * b.scale).t()
        assert relative(product, exact) < 1e-6
        assert (a.unit().abs().amax() - 448).abs() == 0


@pytest.mark.parametrize("by_row", [False, True])
def test_device_product_and_emulation_agree(by_row):
    torch.manual_seed(0)
    a = Fp8Matrix.from_values(torch.randn(32, 64), E4M3, by_row=by_row)
    b = Fp8Matrix.from_values(torch.randn(48, 64), E4M3, by_row=by_row)
    ours = EmulatedScaledMatmul().multiply(a, b, torch.bfloat16, fast_accumulation=False)
    theirs = DeviceScaledMatmul().multiply(a, b, torch.bfloat16, fast_accumulation=False)
    assert relative(ours, theirs) < 5e-3


def test_emulation_says_so():
    assert scaled_matmul_for(torch.device("cpu")).emulated
    assert not DeviceScaledMatmul().emulated
    assert "emulated" in repr(Fp8Linear(8, 8, matmul=EmulatedScaledMatmul()))
    for codec in (Mxfp8Codec(), Mxfp4Codec(), Nvfp4Codec()):
        layer = MicroscaledLinear(32, 8, codec=codec)
        assert layer.emulated
        assert f"{codec.name}=emulated" in repr(layer)


def test_int8_product_is_exact_for_any_shape():
    generator = torch.Generator().manual_seed(0)
    for m, k, n in [(1, 1, 1), (5, 13, 3), (40, 2000, 17)]:
        a = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
        b = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        assert torch.equal(int8_product(a, b).long(), a.long() @ b.long().t())


@pytest.mark.parametrize("shape", [(40, 70, 30), (3, 16, 5), (17, 33, 1)])
def test_block_product_is_that_of_the_decoded_blocks(shape):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator)
    a[0, :: max(k // 3, 1)] = 80.0
    left = BlockInt8(a, 16, threshold=10.0)
    right = BlockInt8(torch.randn(n, k, generator=generator), 16)
    assert (left.fallback.any() and not left.fallback.all()) or m <= 16
    expected = left.decode().double() @ right.decode().double().t()
    assert relative(block_product(left, right), expected) < 1e-6


def test_blocks_with_outliers_fall_back_to_nearly_sixteen_bits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=generator)
    x[5, 7] = 300.0
    plain, fallback = BlockInt8(x, 32), BlockInt8(x, 32, threshold=20.0)
    assert fallback.fallback.tolist() == [[True, False], [False, False]]
    block = (slice(0, 32), slice(0, 32))
    assert (plain.decode() - x)[block].abs().max() > 0.5
    assert (fallback.decode() - x)[block].abs().max() <= 300 / 127 / 254 / 2 * 1.01
    assert torch.equal(plain.decode()[32:], fallback.decode()[32:])


def test_the_threshold_keeps_the_share_of_fallback_in_its_band():
    torch.manual_seed(0)
    layer = FallbackLinear(256, 8, block=16, low=0.1, high=0.3)
    x = torch.randn(256, 256) * torch.exp(torch.randn(16).repeat_interleave(16) * 2)
    for _ in range(60):
        layer(x)
    share = BlockInt8(x, 16, float(layer.threshold)).fallback.float().mean()
    assert 0.1 <= share <= 0.3
    frozen = float(layer.threshold)
    layer.eval()(x * 100)
    assert float(layer.threshold) == frozen
    assert "threshold" in layer.state_dict()
    with pytest.raises(ValueError, match="low <= high"):
        FallbackLinear(4, 4, low=0.5, high=0.1)


def test_microscaled_products_are_those_of_the_rounded_operands():
    torch.manual_seed(0)
    layer = MicroscaledLinear(64, 48, codec=Mxfp4Codec(), gradient_codec=Mxfp8Codec(), bias=False)
    x = torch.randn(40, 64, requires_grad=True)
    grad = torch.randn(40, 48)
    out = layer(x)
    out.backward(grad)
    four, eight = Mxfp4Codec(), Mxfp8Codec()
    w = layer.weight.detach()
    assert torch.equal(out, rounded_rows(x, four) @ rounded_rows(w, four).t())
    # Each product encodes along what it sums over.
    assert torch.equal(x.grad, rounded_rows(grad, eight) @ rounded_rows(w.t(), four).t())
    expected = rounded_rows(grad.t(), eight) @ rounded_rows(x.detach().t(), four).t()
    assert torch.equal(layer.weight.grad, expected)


def test_not_a_number_reaches_the_output():
    poisoned = torch.randn(40, 32)
    poisoned[2, 3] = torch.nan
    assert FallbackLinear(32, 8, block=16)(poisoned)[2].isnan().all()
    assert MicroscaledLinear(32, 8, codec=Mxfp8Codec())(poisoned)[2].isnan().all()
    x = torch.randn(4, 16)
    x[2, 3] = torch.nan
    out = SwitchBackLinear(16, 8)(x)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()
    assert int8_rows(x)[1][2].isnan()
    assert Fp8Linear(16, 8, matmul=EmulatedScaledMatmul())(x).isnan().all()


def test_low_precision_layers_train():
    for make in (
        lambda: Fp8Linear(16, 8, matmul=EmulatedScaledMatmul()),
        lambda: SwitchBackLinear(16, 8),
        lambda: FallbackLinear(16, 8, block=8),
        lambda: MicroscaledLinear(16, 8, codec=Mxfp8Codec()),
        lambda: CompactLinear(16, 8, rank=8, seed=3),
    ):
        torch.manual_seed(1)
        layer = make()
        x = torch.randn(256, 16)
        y = x @ torch.randn(16, 8)
        optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
        losses = []
        for step in range(150):
            if isinstance(layer, CompactLinear):
                layer.seed = step
            loss = (layer(x) - y).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.05 * losses[0]


def test_projected_weight_gradient_is_unbiased_and_input_gradient_exact():
    torch.manual_seed(0)
    x, w = torch.randn(40, 24, requires_grad=True), torch.randn(10, 24, requires_grad=True)
    g = torch.randn(40, 10)
    exact = g.t() @ x.detach()
    mean = torch.zeros_like(exact)
    for seed in range(600):
        x.grad = w.grad = None
        compact_linear(x, w, None, rank=6, seed=seed).backward(g)
        assert torch.equal(x.grad, g @ w.detach())
        mean += w.grad / 600
    assert relative(mean, exact) < 0.15  # one draw has an error of about 2
    with pytest.raises(ValueError, match="rank 25"):
        compact_linear(x, w, None, rank=25, seed=0)


def test_projection_is_a_function_of_the_seed():
    arguments = {"device": torch.device("cpu"), "dtype": torch.float32}
    p = sign_projection(500, 400, 5, **arguments)
    assert torch.equal(p, sign_projection(500, 400, 5, **arguments))
    assert relative(p @ p.t(), torch.eye(500)) < 1.3  # off-diagonal noise sqrt(rows / rank)
    assert torch.allclose((p @ p.t()).diagonal(), torch.ones(500))


def test_projected_input_is_all_that_is_kept():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        CompactLinear(64, 32, rank=8, seed=0)(torch.randn(100, 64))
    assert sorted(tuple(t.shape) for t in saved) == [(32, 64), (100, 8)]


def test_encoded_activations_shrink_and_gradients_stay_near():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.RMSNorm(64))
    x, target = torch.randn(100, 64), torch.randn(100, 64)
    exact = (model(x) - target).square().mean()
    exact_grads = torch.autograd.grad(exact, list(model.parameters()))
    with EncodedSaved(smallest=1000) as saved:
        loss = (model(x) - target).square().mean()
    assert torch.equal(loss, exact)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert saved.encoded_bytes < 0.4 * saved.original_bytes  # fp32 to 10 bits
    for grad, reference in zip(grads, exact_grads, strict=True):
        assert relative(grad, reference) < 0.1


def test_parameters_and_small_tensors_are_kept_as_they_are():
    w = torch.randn(100, 100, requires_grad=True)
    with EncodedSaved(smallest=1000) as saved:
        (torch.randn(2, 100) @ w).sum().backward()
        layer = nn.Linear(100, 100)  # saves a transposed view of its weight
        layer(torch.randn(2, 100, requires_grad=True)).sum().backward()
        layer.requires_grad_(False)
        layer(torch.randn(2, 100, requires_grad=True)).sum().backward()
        torch.ones(2000, dtype=torch.int64)
    assert saved.encoded_bytes == 0
