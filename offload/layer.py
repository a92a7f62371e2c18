"""The streamed layer: one autograd node that fetches its module's weights for each visit.

The forward visit runs the module on all micro-batches without a graph and parks only its input;
the backward visit fetches the chunk again, recomputes each micro-batch with a graph,
back-propagates it, and adds parameter gradients into the chunk's flat buffer.  Weights thus
cross each link twice per step, whatever the number of micro-batches.

Guarantees: same operations, in the same order per micro-batch, as the module run by itself, so
the same bits; random state and autocast of the forward visit are restored for the recomputation.
Assumes that batch-carrying tensors have the batch as first axis and at least two axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .activation import Parked
from .errors import UnsupportedModelError
from .masks import CausalMasks
from .runtime import Runtime
from .schedule import Phase
from .timeline import LaneName
from .workspace import measured_graph_bytes

Forward = Callable[..., Any]
_PLAIN = (Tensor, int, float, bool, str, type(None), torch.dtype, torch.device)


@final
class RandomState:
    """Generators and autocast as they were, to be restored for a recomputation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._autocast: list[dict[str, Any]] = [
            {
                "device_type": kind,
                "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for kind in sorted({"cpu", device.type})
        ]

    @contextmanager
    def restored(self) -> Any:
        """Run the body under this state; the present generators are untouched afterwards."""
        devices = [self._device] if self._cuda is not None else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            for autocast in self._autocast:
                stack.enter_context(torch.autocast(**autocast))
            yield


@final
@dataclass(frozen=True)
class Call:
    """One call of a module, flattened, with the split into micro-batches."""

    forward: Forward
    label: str
    leaves: tuple[Any, ...]  # differentiable tensors are replaced by None
    spec: TreeSpec
    differentiable: tuple[int, ...]
    slices: tuple[slice, ...]
    batch_size: int
    masks: CausalMasks

    def carries_batch(self, leaf: Any) -> bool:
        """Whether a leaf is split with the micro-batches."""
        return (
            len(self.slices) > 1
            and isinstance(leaf, Tensor)
            and leaf.dim() >= 2
            and leaf.shape[0] == self.batch_size
        )

    def run(self, part: slice, tensors: Sequence[Tensor]) -> Any:
        """Run one micro-batch; ``tensors`` are the differentiable inputs, already sliced."""
        leaves = [self._part_of(leaf, part) for leaf in self.leaves]
        for index, tensor in zip(self.differentiable, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)

    def _part_of(self, leaf: Any, part: slice) -> Any:
        if not self.carries_batch(leaf):
            return leaf
        return None if self.masks.implied(leaf, part) else leaf[part]

    def take(self, tensors: Sequence[Tensor], part: slice) -> list[Tensor]:
        """The micro-batch's part of the differentiable inputs."""
        return [t[part] if self.carries_batch(t) else t for t in tensors]


@final
class Outputs:
    """Joins the outputs of micro-batches, and splits their gradients again."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._spec: TreeSpec | None = None
        self._parts: list[list[Any]] = []
        self.rows: list[list[int]] = []  # [micro-batch][leaf] rows along the first axis
        self.tensor_indices: tuple[int, ...] = ()

    def add(self, output: Any) -> None:
        """Append one micro-batch's output."""
        leaves, spec = tree_flatten(output)
        if self._spec is None:
            self._spec = spec
            self.tensor_indices = tuple(i for i, v in enumerate(leaves) if isinstance(v, Tensor))
        self._parts.append(leaves)
        self.rows.append([v.shape[0] if isinstance(v, Tensor) and v.dim() else 0 for v in leaves])

    def join(self) -> list[Tensor]:
        """The tensors of the whole batch, concatenated along the first axis."""
        joined: list[Tensor] = []
        for i in self.tensor_indices:
            parts = [leaves[i] for leaves in self._parts]
            if len(parts) == 1:
                joined.append(parts[0])
                continue
            if parts[0].dim() == 0:
                raise UnsupportedModelError(
                    f"{self._label} returns a scalar (output {i}), which cannot be joined over "
                    f"{len(parts)} micro-batches. Load with micro_batch=None (one micro-batch)."
                )
            joined.append(torch.cat(parts, dim=0))
        self._others = [
            None if i in self.tensor_indices else v for i, v in enumerate(self._parts[-1])
        ]
        self._parts = []
        return joined

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The output in the module's own form."""
        assert self._spec is not None
        leaves = list(self._others)
        for index, tensor in zip(self.tensor_indices, tensors, strict=True):
            leaves[index] = tensor
        return tree_unflatten(leaves, self._spec)

    def gradients_of(self, part: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The slices of the outputs' gradients that belong to micro-batch ``part``."""
        result: list[Tensor | None] = []
        for index, gradient in zip(self.tensor_indices, gradients, strict=True):
            if gradient is None or len(self.rows) == 1:
                result.append(gradient)
                continue
            start = sum(rows[index] for rows in self.rows[:part])
            result.append(gradient[start : start + self.rows[part][index]])
        return result


@final
class _StreamedCall(torch.autograd.Function):
    """forward: no graph, inputs parked.  backward: recompute, accumulate, free."""

    @staticmethod
    def forward(
        ctx: Any,
        runtime: Runtime,
        name: str,
        call: Call,
        outputs: Outputs,
        anchor: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.runtime, ctx.name, ctx.call, ctx.outputs = runtime, name, call, outputs
        ctx.random = RandomState(runtime.device)
        if runtime.gradients is not None and runtime.trains(name):
            runtime.gradients.expect(name)
        joined = run_visit(runtime, name, call, outputs, tensors, measure=True)
        ctx.parked = [runtime.parking.park(t) for t in tensors]
        ctx.mark_non_differentiable(*[t for t in joined if not t.is_floating_point()])
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # type: ignore[override]
        runtime, name, call = ctx.runtime, ctx.name, ctx.call
        runtime.backward_runs()
        parked: list[Parked] = ctx.parked
        tensors = [p.fetch() for p in reversed(parked)][::-1]
        wanted = ctx.needs_input_grad[5:]
        results: list[Tensor | None] = [
            torch.empty_like(t) if call.carries_batch(t) and w else None
            for t, w in zip(tensors, wanted, strict=True)
        ]
        with (
            runtime.resident(name, Phase.BACKWARD),
            runtime.collecting(name),
            ctx.random.restored(),
        ):
            for index, part in enumerate(call.slices):
                runtime.engine.pump()
                with runtime.timeline.span(LaneName.COMPUTE, f"backward {name}"):
                    inputs = [
                        t.detach().requires_grad_(w)
                        for t, w in zip(call.take(tensors, part), wanted, strict=True)
                    ]
                    with torch.enable_grad():
                        output = call.run(part, inputs)
                    leaves, _ = tree_flatten(output)
                    pairs = [
                        (v, g)
                        for v, g in zip(
                            (leaves[i] for i in ctx.outputs.tensor_indices),
                            ctx.outputs.gradients_of(index, gradients),
                            strict=True,
                        )
                        if g is not None and v.requires_grad
                    ]
                    del output, leaves
                    if pairs:
                        torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])
                    del pairs
                _collect(call, part, inputs, results)
                del inputs
        return (None,) * 5 + tuple(results)


def _collect(call: Call, part: slice, inputs: list[Tensor], results: list[Tensor | None]) -> None:
    """Put one micro-batch's input gradients where they belong."""
    for i, tensor in enumerate(inputs):
        gradient, result = tensor.grad, results[i]
        if not tensor.requires_grad:
            continue
        if result is not None and result.shape[0] == call.batch_size and len(call.slices) > 1:
            if gradient is None:
                result[part].zero_()
            else:
                result[part].copy_(gradient)
        elif gradient is not None:
            # An input that all micro-batches share: its gradients add up in their order.
            results[i] = gradient if result is None else result + gradient


def measure_workspace(runtime: Runtime, name: str, call: Call, tensors: Sequence[Tensor]) -> None:
    """The first time a kind of chunk meets a shape, find out what its backward visit needs."""
    layout = runtime.engine.chunks[name].layout
    kind = tuple((s.shape, s.dtype) for s in layout.slots)
    shapes = tuple(t.shape for t in tensors)
    if not runtime.workspace.is_new(kind, shapes, len(call.slices)):
        return
    part = call.slices[0]
    inputs = [t.detach().requires_grad_() for t in call.take(tensors, part)]
    known = {t.untyped_storage().data_ptr() for t in inputs}
    known |= {p.untyped_storage().data_ptr() for p in runtime.bound[name].parameters.values()}
    state = RandomState(runtime.device)
    with state.restored():
        graph = measured_graph_bytes(lambda: call.run(part, inputs), known)
    hidden = sum(t.numel() * t.element_size() for t in tensors)
    largest = max((s.nbytes for s in layout.slots), default=0)
    rows = part.stop - part.start if len(call.slices) > 1 else "all"
    runtime.workspace.reserve(
        2 * graph + largest + runtime.decoding_bytes.get(name, 0) + 4 * hidden,
        f"chunk {name!r} with {rows} sequences a micro-batch",
    )


def run_visit(
    runtime: Runtime,
    name: str,
    call: Call,
    outputs: Outputs,
    tensors: Sequence[Tensor],
    *,
    measure: bool = False,
) -> list[Tensor]:
    """One forward visit: every micro-batch through the module, without a graph.

    ``measure``: a backward visit will come, so its working memory is reserved first.
    """
    with runtime.resident(name, Phase.FORWARD), torch.no_grad():
        if measure:
            measure_workspace(runtime, name, call, tensors)
        for part in call.slices:
            runtime.engine.pump()
            with runtime.timeline.span(LaneName.COMPUTE, f"forward {name}"):
                outputs.add(call.run(part, call.take(tensors, part)))
        return outputs.join()


def stream_module(
    runtime: Runtime, name: str, module: nn.Module, *, position_table: bool = False
) -> None:
    """Replace ``module.forward`` by its streamed form; ``name`` is its chunk.

    ``position_table``: the module looks up positions that may be the same for every sequence;
    its output is then repeated along the batch, so that its gradient adds up micro-batch by
    micro-batch.
    """
    kind = type(module)

    def original(*args: Any, **kwargs: Any) -> Any:
        return kind.forward(module, *args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return streamed_forward(
            runtime, name, module, original, args, kwargs, position_table=position_table
        )

    module.forward = forward  # type: ignore[method-assign]


def _same_for_all(leaves: Sequence[Any]) -> bool:
    """Whether the inputs are one row that serves every sequence."""
    rows = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() >= 2}
    return rows == {1}


def _looked_up_once(original: Forward) -> Forward:
    """Run a module on the first row and repeat its output for the others.

    The gradient of a micro-batch is then summed over its sequences before the look-up's own
    backward, as broadcasting the output against the hidden states does: the table's backward
    would round 16-bit sums after every sequence.
    """

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        leaves, spec = tree_flatten((args, kwargs))
        axes = [isinstance(leaf, Tensor) and leaf.dim() >= 2 for leaf in leaves]
        rows = next(leaf.shape[0] for leaf, axis in zip(leaves, axes, strict=True) if axis)
        first = [leaf[:1] if axis else leaf for leaf, axis in zip(leaves, axes, strict=True)]
        args, kwargs = tree_unflatten(first, spec)
        output = original(*args, **kwargs)
        return output.expand(rows, *output.shape[1:])

    return forward


def streamed_forward(
    runtime: Runtime,
    name: str,
    module: nn.Module,
    original: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    position_table: bool = False,
) -> Any:
    """Run a module through its chunk: with a graph node if anything needs gradients."""
    keys = runtime.tap.keys() if runtime.tap is not None else ()
    if keys:
        original = _tapped(runtime, original, keys)

    def finished(output: Any) -> Any:
        if not keys:
            return output
        assert runtime.tap is not None
        output, found = output
        runtime.tap.deliver(found)
        return output

    leaves, spec = tree_flatten((args, kwargs))
    grad = torch.is_grad_enabled()
    current = runtime.current
    slices = current.slices() if current is not None else [slice(0, 1)]
    batch_size = current.batch_size if current is not None else 1
    plain = all(isinstance(leaf, _PLAIN) for leaf in leaves)
    if not plain:
        # A cache (or another object with state) belongs to the whole batch.
        slices = slices[:1]
    if position_table and len(slices) > 1 and _same_for_all(leaves):
        leaves = [
            leaf.expand(batch_size, *leaf.shape[1:])
            if isinstance(leaf, Tensor) and leaf.dim() >= 2
            else leaf
            for leaf in leaves
        ]
        original = _looked_up_once(original)
    differentiable = tuple(
        i
        for i, leaf in enumerate(leaves)
        if grad and isinstance(leaf, Tensor) and leaf.requires_grad
    )
    tensors = [leaves[i] for i in differentiable]
    constants = tuple(None if i in differentiable else leaf for i, leaf in enumerate(leaves))
    masks = current.masks if current is not None else CausalMasks()
    call = Call(original, name, constants, spec, differentiable, tuple(slices), batch_size, masks)
    if len(slices) > 1 and not any(call.carries_batch(leaf) for leaf in (*constants, *tensors)):
        call = replace(call, slices=(slice(0, 1),))
    outputs = Outputs(name)
    if not grad or not (tensors or any(p.requires_grad for p in module.parameters())):
        return finished(outputs.rebuild(run_visit(runtime, name, call, outputs, tensors)))
    if not plain:
        raise UnsupportedModelError(
            f"module {name!r} was called with a "
            f"{next(type(v).__name__ for v in leaves if not isinstance(v, _PLAIN))} while "
            f"gradients are recorded. Pass use_cache=False, or run under torch.no_grad()."
        )
    joined = _StreamedCall.apply(runtime, name, call, outputs, runtime.anchor, *tensors)
    return finished(outputs.rebuild(joined))


def _tapped(runtime: Runtime, original: Forward, keys: tuple[str, ...]) -> Forward:
    """The module's forward with what was recorded inside it as a second output."""
    tap = runtime.tap
    assert tap is not None

    def forward(*args: Any, **kwargs: Any) -> Any:
        with tap.inside(keys) as found:
            output = original(*args, **kwargs)
        return output, found

    return forward
