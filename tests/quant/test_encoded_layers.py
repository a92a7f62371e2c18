"""Layers over encoded weights: same bits as decoded ones, nothing decoded kept, PEFT on top."""

import copy
import gc

import pytest
import torch
from torch import nn

from headrace.quant import codec_for_format
from headrace.quant.encoded import EncodedTensor
from headrace.quant.linear import EncodedLinear, encode_parameters
from headrace.quant.nf4 import Nf4Codec

FORMATS = ["nf4", "int8", "int4", "fp8", "mxfp4", "mxfp8", "nvfp4", "fp4"]


def resident_twin(encoded):
    """An ordinary linear layer that holds the decoded weight."""
    twin = nn.Linear(encoded.in_features, encoded.out_features, bias=encoded.bias is not None)
    twin = twin.to(encoded.weight.dtype)
    with torch.no_grad():
        twin.weight.copy_(encoded.weight.decode())
        if encoded.bias is not None:
            twin.bias.copy_(encoded.bias)
    twin.weight.requires_grad_(False)
    return twin


def run(layer, x, autocast=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    bias_grad = None if layer.bias is None else layer.bias.grad.clone()
    return y.detach(), x.grad, bias_grad


@pytest.mark.parametrize("word", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_has_the_bits_of_the_resident_layer(word, bias, lead, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).to(dtype)
    encoded = EncodedLinear.from_linear(linear, codec_for_format(word))
    twin = resident_twin(encoded)
    x = torch.randn(*lead, 96, dtype=dtype)
    for ours, theirs in zip(run(encoded, x), run(twin, x), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_the_bits_of_the_resident_layer(autocast):
    encoded = EncodedLinear.from_linear(nn.Linear(96, 40), Nf4Codec())
    twin = resident_twin(encoded)
    x = torch.randn(3, 96)
    for ours, theirs in zip(run(encoded, x, autocast), run(twin, x, autocast), strict=True):
        assert torch.equal(ours, theirs)


def live_floats(minimum):
    gc.collect()
    return [
        t
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, nn.Parameter)
        and t.is_floating_point()
        and t.numel() >= minimum
    ]


def test_nothing_decoded_survives_between_forward_and_backward():
    encoded = EncodedLinear.from_linear(nn.Linear(256, 512), Nf4Codec())
    before = len(live_floats(256 * 512))
    x = torch.randn(2, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = encoded(x)
    assert len(live_floats(256 * 512)) == before
    big = [t for t in saved if t.numel() >= 256 * 512]
    assert big
    assert all(isinstance(t, EncodedTensor) for t in big)
    y.sum().backward()
    assert torch.allclose(x.grad, encoded.weight.decode().sum(0).expand(2, -1), atol=1e-5)


def test_parts_may_move_between_uses():
    encoded = EncodedLinear.from_linear(nn.Linear(64, 64), Nf4Codec())
    names = [name for name, _ in encoded.named_parameters() if name.startswith("weight_")]
    assert names == [
        "weight_codes",
        "weight_absmax",
        "weight_nested_absmax",
        "weight_nested_offset",
    ]
    x = torch.randn(3, 64)
    expected = encoded(x)
    away = {name: getattr(encoded, name).data.clone() for name in names}
    for name in names:  # what an engine does on eviction: every bit set reads as NaN
        parameter = getattr(encoded, name)
        all_ones = torch.full((parameter.element_size(),), 255, dtype=torch.uint8)
        parameter.data = all_ones.view(parameter.dtype)[0].expand(parameter.shape).contiguous()
    assert encoded(x).isnan().all(), "a missing weight must never give a number"
    y = None
    for name in names:
        getattr(encoded, name).data = away[name]
    y = encoded(x.requires_grad_())
    assert torch.equal(y, expected)
    for name in names:  # other memory between forward and backward
        getattr(encoded, name).data = away[name].clone()
    y.sum().backward()
    assert torch.allclose(x.grad, encoded.weight.decode().sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize("word", FORMATS)
def test_all_ones_placeholder_is_nan_in_every_format(word):
    codec = codec_for_format(word)
    parts = {
        name: torch.full((spec.nbytes,), 255, dtype=torch.uint8).view(spec.dtype).view(spec.shape)
        for name, spec in codec.spec((8, 64)).items()
    }
    assert codec.decode(parts, (8, 64)).isnan().all()


def test_casting_the_module_changes_what_it_decodes_to_and_no_part():
    encoded = EncodedLinear.from_linear(nn.Linear(64, 32), Nf4Codec())
    before = {name: part.clone() for name, part in encoded.encoded_parts("weight").items()}
    encoded.to(torch.bfloat16)
    assert encoded.weight.dtype == torch.bfloat16
    assert encoded.bias.dtype == torch.bfloat16
    after = encoded.encoded_parts("weight")
    assert all(torch.equal(after[name], part) for name, part in before.items())
    assert all(after[name].dtype == part.dtype for name, part in before.items())
    assert encoded(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_writing_to_an_encoded_weight_is_refused():
    encoded = EncodedLinear.from_linear(nn.Linear(64, 32), Nf4Codec())
    delta = torch.ones(32, 64)
    with pytest.raises(ValueError, match=r"EncodedLinear\.weight.*nf4"):
        encoded.weight.data += delta
    with pytest.raises(ValueError, match=r"EncodedLinear\.weight"):
        encoded.weight.data = delta
    with pytest.raises(ValueError, match=r"EncodedLinear\.weight"):
        encoded.weight.add_(delta)
    with pytest.raises(ValueError, match=r"EncodedLinear\.weight"):
        nn.init.zeros_(encoded.weight)
    with pytest.raises(ValueError, match=r"EncodedLinear\.weight"):
        torch.add(delta, delta, out=encoded.weight)
    with pytest.raises((KeyError, AttributeError)):
        encoded.weight = nn.Parameter(delta)


def test_state_dict_holds_the_parts_and_loads_back():
    encoded = EncodedLinear.from_linear(nn.Linear(64, 32), Nf4Codec())
    other = EncodedLinear.empty(
        64, 32, codec=Nf4Codec(), dtype=torch.float32, bias=True, device=torch.device("cpu")
    )
    other.load_state_dict(encoded.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(other(x), encoded(x))
    assert torch.equal(copy.deepcopy(encoded)(x), encoded(x))
    meta = EncodedLinear.empty(
        64, 32, codec=Nf4Codec(), dtype=torch.bfloat16, bias=False, device=torch.device("meta")
    )
    assert tuple(meta.weight.shape) == (32, 64)
    assert meta.weight.is_meta


class Experts(nn.Module):
    """A fused stack of experts as transformers writes them."""

    def __init__(self, experts, hidden, inner):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * 0.1)

    def forward(self, x, choice):
        out = torch.zeros_like(x)
        for expert in choice.unique():
            rows = torch.where(choice == expert)[0]
            gate, up = nn.functional.linear(x[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[expert])
            out = out.index_add(0, rows, y)
        return out


@pytest.mark.parametrize("word", FORMATS)
@pytest.mark.parametrize("sizes", [(4, 64, 96), (3, 20, 7)], ids=str)
def test_experts_decode_one_at_a_time_with_the_same_bits(word, sizes):
    torch.manual_seed(1)
    experts = Experts(*sizes)
    codec = codec_for_format(word)
    twin = copy.deepcopy(experts)
    encode_parameters(experts, {"gate_up_proj": codec, "down_proj": codec})
    assert isinstance(experts, Experts)
    assert isinstance(experts.gate_up_proj[1], EncodedTensor)
    assert not any(p.requires_grad for p in experts.parameters())
    for name in ("gate_up_proj", "down_proj"):
        twin._parameters[name].data = getattr(experts, name).decode()
        twin._parameters[name].requires_grad_(False)
    choice = torch.tensor([0, 2, 0, 1, 2])
    results = []
    for module in (experts, twin):
        x = torch.randn(5, sizes[1], generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = module(x, choice)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_slices_and_transposes_stay_encoded_and_agree():
    experts = Experts(4, 32, 16)
    encode_parameters(experts, {"gate_up_proj": Nf4Codec()})
    encoded, plain = experts.gate_up_proj, experts.gate_up_proj.decode()
    for view in (
        lambda t: t[1],
        lambda t: t[-1].t(),
        lambda t: t[1:3],
        lambda t: t[1:3][1],
        lambda t: t.transpose(-2, -1),
        lambda t: t.transpose(1, 2)[2],
        lambda t: t.to(torch.bfloat16)[0],
        lambda t: t.detach(),
    ):
        ours = view(encoded)
        assert isinstance(ours, EncodedTensor)
        assert ours.stride() == view(plain).stride()
        assert torch.equal(ours.decode(), view(plain))
    for plainly in (lambda t: t.sum(), lambda t: t[:, 3], lambda t: t + 1, lambda t: t[[0, 2]]):
        assert torch.equal(plainly(encoded), plainly(plain))
    with pytest.raises(IndexError, match="4 is out of"):
        encoded[4]
    with pytest.raises(IndexError, match="4 is out of"):
        encoded.select(0, 4)
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        encode_parameters(experts, {"nothing": Nf4Codec()})


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def encode_linears(model, codec):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, EncodedLinear.from_linear(child, codec))
    return model


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
def test_peft_adapters_train_on_encoded_layers_as_on_decoded_ones(variant):
    from peft import LoraConfig, get_peft_model

    losses = []
    for resident in (False, True):
        model = encode_linears(tiny_llama(), Nf4Codec())
        if resident:
            for module in list(model.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, EncodedLinear):
                        setattr(module, name, resident_twin(child))
        torch.manual_seed(7)
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            use_dora=variant == "dora",
            use_rslora=variant == "rslora",
        )
        wrapped = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
        tokens = torch.arange(24).view(2, 12)
        run_losses = []
        for _ in range(3):
            loss = wrapped(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run_losses.append(loss.item())
        losses.append(run_losses)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_merging_into_an_encoded_layer_is_refused_not_lost():
    from peft import LoraConfig, get_peft_model

    model = encode_linears(tiny_llama(), Nf4Codec())
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"EncodedLinear\.weight.*frozen"):
            wrapped.merge_adapter(safe_merge=safe)


def test_mixtral_experts_are_encoded_whatever_implementation_runs_them():
    from transformers import MixtralConfig, MixtralForCausalLM

    for implementation in ("eager", "grouped_mm", "batched_mm"):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            experts_implementation=implementation,
        )
        model = MixtralForCausalLM(config).to(torch.bfloat16)
        twin = copy.deepcopy(model)
        experts = model.model.layers[0].mlp.experts
        encode_parameters(experts, {"gate_up_proj": Nf4Codec(), "down_proj": Nf4Codec()})
        assert experts.gate_up_proj_codes.numel() * 2 == experts.gate_up_proj.numel()
        with torch.no_grad():
            for name in ("gate_up_proj", "down_proj"):
                getattr(twin.model.layers[0].mlp.experts, name).copy_(
                    getattr(experts, name).decode()
                )
        tokens = torch.arange(20).view(2, 10)
        results = []
        for each in (model, twin):
            loss = each(input_ids=tokens, labels=tokens).loss
            loss.backward()
            results.append((loss.item(), each.model.embed_tokens.weight.grad.clone()))
        assert results[0][0] == results[1][0], implementation
        assert torch.equal(results[0][1], results[1][1]), implementation
