"""Any update rule as a real ``torch.optim.Optimizer``, for resident and for streamed parameters.

Guarantees: a parameter's bits depend on its gradient history, param group, name and the seed
only, not on threads or tiles; parameters whose gradient is None are left alone (no decay, no
step counted); a step whose gradients hold inf or NaN changes nothing and is counted in
``skipped_steps``; ``state_dict`` holds tensors, numbers and strings only, so that it loads with
``torch.load(weights_only=True)``, and loading never casts a state to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from .host.bits import host_view
from .host.finite import all_finite
from .masters import WEIGHT_DTYPES
from .parameters import ModelOrParams, ParameterInfo, Role, parameter_groups, parameter_roles
from .seeds import parameter_seed
from .spec import TensorSpec, allocate, spec_bytes
from .streamed import StreamedUpdates, UpdateRule, parameter_hosts

#: Elements that one call of an elementwise rule updates at a time on the CPU.
TILE_ELEMENTS = 1 << 20

RuleChooser = Callable[[ParameterInfo, Mapping[str, Any]], UpdateRule]


@final
@dataclass(frozen=True, slots=True)
class _Entry:
    """What the optimizer knows about one of its parameters."""

    info: ParameterInfo
    group_index: int
    rule: UpdateRule


class RuleOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that runs one update rule per parameter.

    ``model_or_params`` is a module (its trainable parameters, by name; parameters that a
    ``ParameterHost`` inside it owns are updated there), or whatever torch optimizers take;
    ``choose`` names the rule of each parameter; ``defaults`` fill the param groups.
    ``max_grad_norm`` clips as ``torch.nn.utils.clip_grad_norm_`` does, right before the update.
    ``threads`` update tiles of CPU parameters in parallel (default: torch's own number).

    >>> import torch
    >>> from torch import nn
    >>> from headrace.optim import adamw_8bit
    >>> layer = nn.Linear(4, 2)
    >>> optimizer = adamw_8bit(layer, lr=0.1)
    >>> schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.param_groups[0]["lr"]
    0.05
    """

    def __init__(
        self,
        model_or_params: ModelOrParams,
        choose: RuleChooser,
        defaults: Mapping[str, Any],
        *,
        max_grad_norm: float | None = None,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={max_grad_norm} must be positive; pass None to switch clipping off"
            )
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.skipped_steps = 0
        self.last_grad_norm: float | None = None
        self._threads = threads
        self._choose = choose
        self._entries: dict[int, _Entry] = {}
        self._roles: dict[int, Role] = {}
        self._streams: list[StreamedUpdates] = []
        model = model_or_params if isinstance(model_or_params, nn.Module) else None
        if model is not None:
            self._roles = parameter_roles(model)
        super().__init__(parameter_groups(model_or_params), dict(defaults))
        if model is not None:
            self._streams = [host.bind_optimizer(self) for host in parameter_hosts(model)]

    # -- what a host may ask -------------------------------------------------------------------

    def rule_for(self, parameter: nn.Parameter) -> UpdateRule:
        """Return the update rule of one of this optimizer's parameters."""
        return self._entry(parameter).rule

    def hyper_for(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Return the param group of a parameter as it is now, schedulers' changes included."""
        return cast(Mapping[str, Any], self.param_groups[self._entry(parameter).group_index])

    def param_name(self, parameter: nn.Parameter) -> str:
        """Return the name a parameter's noise and messages go by."""
        return self._entry(parameter).info.name

    def noise_seed(self, parameter: nn.Parameter) -> int:
        """Return the 64-bit seed that ``UpdateRule.update`` takes for this parameter."""
        return parameter_seed(self.seed, self.param_name(parameter))

    def resident_gradients(self) -> list[Tensor]:
        """Return the gradients of the parameters that no host owns."""
        return [cast(Tensor, parameter.grad) for parameter in self._resident_work()]

    def scale_resident_gradients(self, coefficient: Tensor | float) -> None:
        """Multiply the gradients of the parameters that no host owns, in place."""
        for gradient in self.resident_gradients():
            gradient.mul_(coefficient)

    @property
    def has_hosts(self) -> bool:
        """Whether a module updates some of the parameters itself."""
        return bool(self._streams)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all parameters, group by group."""
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def update_parameter(self, parameter: nn.Parameter) -> bool:
        """Update one resident parameter from its gradient; False if that is not finite."""
        if parameter.grad is None or not _finite(parameter.grad):
            return False
        self._run([parameter])
        return True

    # -- torch.optim.Optimizer -----------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; its parameters are named ``group.index`` unless they come named."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            if parameter.dtype not in WEIGHT_DTYPES:
                raise ValueError(
                    f"parameter {name!r} is {parameter.dtype}; optimizers update float32, "
                    f"bfloat16 and float16 parameters"
                )
            shape = tuple(parameter.shape)
            role = self._roles.get(id(parameter), "matrix" if len(shape) == 2 else "other")
            info = ParameterInfo(name, shape, parameter.dtype, role)
            rule = self._choose(info, group)
            rule.state_spec(shape, parameter.dtype)  # refuse impossible choices now, not later
            self._entries[id(parameter)] = _Entry(info, index, rule)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Do one step: wait for the hosts, then update the resident parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        finished = [stream.finish_step() for stream in self._streams]
        work = self._resident_work()
        if not all(finished) or not self._ready(work):
            self.skipped_steps += 1
            return loss
        self._run(work)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own layout and, under ``"headrace"``, the seed and the counters."""
        packed = super().state_dict()
        packed["headrace"] = {
            "seed": self.seed,
            "skipped_steps": self.skipped_steps,
            "streamed": [stream.state_dict() for stream in self._streams],
        }
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict of the same rules, or of ``torch.optim.AdamW`` for fp32 moments.

        States keep the dtypes that the rules declare.  A checkpoint without a master (torch's)
        starts the master from the current weight.
        """
        extra = state_dict.get("headrace", {})
        streamed = extra.get("streamed", [])
        if len(streamed) != len(self._streams):
            raise ValueError(
                f"the checkpoint holds the state of {len(streamed)} streamed models, this "
                f"optimizer drives {len(self._streams)}; load it into the kind that saved it"
            )
        loaded = self._loaded_states(state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, states in loaded:
            self.state[parameter] = states
        self.seed = extra.get("seed", self.seed)
        self.skipped_steps = extra.get("skipped_steps", 0)
        for stream, state in zip(self._streams, streamed, strict=True):
            stream.load_state_dict(state)

    # -- memory --------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Return bytes of each kind of state (by name), all parameters together.

        Computed from the declared specs, so it is right before the first step; the 4-byte step
        counters are left out.
        """
        totals: dict[str, int] = {}
        for entry in self._entries.values():
            spec = entry.rule.state_spec(entry.info.shape, entry.info.dtype)
            for name, one in spec.items():
                totals[name] = totals.get(name, 0) + one.nbytes
        return totals

    # -- inner workings ------------------------------------------------------------------------

    def _entry(self, parameter: nn.Parameter) -> _Entry:
        entry = self._entries.get(id(parameter))
        if entry is None:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is not in this optimizer; was it "
                f"frozen when the optimizer was made?"
            )
        return entry

    def _resident_work(self) -> list[nn.Parameter]:
        work = []
        for parameter in self.parameters():
            if any(stream.owns(parameter) for stream in self._streams):
                continue
            if parameter.grad is None:
                continue
            if parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"parameter {self.param_name(parameter)!r} has a {parameter.grad.layout} "
                    f"gradient; only dense gradients are supported (use sparse=False)"
                )
            work.append(parameter)
        return work

    def _ready(self, work: list[nn.Parameter]) -> bool:
        """Clip the resident gradients; return whether all are finite."""
        if self.max_grad_norm is None or self._streams:
            # With a host, the host clips: the norm is over both kinds of parameters.
            return all_gradients_finite([cast(Tensor, parameter.grad) for parameter in work])
        gradients = [cast(Tensor, parameter.grad) for parameter in work]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.last_grad_norm = float(norm)
        if not torch.isfinite(norm):
            return False
        torch.nn.utils.clip_grads_with_norm_(work, self.max_grad_norm, norm)
        return True

    def _run(self, work: list[nn.Parameter]) -> None:
        jobs: list[Callable[[], None]] = []
        finishers: list[Callable[[], None]] = []
        for parameter in work:
            own, finish = self._jobs(parameter)
            finishers.extend(finish)
            if parameter.device.type == "cpu":
                jobs.extend(own)
                continue
            # In this thread: others would not launch on the caller's stream.
            for job in own:
                job()
        threads = self._threads or torch.get_num_threads()
        if threads == 1 or len(jobs) <= 1:
            for job in jobs:
                job()
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="headrace-update") as pool:
                for future in [pool.submit(job) for job in jobs]:
                    future.result()
        for finish_one in finishers:
            finish_one()

    def _jobs(
        self, parameter: nn.Parameter
    ) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """Return the calls that update one parameter, and what must follow them."""
        entry = self._entry(parameter)
        states = self._states(parameter, entry)
        states["step"] += 1
        common: dict[str, Any] = {
            "step": int(states["step"]),
            "hyper": self.param_groups[entry.group_index],
            "seed": self.noise_seed(parameter),
        }
        rule = entry.rule
        own = {name: tensor for name, tensor in states.items() if name != "step"}
        gradient = cast(Tensor, parameter.grad).contiguous()
        weight = parameter.detach()
        finish: list[Callable[[], None]] = []
        if not weight.is_contiguous():
            strided, weight = weight, weight.contiguous()
            finish = [lambda: _copy(strided, weight)]
        count = weight.numel()
        if count == 0:
            return [], []
        if not rule.elementwise or weight.device.type != "cpu":
            return [lambda: rule.update(weight, gradient, own, element_offset=0, **common)], finish
        flat_weight, flat_gradient = weight.view(-1), gradient.view(-1)
        flat_states = {name: tensor.view(-1) for name, tensor in own.items()}
        tile = max(TILE_ELEMENTS // rule.granule, 1) * rule.granule

        def job(start: int, stop: int) -> Callable[[], None]:
            dtype = parameter.dtype
            pieces = state_range(rule, flat_states, dtype, start, stop)
            return lambda: rule.update(
                flat_weight[start:stop],
                flat_gradient[start:stop],
                pieces,
                element_offset=start,
                **common,
            )

        return [job(a, min(a + tile, count)) for a in range(0, count, tile)], finish

    def _states(self, parameter: nn.Parameter, entry: _Entry) -> dict[str, Tensor]:
        states = self.state[parameter]
        if not states:
            spec = entry.rule.state_spec(entry.info.shape, entry.info.dtype)
            own = allocate(spec, parameter.device)
            entry.rule.init_states(parameter.detach().contiguous(), own)
            states["step"] = torch.zeros((), dtype=torch.float32)
            states.update(own)
        return states

    def _loaded_states(
        self, state_dict: Mapping[str, Any]
    ) -> list[tuple[nn.Parameter, dict[str, Tensor]]]:
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = list(self.parameters())
        if len(ids) != len(parameters):
            raise ValueError(
                f"the checkpoint has {len(ids)} parameters, this optimizer has "
                f"{len(parameters)}; build it over the same model"
            )
        return [
            (parameter, self._loaded_state(parameter, state_dict["state"][i]))
            for i, parameter in zip(ids, parameters, strict=True)
            if i in state_dict["state"]
        ]

    def _loaded_state(self, parameter: nn.Parameter, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        entry = self._entry(parameter)
        spec = entry.rule.state_spec(entry.info.shape, entry.info.dtype)
        own = allocate(spec, parameter.device)
        entry.rule.init_states(parameter.detach().contiguous(), own)
        missing = set(spec) - set(saved) - {"master", "remainder"}
        unknown = set(saved) - set(spec) - {"step"}
        if missing or unknown or "step" not in saved:
            raise ValueError(
                f"the saved state of parameter {entry.info.name!r} has {sorted(saved)}; its rule "
                f"needs {sorted([*spec, 'step'])}. Load it with the recipe that saved it"
            )
        for name, one in spec.items():
            if name in saved:
                _restore(own[name], saved[name], one, f"{entry.info.name}: {name}")
        step = torch.as_tensor(saved["step"], dtype=torch.float32).reshape(()).cpu().clone()
        return {"step": step, **own}


def state_range(
    rule: UpdateRule, flat_states: Mapping[str, Tensor], dtype: torch.dtype, start: int, stop: int
) -> dict[str, Tensor]:
    """Cut the states of elements ``start .. stop`` out of the flattened states of a parameter.

    A state has as many elements before the cut as the rule declares for a range of that length.
    """
    before = rule.state_spec((start,), dtype)
    until = rule.state_spec((stop,), dtype)
    shapes = rule.state_spec((stop - start,), dtype)
    return {
        name: flat_states[name][_numel(before[name]) : _numel(until[name])].view(shapes[name].shape)
        for name in shapes
    }


def memory(
    model_or_params: ModelOrParams, recipe: Callable[[Any], RuleOptimizer]
) -> dict[str, int]:
    """Return the bytes of each kind of optimizer state that a recipe will allocate, and ``total``.

    Nothing is allocated: states exist from the first step on.

    >>> from headrace.optim import adamw
    >>> memory(nn.Linear(3, 2), adamw)
    {'exp_avg': 32, 'exp_avg_sq': 32, 'total': 64}
    """
    parts = recipe(model_or_params).memory()
    return {**parts, "total": sum(parts.values())}


def _numel(spec: TensorSpec) -> int:
    return spec_bytes({"": spec}) // spec.dtype.itemsize


def all_gradients_finite(gradients: list[Tensor]) -> bool:
    """Whether no gradient holds an infinity or NaN; waits for an accelerator once, not for each.

    >>> all_gradients_finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
    False
    """
    elsewhere = [one for one in gradients if one.device.type != "cpu" and one.numel()]
    if elsewhere:
        largest = torch.nn.utils.get_total_norm(elsewhere, float("inf"))
        if not torch.isfinite(largest):
            return False
    return all(_finite(one) for one in gradients if one.device.type == "cpu")


def _finite(gradient: Tensor) -> bool:
    if gradient.device.type != "cpu" or gradient.dtype not in WEIGHT_DTYPES:
        return bool(torch.isfinite(gradient).all())
    return bool(all_finite(host_view(gradient.contiguous())))


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _restore(target: Tensor, value: Any, spec: TensorSpec, what: str) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(spec.shape):
        raise ValueError(f"saved state {what} is {value!r:.80}; a tensor {spec.shape} is needed")
    both_float = value.dtype.is_floating_point and spec.dtype.is_floating_point
    if value.dtype != spec.dtype and not (both_float and spec.dtype.itemsize >= 2):
        raise ValueError(f"saved state {what} is {value.dtype}; its rule keeps {spec.dtype}")
    target.copy_(value)
