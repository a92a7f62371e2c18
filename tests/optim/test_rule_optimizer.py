"""The torch.optim face: groups, skipping, clipping, saving, schedulers, streamed hosts."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from headrace.optim import adamw, memory


def parameter(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_shapes_threads_and_layouts_agree(dtype, monkeypatch):
    from headrace.optim import torch_api

    monkeypatch.setattr(torch_api, "TILE_ELEMENTS", 64)
    shapes = [(), (1,), (0, 3), (17, 13), (129,), (2, 3, 5)]

    def run(threads, layout):
        parameters = [parameter(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
        if layout == "transposed":
            parameters[3] = nn.Parameter(parameters[3].detach().t().contiguous().t())
        optimizer = adamw(parameters, lr=0.01, threads=threads, master="sr")
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step()
        return parameters

    base = run(1, "plain")
    for other in (run(3, "plain"), run(2, "transposed")):
        for a, b in zip(base, other, strict=True):
            assert torch.equal(a, b)
    transposed = run(2, "transposed")[3]
    assert not transposed.is_contiguous()


def test_none_gradients_are_left_alone_and_count_no_step():
    a, b = parameter(4), parameter(4)
    before = b.detach().clone()
    optimizer = adamw([a, b], weight_decay=0.5)
    give_gradients([a], 0)
    optimizer.step()
    assert torch.equal(b, before)
    assert b not in optimizer.state
    give_gradients([a, b], 1)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [2, 1]


def test_frozen_parameters_of_a_model_are_left_out():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    optimizer = adamw(model)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    with pytest.raises(ValueError, match="not in this optimizer"):
        optimizer.rule_for(model.bias)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_with_bad_gradients_is_skipped_whole(bad, max_grad_norm):
    a, b = parameter(4), parameter(4)
    optimizer = adamw([a, b], max_grad_norm=max_grad_norm)
    give_gradients([a, b], 0)
    optimizer.step()
    kept = [p.detach().clone() for p in (a, b)]
    give_gradients([a, b], 1)
    b.grad[2] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, k) for p, k in zip((a, b), kept, strict=True))
    assert int(optimizer.state[a]["step"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_is_torchs_own(dtype):
    mine = [parameter(5, 3, dtype=dtype), parameter(7, dtype=dtype, seed=1)]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    clipped = adamw(mine, max_grad_norm=0.5)
    plain = adamw(theirs)
    for step in range(3):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        clipped.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        plain.step()
        assert clipped.last_grad_norm == pytest.approx(float(norm))
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


def test_groups_have_their_own_rates_and_schedulers_act_on_them():
    a, b = parameter(4), parameter(4)
    frozen = b.detach().clone()
    optimizer = adamw([{"params": a, "lr": 0.1}, {"params": [b], "lr": 0.0, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    give_gradients([a, b], 0)
    optimizer.step()
    schedule.step()
    assert torch.equal(b, frozen)
    assert optimizer.hyper_for(a)["lr"] == pytest.approx(0.05)
    optimizer.add_param_group({"params": [parameter(2)], "betas": (0.5, 0.5)})
    assert optimizer.param_name(optimizer.param_groups[2]["params"][0]) == "2.0"


def test_closures_run_with_gradients():
    a = parameter(3)
    optimizer = adamw([a], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = a.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first


@pytest.mark.parametrize("master", ["fp32", "split", "sr"])
def test_save_load_continue_is_bit_exact(master):
    def fresh():
        return [parameter(6, 5, dtype=torch.bfloat16), parameter(3, seed=2)]

    straight = fresh()
    optimizer = adamw(straight, lr=0.05, master=master, seed=3)
    resumed, second = fresh(), None
    for step in range(6):
        if step == 3:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            for target, source in zip(resumed, straight, strict=True):
                target.data.copy_(source)
            second = adamw(resumed, lr=0.7, master=master)
            second.load_state_dict(torch.load(buffer, weights_only=True))
        give_gradients(straight, step)
        optimizer.step()
        if second is not None:
            give_gradients(resumed, step)
            second.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert second.state[resumed[0]]["exp_avg"].dtype == torch.float32


def test_a_fresh_optimizer_survives_a_round_trip():
    a = parameter(3, dtype=torch.bfloat16)
    optimizer = adamw([a])
    optimizer.load_state_dict(optimizer.state_dict())
    give_gradients([a], 0)
    optimizer.step()


def test_states_interchange_with_torch_adamw():
    ours, theirs = parameter(6), parameter(6)
    reference = torch.optim.AdamW([theirs], lr=0.01)
    for step in range(3):
        give_gradients([theirs], step)
        reference.step()
    ours.data.copy_(theirs)
    optimizer = adamw([ours], lr=0.01)
    optimizer.load_state_dict(reference.state_dict())
    back = torch.optim.AdamW([nn.Parameter(theirs.detach().clone())], lr=0.01)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients([ours, theirs], 9)
    theirs.grad = ours.grad.clone()
    optimizer.step()
    reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    other = back.param_groups[0]["params"][0]
    other.grad = ours.grad.clone()
    back.step()
    torch.testing.assert_close(other, theirs, rtol=1e-6, atol=1e-6)


def test_a_foreign_state_is_refused_by_name():
    a = parameter(3)
    sgd = torch.optim.SGD([a], momentum=0.9)
    give_gradients([a], 0)
    sgd.step()
    with pytest.raises(ValueError, match=r"'0\.0' has \['momentum_buffer'\]"):
        adamw([a]).load_state_dict(sgd.state_dict())


def test_memory_equals_what_is_then_allocated():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5)).bfloat16()
    promised = memory(model, lambda m: adamw(m, master="split"))
    optimizer = adamw(model, master="split")
    give_gradients(model.parameters(), 0)
    optimizer.step()
    held = sum(
        t.nbytes for s in optimizer.state.values() for name, t in s.items() if name != "step"
    )
    assert promised["total"] == held == sum(p.numel() for p in model.parameters()) * 10


def test_grad_scaler_skips_and_steps():
    a = parameter(3)
    optimizer = adamw([a], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = a.detach().clone()
    scaler.scale(a.sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(a, before)
    optimizer.zero_grad()
    scaler.scale(a.square().sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(a, before)
    assert int(optimizer.state[a]["step"]) == 1


def test_sparse_gradients_and_empty_lists_are_refused_clearly():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = adamw(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"'weight' has a .*sparse"):
        optimizer.step()
    with pytest.raises(ValueError, match="nothing to optimize"):
        adamw([])
    with pytest.raises(ValueError, match="single tensor"):
        adamw(parameter(2))
    with pytest.raises(ValueError, match="choose 'fp32', 'split' or 'sr'"):
        adamw([parameter(2)], master="kahan")


class Host(nn.Module):
    """A stand-in for a streamed model: it owns one parameter and updates it by the rule."""

    def __init__(self):
        super().__init__()
        self.away = parameter(8)
        self.adapter = parameter(2)
        self.finite = True

    def bind_optimizer(self, optimizer):
        self.optimizer, self.steps, self.states = optimizer, 0, None
        return self

    def owns(self, candidate):
        return candidate is self.away

    def finish_step(self):
        if not self.finite:
            return False
        rule = self.optimizer.rule_for(self.away)
        spec = rule.state_spec((8,), torch.float32)
        self.states = self.states or {k: torch.zeros(s.shape) for k, s in spec.items()}
        self.steps += 1
        rule.update(
            self.away.data, torch.ones(8), self.states, step=self.steps,
            hyper=self.optimizer.hyper_for(self.away),
            seed=self.optimizer.noise_seed(self.away), element_offset=0,
        )  # fmt: skip
        return True

    def state_dict(self, *args, **kwargs):
        return {"steps": self.steps}

    def load_state_dict(self, state, *args, **kwargs):
        self.steps = state["steps"]


def test_a_host_updates_what_it_owns_and_the_rest_is_resident():
    host = Host()
    outer = nn.Sequential(host)
    optimizer = adamw(outer, lr=0.1, weight_decay=0.0)
    assert optimizer.param_name(host.away) == "0.away"
    start, adapter = host.away.detach().clone(), host.adapter.detach().clone()
    host.adapter.grad = torch.ones(2)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    torch.testing.assert_close(host.away, start - 0.25)
    torch.testing.assert_close(host.adapter, adapter - 0.25)
    assert host.away not in optimizer.state
    saved = optimizer.state_dict()
    assert saved["headrace"]["streamed"] == [{"steps": 1}]
    host.finite = False
    kept = host.adapter.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(host.adapter, kept)
    with pytest.raises(ValueError, match="0 streamed models"):
        optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})


def test_a_wrapper_that_forwards_attributes_binds_its_host_once():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    optimizer = adamw(Wrapper(Host()))
    assert len(optimizer.state_dict()["headrace"]["streamed"]) == 1
