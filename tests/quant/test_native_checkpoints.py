"""Low-bit checkpoints of others, taken as they are: decoded values against plain references."""

import pytest
import torch
from torch import nn

from headrace.quant import CounterGenerator, codec_from_parameters
from headrace.quant.gptq_packed import GptqPackedCodec
from headrace.quant.linear import attach_encoded
from headrace.quant.mxfp4 import Mxfp4Codec
from headrace.quant.native import (
    fp8_from_checkpoint,
    gptq_from_checkpoint,
    mxfp4_from_blocks,
    nvfp4_from_checkpoint,
)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_bytes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def nibbles(packed):
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()


def test_gpt_oss_blocks():
    blocks, scales = random_bytes(3, 8, 2, 16), 110 + random_bytes(3, 8, 2) % 20
    codec, parts, shape = mxfp4_from_blocks(blocks, scales)
    assert shape == (3, 8, 64)
    assert parts["codes"].data_ptr() == blocks.data_ptr(), "no copy"
    expected = torch.ldexp(E2M1[nibbles(blocks)], scales.int()[..., None] - 127).flatten(-2)
    assert torch.equal(codec.decode(parts, shape), expected)
    with pytest.raises(ValueError, match="do not fit"):
        mxfp4_from_blocks(blocks, scales[:2])
    with pytest.raises(ValueError, match="uint8"):
        mxfp4_from_blocks(blocks.int(), scales)


def test_gpt_oss_experts_run_from_the_shipped_bytes():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=64, intermediate_size=32, num_local_experts=4, num_hidden_layers=1
    )
    torch.manual_seed(0)
    encoded, plain = GptOssExperts(config), GptOssExperts(config)
    for parameter in (*encoded.parameters(), *plain.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    codec = Mxfp4Codec()
    for name in ("gate_up_proj", "down_proj"):
        shipped = getattr(encoded, name).detach().transpose(1, 2).contiguous()
        parts, shape = codec.encode(shipped), tuple(shipped.shape)
        with pytest.raises(ValueError, match=name):
            attach_encoded(encoded, name, parts, codec=codec, shape=(4, 3, 32), transposed=True)
        attach_encoded(encoded, name, parts, codec=codec, shape=shape, transposed=True)
        with torch.no_grad():
            getattr(plain, name).copy_(codec.decode(parts, shape).transpose(1, 2))
    x = torch.randn(1, 6, 64)
    chosen = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3], [3, 1], [2, 0]])
    weights = torch.rand(6, 2)
    out = encoded(x.view(-1, 64), chosen, weights)
    assert torch.allclose(out, plain(x.view(-1, 64), chosen, weights), atol=1e-6)


def test_nvfp4_weights():
    weight = random_bytes(8, 16)
    scale = torch.rand(8, 2).mul(10).to(torch.float8_e4m3fn)
    codec, parts, shape = nvfp4_from_checkpoint(weight, scale, torch.tensor([0.01]))
    values = E2M1[nibbles(weight)].view(8, 2, 16)
    expected = values * (torch.tensor(0.01) * scale.float())[..., None]
    assert torch.equal(codec.decode(parts, shape), expected.view(8, 32))
    with pytest.raises(ValueError, match="scale"):
        nvfp4_from_checkpoint(weight, scale[:, :1], torch.tensor([0.01]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_weights_with_every_kind_of_scale(dtype):
    weight = torch.randn(200, 300).to(dtype)
    expand = {
        (): lambda s: s,
        (200,): lambda s: s[:, None],
        (200, 1): lambda s: s,
        (2, 3): lambda s: s.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300],
    }
    for scale_shape, widen in expand.items():
        scale = torch.rand(scale_shape) + 0.5
        codec, parts, shape = fp8_from_checkpoint(weight, scale)
        assert torch.equal(codec.decode(parts, shape), weight.float() * widen(scale))
        assert parts["codes"].data_ptr() == weight.data_ptr()
    with pytest.raises(ValueError, match="no square blocks"):
        fp8_from_checkpoint(weight, torch.rand(7, 5))
    with pytest.raises(ValueError, match="float8"):
        fp8_from_checkpoint(weight.float(), torch.rand(()))


def reference_gptq(qweight, qzeros, scales, g_idx):
    """Unpack with Python integers."""
    rows, cols = qweight.shape[1], qweight.shape[0] * 8
    out = torch.empty(rows, cols)
    for o in range(rows):
        for i in range(cols):
            q = int(qweight[i // 8, o]) >> 4 * (i % 8) & 15
            g = int(g_idx[i])
            zero = (int(qzeros[g, o // 8]) >> 4 * (o % 8) & 15) + 1
            out[o, i] = (q - zero) * scales[g, o].float()
    return out


def test_gptq_layers_in_activation_order():
    generator = torch.Generator().manual_seed(0)
    words = {"low": -(2**31), "high": 2**31, "generator": generator, "dtype": torch.int32}
    qweight, qzeros = torch.randint(size=(4, 16), **words), torch.randint(size=(2, 2), **words)
    scales = torch.rand(2, 16, generator=generator).half()
    g_idx = torch.randperm(32, generator=generator).div(16, rounding_mode="floor").int()
    codec, parts, shape = gptq_from_checkpoint(qweight, qzeros, scales, g_idx)
    assert (codec.block_size, shape) == (16, (16, 32))
    expected = reference_gptq(qweight, qzeros, scales, g_idx)
    assert torch.equal(codec.decode(parts, shape), expected)
    assert torch.equal(codec.decode_range(parts, shape, 256, 512), expected.view(-1)[256:])
    with pytest.raises(ValueError, match="groups outside"):
        gptq_from_checkpoint(qweight, qzeros, scales, g_idx + 1)
    with pytest.raises(ValueError, match="qzeros"):
        gptq_from_checkpoint(qweight, qzeros[:, :1], scales, g_idx)


def test_gptq_layout_keeps_the_codec_contract():
    codec = GptqPackedCodec(block_size=32)
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    for stochastic in (False, True):
        parts = codec.encode(x, generator=CounterGenerator(1) if stochastic else None)
        codec.check_parts(parts, (24, 64))
        error = (codec.decode(parts, (24, 64)) - x).abs()
        assert bool((error <= codec.max_error(x, stochastic=stochastic)).all())
    assert torch.equal(codec.decode(codec.encode(x * 0), (24, 64)), x * 0)
    x[3, 5] = torch.nan
    decoded = codec.decode(codec.encode(x), (24, 64))
    assert decoded[3, :32].isnan().all()
    assert decoded.isnan().sum() == 32
    assert codec_from_parameters(codec.parameters()) == codec
    with pytest.raises(ValueError, match=r"\(24, 65\)"):
        codec.spec((24, 65))
