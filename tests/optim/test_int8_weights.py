"""Q-GaLore's INT8 weights: the brick's arithmetic, resuming, bytes, the Trainer, refusals."""

import io

import pytest
import torch
from torch import nn

from headrace.optim import (
    Int8Settings,
    Int8Updates,
    StepInBackward,
    adamw,
    adamw_8bit,
    attach_int8,
    galore_adamw,
    lion,
    memory,
    q_galore,
    stable_adamw,
)
from headrace.optim.adam import Adam
from headrace.optim.brick_rule import BrickRule
from headrace.optim.galore import GaLore
from headrace.optim.int8_weights import Int8Linear
from headrace.optim.projected import LazyRefresh
from headrace.optim.projector import OrthogonalProjector
from headrace.optim.spec import allocate
from headrace.optim.storage import encoding_of
from headrace.optim.torch_api import RuleOptimizer
from headrace.quant.int8_rowwise import Int8RowwiseCodec
from headrace.quant.rounding import CounterGenerator

HYPER = {"lr": 0.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SMALL = Int8Settings(rank=4, update_proj_gap=2, scale=1.0, weight_group_size=16)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(out, into, seed=0, dtype=torch.float32):
    layer = nn.Linear(into, out)
    layer.weight.data = (noise(out, into, seed=seed) / into**0.5).to(dtype)
    layer.bias.data = torch.zeros(out, dtype=dtype)
    return layer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.tall = nn.Linear(96, 32), nn.Linear(32, 96, bias=False)

    def forward(self, x):
        return self.tall(torch.tanh(self.wide(x)))


def run(net, optimizer, first, last):
    teacher = [noise(32, 96, seed=11) / 10, noise(96, 32, seed=12) / 5]
    losses = []
    for step in range(first, last):
        x = noise(64, 96, seed=100 + step)
        loss = (net(x) - torch.tanh(x @ teacher[0].T) @ teacher[1].T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24), (20, 20)])
def test_the_gradient_of_the_coordinates_is_the_projected_gradient(out, into):
    """Also over micro-batches: the first one chooses the basis of all."""
    net = nn.Sequential(linear(out, into))
    attach_int8(net, SMALL)
    layer = net[0]
    weight = nn.Parameter(layer.whole_weight())
    for i in range(3):
        x, target = noise(7, into, seed=i), noise(7, out, seed=10 + i)
        (net(x.reshape(1, 7, into)) * target).sum().backward()
        (x @ weight.T * target).sum().backward()
    basis, left = layer._basis(), layer._on_left
    expected = basis.T @ weight.grad if left else weight.grad @ basis
    torch.testing.assert_close(layer.coordinates.grad, expected, rtol=1e-4, atol=1e-4)
    # The basis is that of the first gradient: it holds almost all of it that four can.
    first = noise(7, out, seed=10).T @ noise(7, into, seed=0)
    held = (basis.T @ first if left else first @ basis).square().sum()
    assert held > 0.97 * torch.linalg.svdvals(first)[:4].square().sum()


@pytest.mark.parametrize("states", ["fp32", "int8"])
@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24)])
def test_moments_and_bases_are_those_of_the_galore_brick(out, into, states):
    """Six steps with three bases; the rate is zero, so that both see the same weight."""
    net = nn.Sequential(linear(out, into))
    attach_int8(net, SMALL)
    layer = net[0]
    layer.bias.requires_grad_(False)
    rule = BrickRule(Adam(), encoding_of(states))
    optimizer = RuleOptimizer(net, lambda info, group: rule, HYPER)
    Int8Updates(net, optimizer)

    projector = OrthogonalProjector(4, int4=True, int4_block=128)
    galore = GaLore(Adam(), projector, gap=2, lazy=LazyRefresh(0.4, 5, 2.0), scale=1.0)
    dense = BrickRule(galore, encoding_of(states))
    weight = layer.whole_weight()
    kept = allocate(dense.state_spec((out, into), torch.float32), "cpu")
    dense.init_states(weight, kept)
    for step in range(1, 7):
        x, target = noise(9, into, seed=step), noise(9, out, seed=50 + step)
        (net(x) * target).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        gradient = target.T @ x
        # Both bases start from noise of the layer's own seed.
        dense.update(
            weight.clone(), gradient, kept, step=step, hyper=optimizer.param_groups[0],
            seed=layer._seed, element_offset=0,
        )  # fmt: skip
    assert int(layer.steps) == 6
    mine = layer.projection()
    assert int(mine["refreshes"]) == int(kept["refreshes"]) == 2
    for name in ("projector.codes", "refresh_gap", "refresh_at"):
        assert torch.equal(mine[name], kept[name]), name
    # At a change of basis encoded moments are rounded once more than the brick's.
    slots = Adam().init_spec(tuple(layer.coordinates.shape))
    allowed = 1e-4 if states == "fp32" else 0.03
    for moment, value in encoding_of(states).decode(slots, kept).items():
        own = encoding_of(states).decode(slots, optimizer.state[layer.coordinates])[moment]
        assert (own - value).norm() < allowed * value.norm(), moment


