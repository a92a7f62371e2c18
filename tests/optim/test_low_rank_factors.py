"""Factors beside the weights: LoQT's merges into encoded weights, and refactorisation."""

import io

import pytest
import torch
from torch import nn

from headrace.optim import adamw, adamw_8bit
from headrace.optim.factors import Refactorization, lora_pairs, rebalanced
from headrace.optim.loqt import LoqtLinear, LoqtMerges, attach_loqt, detach_loqt
from headrace.quant.nf4 import Nf4Codec


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.tall = nn.Linear(96, 32), nn.Linear(32, 96, bias=False)

    def forward(self, x):
        return self.tall(torch.tanh(self.wide(x)))


def run(net, optimizer, steps, start=0):
    # A student of a network that another seed drew: the gradients have full rank.
    torch.manual_seed(5)
    first, second = noise(32, 96, seed=11) / 10, noise(96, 32, seed=12) / 5
    losses = []
    for step in range(start, start + steps):
        x = noise(64, 96, seed=100 + step)
        loss = (net(x) - torch.tanh(x @ first.T) @ second.T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_loqt_trains_beyond_the_rank_of_its_factors():
    """Merging makes up a full-rank update; without merges rank 2 is all there is."""
    final = {}
    for gap in (20, 10_000):
        net = Net()
        before = net.wide.weight.detach().clone()
        assert attach_loqt(net, rank=2, scale=1.0) == ["wide", "tall"]
        assert net.wide.factor.shape == (2, 96)
        assert net.tall.factor.shape == (96, 2)
        optimizer = adamw_8bit(net, lr=1e-2, weight_decay=0.0)
        LoqtMerges(net, optimizer, gap=gap)
        losses = run(net, optimizer, 300)
        final[gap] = sum(losses[-20:]) / 20
        assert torch.isfinite(net.wide.whole_weight()).all()
        assert not torch.equal(net.wide.whole_weight(), before)
    assert final[20] < 0.8 * final[10_000]


def test_a_merge_keeps_the_function_better_than_rounding_alone():
    net = Net()
    attach_loqt(net, rank=8, scale=0.5)
    layer = net.wide
    optimizer = adamw(net, lr=1e-2)
    merges = LoqtMerges(net, optimizer, gap=1000)
    run(net, optimizer, 10)
    merges.close()
    weight = layer.whole_weight()
    codec = Nf4Codec()
    rounded = codec.decode(codec.encode(weight), tuple(weight.shape))
    layer.watch()
    layer.see(noise(32, 96, seed=3))
    layer.merge(5)
    assert (layer.whole_weight() - weight).norm() < 0.95 * (rounded - weight).norm()
    assert layer.progress.tolist() == [0, 2]


def test_loqt_resumes_bit_exactly_across_merges():
    def fresh():
        net = Net()
        attach_loqt(net, rank=4)
        optimizer = adamw_8bit(net, lr=1e-2)
        LoqtMerges(net, optimizer, gap=3, growth=1.5)
        return net, optimizer

    straight, optimizer = fresh()
    run(straight, optimizer, 7)
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    run(straight, optimizer, 9, start=7)
    file.seek(0)
    resumed, second = fresh()
    weights, states = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    second.load_state_dict(states)
    run(resumed, second, 9, start=7)
    for (name, a), b in zip(
        straight.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert int(straight.wide.progress[1]) == 3


def test_loqt_weights_cost_half_a_byte_and_come_back_as_ordinary_layers():
    net = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Tanh())
    attach_loqt(net, rank=8)
    held = sum(p.nbytes for name, p in net.named_parameters() if "weight_" in name)
    assert held / 512**2 < 0.53
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["0.factor"]
    layer = net[0]
    layer.watch()
    layer.see(noise(512, 512))
    layer.merge(2)
    x = noise(3, 512, seed=1)
    before = net(x)
    weight = layer.whole_weight()
    detach_loqt(net)
    assert type(net[0]) is nn.Linear
    assert torch.equal(net[0].weight, weight)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)


def test_gradients_that_are_not_finite_postpone_a_merge():
    net = Net()
    attach_loqt(net, rank=4)
    optimizer = adamw(net, lr=1e-2)
    LoqtMerges(net, optimizer)
    (net(noise(4, 96)) * torch.inf).sum().backward()
    optimizer.step()
    assert int(net.wide.progress[1]) == 0
    optimizer.zero_grad()
    net(noise(4, 96)).sum().backward()
    optimizer.step()
    assert int(net.wide.progress[1]) == 1


def test_loqt_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="no LoQT layers"):
        LoqtMerges(Net(), adamw(Net()))
    with pytest.raises(ValueError, match="no trainable linear layer"):
        attach_loqt(nn.Embedding(3, 2))
    net = Net()
    attach_loqt(net, rank=2)
    with pytest.raises(ValueError, match="gap=0"):
        LoqtMerges(net, adamw(net), gap=0)
    assert isinstance(net.wide, LoqtLinear)


@pytest.mark.parametrize("shape", [(12, 3, 20), (3, 8, 20), (20, 8, 3), (5, 5, 5)])
def test_rebalanced_factors_have_the_same_product_and_equal_singular_values(shape):
    rows, rank, cols = shape
    up, down = noise(rows, rank) * 30, noise(rank, cols, seed=1) / 30
    new_up, new_down = rebalanced(up, down)
    assert new_up.shape == up.shape
    assert new_down.shape == down.shape
    torch.testing.assert_close(new_up @ new_down, up @ down, rtol=1e-4, atol=1e-4)
    count = min(shape)
    sizes = [torch.linalg.svdvals(x)[:count] for x in (new_up, new_down)]
    torch.testing.assert_close(*sizes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_refactorization_of_lora_layers_resumes_and_forgets_moments(master):
    from peft import LoraConfig, get_peft_model

    def fresh():
        torch.manual_seed(1)
        net = Net().bfloat16()
        model = get_peft_model(net, LoraConfig(r=4, target_modules=["wide", "tall"]))
        optimizer = adamw(model, lr=1e-2, master=master)
        Refactorization(optimizer, lora_pairs(model), every=3)
        return model, optimizer

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            model(noise(8, 96, seed=step).bfloat16()).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = fresh()
    assert len(lora_pairs(model)) == 2
    steps(model, optimizer, 0, 2)
    ages = {int(s["step"]) for s in optimizer.state.values()}
    assert ages == {2}
    saved = [model.state_dict(), optimizer.state_dict()]
    file = io.BytesIO()
    torch.save(saved, file)
    steps(model, optimizer, 2, 3)
    assert not optimizer.state
    for up, down in lora_pairs(model):
        sizes = [torch.linalg.svdvals(x.detach().float()) for x in (up, down)]
        torch.testing.assert_close(*sizes, rtol=0.05, atol=0.02)
    steps(model, optimizer, 3, 8)
    file.seek(0)
    other, second = fresh()
    weights, states = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    second.load_state_dict(states)
    steps(other, second, 2, 8)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_refactorization_needs_pairs():
    net = Net()
    with pytest.raises(ValueError, match="no pairs"):
        Refactorization(adamw(net), lora_pairs(net))
    with pytest.raises(ValueError, match="have no product"):
        rebalanced(noise(3, 2), noise(3, 2))
