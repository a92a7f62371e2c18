"""Q-GaLore's weights: linear layers kept in INT8, trained through projected gradients.

A layer's weight is INT8 codes with a scale for each group of a row, and nothing else: no copy in
16 or 32 bits.  What an optimizer sees is ``coordinates``, a parameter of the projected shape that
is zero whenever the layer computes: its gradient is the weight's gradient in the layer's subspace,
made by two thin products in backward, so that the full gradient exists only when a new basis is
due, for one layer at a time.  The optimizer's step moves the coordinates off zero;
``Int8Updates`` (``int8_updates``) lifts them into the weight, which is rounded stochastically
back to INT8, and zeroes them (Zhang et al., arXiv:2407.08296, sections 3.2 to 3.4).

Deviations from the paper: symmetric groups instead of affine ones, a basis of the randomised
and then the warm-started power method instead of an SVD, moments re-projected when it changes
(encoded ones are rounded once more then).
Clipping sees the norm of the projected gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..quant.int8_rowwise import Int8RowwiseCodec
from ..quant.linear import EncodedModule, part_parameter_name
from ..quant.rounding import CounterGenerator
from .base import BasisChange, Brick, Kind, Slot, StepContext, count_slot, float_slot
from .galore import GaLore
from .parameters import parameter_roles
from .projected import LazyRefresh
from .projector import OrthogonalProjector, Side
from .seeds import parameter_seed
from .spec import Shape, TensorSpec
from .streamed import parameter_hosts


@final
@dataclass(frozen=True)
class _MomentsElsewhere(Brick):
    """Stands in for the inner brick: its moments are the optimizer's, which turns them later.

    ``turn`` is the product of the changes of basis that are still to be carried out, ``turns``
    their number.
    """

    left: bool

    @property
    def elementwise(self) -> bool:
        return False

    def init_spec(self, shape: Shape) -> dict[str, Slot]:
        rank = shape[0] if self.left else shape[1]
        return {"turn": float_slot((rank, rank), Kind.PLAIN), "turns": count_slot()}

    def update(self, grad: Tensor, states: Mapping[str, Tensor], context: StepContext) -> Tensor:
        return grad

    def rotate(
        self, states: Mapping[str, Tensor], shape: Shape, change: BasisChange, context: StepContext
    ) -> None:
        turn = states["turn"]
        if int(states["turns"]) == 0:
            turn.copy_(torch.eye(turn.shape[0]))
        turn.copy_(change.mix(turn))
        states["turns"] += 1


@final
class Int8Linear(EncodedModule):
    """A linear layer over INT8 codes whose gradient is projected inside backward.

    ``coordinates``, zeros of (rank, in) if out < in, else (out, rank), fp32, is what trains
    beside the bias.  Everything is in the module's parameters and buffers.
    """

    bias: nn.Parameter | None
    steps: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        name: str,
        *,
        galore: Callable[[int, int], GaLore],
        codec: Int8RowwiseCodec,
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        rows, cols = weight.shape
        self.in_features, self.out_features = cols, rows
        self._galore = galore(rows, cols)
        self._seed = parameter_seed(0, name)
        self.add_encoded(
            "weight", codec.encode(weight), codec=codec, shape=(rows, cols), dtype=weight.dtype
        )
        low = self._galore.projector.low_shape(rows, cols)
        self.coordinates = nn.Parameter(torch.zeros(low, device=weight.device))
        self.register_parameter("bias", linear.bias)
        self._slots = self._galore.init_spec((rows, cols))
        for slot_name, slot in self._slots.items():
            device = "cpu" if slot.spec.dtype == torch.int64 else weight.device
            zeros = torch.zeros(slot.spec.shape, dtype=slot.spec.dtype, device=device)
            self.register_buffer(_buffer_name(slot_name), zeros)
        self._galore.init(self.projection())
        #: Steps that the weight has taken.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.encoded_weight("weight"), self.bias)
        if not torch.is_grad_enabled():
            return y
        return _Projected.apply(y, x.detach(), self.coordinates, self)  # type: ignore[no-any-return]

    def whole_weight(self) -> Tensor:
        """Return the weight that the layer stands for, (out, in) in fp32."""
        slot = self.encoded_slots["weight"]
        return slot.codec.decode(self.encoded_parts("weight"), slot.shape)

    def projection(self) -> dict[str, Tensor]:
        """Return the states of the projection by the names that the GaLore brick gives them."""
        return {name: self.get_buffer(_buffer_name(name)) for name in self._slots}

    @torch.no_grad()
    def project(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of the coordinates from those of the output and from the input.

        ``grad`` is (..., out), ``x`` (..., in).  A due basis is chosen first, from the full
        gradient of this micro-batch; one that is not finite is passed over.
        """
        y = grad.reshape(-1, grad.shape[-1])
        x = x.reshape(-1, x.shape[-1]).to(y.dtype)
        states, context = self.projection(), self._context()
        if self._galore.due(states, context):
            full = y.float().T @ x.float()
            if bool(torch.isfinite(full).all()):
                self._galore.refresh(full, states, context)
            del full
        basis = self._basis().to(y.dtype)
        low = (y @ basis).T @ x if self._on_left else y.T @ (x @ basis)
        return low.float()

    @torch.no_grad()
    def take_step(self, decay: float, generator: CounterGenerator) -> None:
        """Multiply the weight by ``decay``, add the lifted coordinates, round back to INT8.

        Scratch: two fp32 matrices of the weight's shape.
        """
        slot = self.encoded_slots["weight"]
        lifted = self._galore.projector.up(self.coordinates, self._basis(), *slot.shape)
        weight = self.whole_weight().mul_(decay).add_(lifted, alpha=self._galore.scale)
        for part_name, part in slot.codec.encode(weight, generator=generator).items():
            self.get_parameter(part_parameter_name("weight", part_name)).data.copy_(part)
        self.coordinates.zero_()
        self.steps += 1

    def pending_change(self) -> BasisChange | None:
        """Return the change of basis that the optimizer's moments have still to follow."""
        states = self.projection()
        if int(states["turns"]) == 0:
            return None
        turn, squares = states["turn"], states["turn"].square()
        if self._on_left:
            return BasisChange(lambda x: turn @ x, lambda x: squares @ x)
        return BasisChange(lambda x: x @ turn, lambda x: x @ squares)

    def moments_follow(self) -> None:
        """Say that the optimizer's moments are in the current basis."""
        self.projection()["turns"].zero_()

    def extra_repr(self) -> str:
        rank = min(self.coordinates.shape[0 if self._on_left else 1], self.in_features)
        block = self.encoded_slots["weight"].codec.block_size
        return f"{self.in_features}, {self.out_features}, rank={rank}, group={block}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Coordinates and projection keep their types: a cast would round what training relies on.
        # Counters stay in host memory: asking an accelerator for them would stall every layer.
        own = {id(self.coordinates), *(id(one) for one in self.projection().values())}

        def keeping(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.int64:
                return tensor
            moved = fn(tensor)
            kept = id(tensor) in own and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if kept else moved

        return super()._apply(keeping, recurse)

    @property
    def _on_left(self) -> bool:
        assert isinstance(self._galore.projector, OrthogonalProjector), "attach_int8 made it"
        return self._galore.projector.on_left(self.out_features, self.in_features)

    def _basis(self) -> Tensor:
        rows, cols = self.out_features, self.in_features
        return self._galore.current_basis(rows, cols, self.projection(), self._context())

    def _context(self) -> StepContext:
        return StepContext(int(self.steps) + 1, {}, self._seed, 0, self.coordinates.detach())


class _Projected(torch.autograd.Function):
    """The identity on a layer's output; in backward, the gradient of the layer's coordinates."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, coordinates: Tensor, layer: Int8Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        low = ctx.layer.project(grad, x) if ctx.needs_input_grad[2] else None
        return grad, None, low, None


@final
@dataclass(frozen=True, kw_only=True)
class Int8Settings:
    """How ``attach_int8`` keeps weights and projects gradients; names are those of ``q_galore``.

    ``weight_group_size`` columns of a row share a scale.

    >>> Int8Settings(rank=8).galore(64, 32).scale
    0.25
    """

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: Side = "std"
    cos_threshold: float = 0.4
    gamma_proj: float = 2.0
    queue_size: int = 5
    quant_group_size: int = 128
    weight_group_size: int = 256

    def galore(self, rows: int, cols: int) -> GaLore:
        """Return the projection of a matrix of this shape."""
        projector = OrthogonalProjector(
            self.rank, self.proj_type, int4=True, int4_block=self.quant_group_size
        )
        lazy = LazyRefresh(self.cos_threshold, self.queue_size, self.gamma_proj)
        inner = _MomentsElsewhere(projector.on_left(rows, cols))
        gap = self.update_proj_gap
        return GaLore(inner, projector, gap=gap, lazy=lazy, scale=self.scale)

    def codec(self) -> Int8RowwiseCodec:
        """Return the codec of the weights."""
        return Int8RowwiseCodec(block_size=self.weight_group_size)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return the bytes that ``attach_int8`` will make of a model's linear layers, by part.

        Moments are the optimizer's own (``headrace.optim.memory`` of the attached model).

        >>> Int8Settings(rank=8).memory(nn.Linear(256, 256, bias=False))
        {'weights': 66560, 'coordinates': 8192, 'projection': 1844, 'total': 76596}
        """
        parts = {"weights": 0, "coordinates": 0, "projection": 0}
        for _, linear in _trained_linears(model):
            rows, cols = linear.weight.shape
            galore = self.galore(rows, cols)
            low = TensorSpec(galore.projector.low_shape(rows, cols), torch.float32)
            slots = galore.init_spec((rows, cols)).values()
            parts["weights"] += self.codec().nbytes((rows, cols))
            parts["coordinates"] += low.nbytes
            parts["projection"] += sum(slot.spec.nbytes for slot in slots)
        return {**parts, "total": sum(parts.values())}


def attach_int8(model: nn.Module, settings: Int8Settings | None = None) -> list[str]:
    """Replace a model's linear layers by ``Int8Linear``, in place; return their names.

    Embeddings and the output head stay, and so do layers that are frozen.  Build the optimizer
    afterwards, then an ``Int8Updates``.  A weight costs 1.016 bytes and its gradient those of the
    coordinates.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> attach_int8(model, Int8Settings(rank=8))
    ['0', '2']
    >>> model[0]
    Int8Linear(64, 64, rank=8, group=256)
    """
    if parameter_hosts(model):
        raise ValueError(
            f"{type(model).__name__} streams its weights and updates them itself: INT8 weights "
            f"train resident models. Load it without headrace.load, or stream a quantised base "
            f"with adapters"
        )
    settings = settings or Int8Settings()
    found = list(_trained_linears(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no trainable linear layer to keep in INT8")
    for name, linear in found:
        layer = Int8Linear(linear, name, galore=settings.galore, codec=settings.codec())
        model.set_submodule(name, layer)
    return [name for name, _ in found]


def detach_int8(model: nn.Module) -> None:
    """Put ordinary linear layers with the decoded weights back, in place.

    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> x, names = torch.ones(1, 64), attach_int8(model)
    >>> before = model(x)
    >>> detach_int8(model)
    >>> model[0], torch.equal(model(x), before)
    (Linear(in_features=64, out_features=64, bias=True), True)
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8Linear):
            weight = layer.encoded_weight("weight").decode()
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
            linear.register_parameter("bias", layer.bias)
            model.set_submodule(name, linear)


def _trained_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    roles = parameter_roles(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.requires_grad:
            if roles[id(module.weight)] == "matrix":
                yield name, module


def _buffer_name(slot_name: str) -> str:
    return slot_name.replace(".", "_")