def test_a_step_is_the_bricks_rounded_without_bias():
    rate, decay, mean, trials = 0.05, 0.1, 0.0, 200
    for trial in range(trials):
        net = nn.Sequential(linear(24, 40))
        attach_int8(net, SMALL)
        layer, start = net[0], net[0].whole_weight()
        optimizer = adamw(net, lr=rate, weight_decay=decay, seed=trial)
        Int8Updates(net, optimizer)
        (net(noise(9, 40, seed=1)) * noise(9, 24, seed=2)).sum().backward()
        gradient = layer.coordinates.grad.clone()
        optimizer.step()
        after = layer.whole_weight()
        mean = mean + after / trials
        assert not layer.coordinates.any()
    # Adam's first step is a sign, for all that is not tiny.
    lifted = layer._basis() @ (gradient / (gradient.abs() + 1e-8))
    exact = start * (1 - rate * decay) - rate * lifted
    step = layer.encoded_parts("weight")["scale"].repeat_interleave(16, dim=1)[:, :40]
    assert ((after - exact).abs() <= 1.001 * step).all()
    assert ((mean - exact).abs() < 0.25 * step).all()
    assert ((mean - exact) / step).mean().abs() < 0.005
    # Rounding to nearest would lose most steps of such a size.
    assert (rate * lifted).abs().median() < step.median() * 50


def test_training_learns_what_rounding_to_nearest_cannot():
    last = {}
    for kept in ("int8", "fp32"):
        net, common = Net(), {"lr": 1e-2, "weight_decay": 0.0}
        if kept == "int8":
            attach_int8(net, Int8Settings(rank=8, update_proj_gap=10, scale=1.0))
            optimizer = adamw_8bit(net, **common)
            Int8Updates(net, optimizer)
        else:
            optimizer = q_galore(net, rank=8, update_proj_gap=10, scale=1.0, **common)
        losses = run(net, optimizer, 0, 200)
        last[kept] = sum(losses[-10:])
        assert last[kept] < 0.4 * sum(losses[:10])
    assert last["int8"] < 1.05 * last["fp32"]
    # Steps much smaller than a code's width still add up.
    slow, codec = Net(), Int8RowwiseCodec(block_size=256)
    attach_int8(slow, Int8Settings(rank=8, update_proj_gap=10, scale=1.0))
    optimizer = lion(slow, lr=2e-5)
    Int8Updates(slow, optimizer)
    before = slow.wide.whole_weight()
    losses = run(slow, optimizer, 0, 40)
    moved = slow.wide.whole_weight() - before
    assert moved.abs().sum() > 0
    nearest = codec.decode(codec.encode(before + 2e-5), tuple(before.shape)) - before
    assert nearest.norm() < 0.2 * moved.norm()
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_saved_run_resumes_bit_exactly(at):
    def fresh():
        net = Net()
        attach_int8(net, SMALL)
        optimizer = adamw_8bit(net, lr=1e-2)
        Int8Updates(net, optimizer)
        return net, optimizer

    straight, optimizer = fresh()
    run(straight, optimizer, 0, at)
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    run(straight, optimizer, at, 9)
    resumed, second = fresh()
    weights, states = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    second.load_state_dict(states)
    run(resumed, second, at, 9)
    for (name, a), b in zip(
        straight.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert int(straight.wide.refreshes) > 1


def test_bytes_are_those_that_were_promised():
    net = nn.Sequential(nn.Linear(512, 256, bias=False), nn.Tanh(), nn.Linear(256, 512)).bfloat16()
    settings = Int8Settings(rank=16)
    promised = settings.memory(net)
    attach_int8(net, settings)
    layers = [m for m in net.modules() if isinstance(m, Int8Linear)]
    parts = [p for layer in layers for n, p in layer.named_parameters() if n.startswith("weight_")]
    assert promised["weights"] == sum(p.nbytes for p in parts)
    assert promised["weights"] / (2 * 512 * 256) < 1.02
    assert promised["coordinates"] == sum(layer.coordinates.nbytes for layer in layers)
    states = [one for layer in layers for one in layer.projection().values()]
    assert promised["projection"] == sum(one.nbytes for one in states)
    assert promised["total"] < 0.6 * 2 * 2 * 512 * 256 + promised["coordinates"]
    # Nothing of the layers' weights is in 16 bits, and moments are those of the coordinates.
    assert not [p for p in net.parameters() if p.dtype == torch.bfloat16 and p.ndim == 2]
    predicted = memory(net, adamw_8bit)
    optimizer = adamw_8bit(net)
    Int8Updates(net, optimizer)
    net(noise(4, 512).bfloat16()).float().sum().backward()
    assert {tuple(p.grad.shape) for p in net.parameters() if p.grad is not None} == {
        (16, 512), (512, 16), (512,),
    }  # fmt: skip
    optimizer.step()
    held = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert held == predicted["total"]


def test_casts_and_autocast_leave_what_training_relies_on():
    net = nn.Sequential(linear(32, 48))
    attach_int8(net, SMALL)
    layer, codes = net[0], net[0].encoded_parts("weight")["codes"].clone()
    optimizer = adamw(net, lr=1e-2)
    Int8Updates(net, optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(noise(5, 48))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    optimizer.step()
    assert not torch.equal(codes, layer.encoded_parts("weight")["codes"])
    before = {k: v.clone() for k, v in layer.projection().items()}
    net.to(torch.bfloat16)
    assert layer.coordinates.dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in layer.projection().items())
    assert net(noise(5, 48).bfloat16()).dtype == torch.bfloat16
    with torch.no_grad():
        assert not net(noise(5, 48).bfloat16()).requires_grad


def test_steps_that_are_not_finite_change_nothing():
    net = Net()
    attach_int8(net, SMALL)
    optimizer = adamw_8bit(net, lr=1e-2)
    Int8Updates(net, optimizer)
    for bad in (True, False, True):
        before = net.wide.whole_weight()
        (net(noise(4, 96)) * (torch.inf if bad else 1.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(net.wide.whole_weight(), before) == bad
        assert torch.isfinite(net.wide.whole_weight()).all()
    assert int(net.wide.steps) == 1 and optimizer.skipped_steps == 2
    run(net, optimizer, 0, 3)
    assert int(net.wide.steps) == 4


def test_what_cannot_work_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no INT8 layers"):
        Int8Updates(Net(), adamw(Net()))
    with pytest.raises(ValueError, match="no trainable linear layer"):
        attach_int8(nn.Embedding(3, 2))
    net = Net()
    early = adamw(net)
    attach_int8(net, SMALL)
    with pytest.raises(ValueError, match="not in this optimizer"):
        Int8Updates(net, early)
    for recipe in (stable_adamw, galore_adamw):
        with pytest.raises(ValueError, match="looks beyond single elements"):
            Int8Updates(net, recipe(net))
    optimizer = adamw(net)
    Int8Updates(net, optimizer)
    with StepInBackward(optimizer), pytest.raises(ValueError, match="inside backward"):
        net(noise(2, 96)).sum().backward()
        optimizer.step()
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 ranks"):
        Int8Updates(net, adamw(net))


def test_a_streamed_model_is_refused(example_folder):
    import headrace

    model = headrace.load("model-folder", train="all", store="host", device="cpu")
    with pytest.raises(ValueError, match="streams its weights"):
        attach_int8(model)
    model.close()


def test_noise_depends_on_seed_name_and_step_only():
    kept = []
    for seed in (0, 0, 1):
        net = Net()
        attach_int8(net, SMALL)
        optimizer = adamw_8bit(net, lr=1e-2, seed=seed)
        Int8Updates(net, optimizer)
        run(net, optimizer, 0, 2)
        kept.append(net.wide.whole_weight())
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    generator = CounterGenerator(3)
    codec = Int8RowwiseCodec(block_size=16)
    x = noise(4, 40)
    assert torch.equal(
        codec.encode(x, generator=generator)["codes"], codec.encode(x, generator=generator)["codes"]
    )
