"""LoQT: weights of a few bits, trained through low-rank factors that are merged into them.

A linear layer's weight is W = Q + scale * P B (or B P'): Q encoded and frozen, P the leading
singular directions of a full gradient, encoded too, and B the only thing that trains.  From time
to time the factors are merged into Q and P is chosen anew, so that the sum of all updates has full
rank (Loeschcke et al., arXiv:2405.16528, algorithms 1 and 2).

At the codec's default (NF4) a weight costs 0.52 bytes, its full gradient exists for one layer at a
time and at merges only, and moments are those of B.  All state is in the modules and the optimizer:
``model.state_dict()`` and ``optimizer.state_dict()`` resume to the same bits.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..quant.codec import Codec
from ..quant.linear import EncodedModule, part_parameter_name
from ..quant.nf4 import Nf4Codec
from .base import StepContext
from .parameters import parameter_roles
from .projector import OrthogonalProjector
from .seeds import parameter_seed


@final
class LoqtLinear(EncodedModule):
    """A linear layer whose weight is an encoded matrix plus ``scale`` times low-rank factors.

    ``factor`` is (rank, in) if out < in, else (out, rank), in the layer's dtype; the basis of the
    other, shorter side is encoded by the same codec as the weight.
    """

    progress: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, name: str, *, rank: int, codec: Codec, scale: float
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        rows, cols = weight.shape
        self.in_features, self.out_features = cols, rows
        self.scale = scale
        self._projector = OrthogonalProjector(rank)
        used = self._projector.used_rank(rows, cols)
        self.add_encoded(
            "weight", codec.encode(weight), codec=codec, shape=(rows, cols), dtype=weight.dtype
        )
        shape = (self._projector.extent(rows, cols), used)
        none = codec.encode(torch.zeros(shape, device=weight.device))
        self.add_encoded("basis", none, codec=codec, shape=shape, dtype=weight.dtype)
        low = self._projector.low_shape(rows, cols)
        self.factor = nn.Parameter(torch.zeros(low, dtype=weight.dtype, device=weight.device))
        self.register_parameter("bias", linear.bias)
        #: Steps since the last merge, and merges so far.
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))
        self._seed = parameter_seed(0, name)
        self._watching = False
        self._found: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        base = functional.linear(x, self.encoded_weight("weight"), self.bias)
        basis = self.encoded_weight("basis").decode().to(x.dtype)
        inner, outer = (self.factor, basis) if self._on_left else (basis.T, self.factor)
        y = base + self.scale * functional.linear(functional.linear(x, inner), outer)
        return _Watch.apply(y, x.detach(), self) if self._watching else y  # type: ignore[no-any-return]

    def whole_weight(self) -> Tensor:
        """Return the weight that the layer stands for, (out, in) in fp32."""
        basis = self.encoded_weight("basis").decode().float()
        return self._base() + self.scale * self._lift(self.factor.detach().float(), basis)

    def watch(self) -> None:
        """Take a new basis from the gradients of the coming backward pass."""
        self._watching, self._found = True, None

    @property
    def has_basis(self) -> bool:
        """Whether a backward pass has left a basis to merge for."""
        return self._found is not None

    @torch.no_grad()
    def see(self, grad: Tensor) -> None:
        """Find a basis for a full gradient (out, in); one that is not finite is passed over."""
        if not bool(torch.isfinite(grad).all()):
            return
        shape = self.encoded_slots["basis"].shape
        states = {"projector": torch.empty(shape, device=grad.device)}
        weight = torch.empty(0, device=grad.device)
        merges = int(self.progress[1])
        context = StepContext(merges + 1, {}, self._seed, 0, weight)
        # The last basis starts the search for the next one.
        states["projector"].copy_(self.encoded_weight("basis").decode())
        self._projector.refresh(grad, states, context)
        self._found = states["projector"]

    @torch.no_grad()
    def merge(self, iterations: int) -> None:
        """Merge the factors into the weight and start new ones in the basis that was seen.

        The new factor starts as what makes up for the rounding of the new weight, found by
        alternating between the two.
        """
        assert self._found is not None, "merge() follows a backward pass that was watched"
        weight = self.whole_weight()
        self._write("basis", self._found)
        basis = self.encoded_weight("basis").decode().float()
        inverse = torch.linalg.pinv(basis)
        factor = torch.zeros_like(self.factor, dtype=torch.float32)
        for _ in range(iterations):
            self._write("weight", weight - self.scale * self._lift(factor, basis))
            error = (weight - self._base()) / self.scale
            factor = inverse @ error if self._on_left else error @ inverse.T
        self.factor.copy_(factor)
        self.factor.grad = None  # it belongs to the old factors
        self.progress[0], self._watching, self._found = 0, False, None
        self.progress[1] += 1

    def extra_repr(self) -> str:
        rank = self.encoded_slots["basis"].shape[1]
        codec = self.encoded_slots["weight"].codec.name
        return f"{self.in_features}, {self.out_features}, rank={rank}, codec={codec}"

    @property
    def _on_left(self) -> bool:
        return self._projector.on_left(self.out_features, self.in_features)

    def _base(self) -> Tensor:
        slot = self.encoded_slots["weight"]
        return slot.codec.decode(self.encoded_parts("weight"), slot.shape)

    def _lift(self, factor: Tensor, basis: Tensor) -> Tensor:
        return self._projector.up(factor, basis, self.out_features, self.in_features)

    def _write(self, name: str, value: Tensor) -> None:
        for part_name, part in self.encoded_slots[name].codec.encode(value.contiguous()).items():
            self.get_parameter(part_parameter_name(name, part_name)).data.copy_(part)


class _Watch(torch.autograd.Function):
    """The identity; in backward, shows a layer the gradient of its whole weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, layer: LoqtLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1]).float()
        ctx.layer.see(flat.T @ x.reshape(-1, x.shape[-1]).float())
        return grad, None, None


def attach_loqt(
    model: nn.Module, *, rank: int = 128, codec: Codec | None = None, scale: float = 0.5
) -> list[str]:
    """Replace a model's linear layers by ``LoqtLinear``, in place; return their names.

    Embeddings and the output head stay, and so do layers that are frozen.  Build the optimizer
    afterwards, then a ``LoqtMerges``.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> attach_loqt(model, rank=8)
    ['0', '2']
    >>> model[0]
    LoqtLinear(64, 64, rank=8, codec=nf4)
    >>> [tuple(p.shape) for p in model[0].parameters() if p.requires_grad]  # factor and bias
    [(64, 8), (64,)]
    """
    roles = parameter_roles(model)
    codec = codec or Nf4Codec()
    replaced = []
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or not module.weight.requires_grad:
            continue
        if roles[id(module.weight)] == "matrix":
            layer = LoqtLinear(module, name, rank=rank, codec=codec, scale=scale)
            model.set_submodule(name, layer)
            replaced.append(name)
    if not replaced:
        raise ValueError(f"{type(model).__name__} has no trainable linear layer to factor")
    return replaced


def detach_loqt(model: nn.Module) -> None:
    """Put ordinary linear layers with the merged weights back, in place.

    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> x, names = torch.ones(1, 64), attach_loqt(model, rank=8)
    >>> before = model(x)
    >>> detach_loqt(model)
    >>> model[0], torch.allclose(model(x), before, atol=1e-5)
    (Linear(in_features=64, out_features=64, bias=True), True)
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoqtLinear):
            device, dtype = layer.factor.device, layer.factor.dtype
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.whole_weight().to(device, dtype))
            linear.register_parameter("bias", layer.bias)
            model.set_submodule(name, linear)


@final
class LoqtMerges:
    """Merge a model's LoQT layers at growing intervals while its optimizer steps.

    Merge i + 1 comes ``gap + growth ** i`` steps after merge i, the first at the first step.  At a
    merge the optimizer leaves the factors alone and forgets their moments, which belong to the
    old basis.  With gradient accumulation the basis is that of the last micro-batch.

    >>> from headrace.optim import adamw
    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> names = attach_loqt(model, rank=8)
    >>> optimizer = adamw(model, lr=1e-2)
    >>> merges = LoqtMerges(model, optimizer, gap=2)
    >>> for _ in range(6):
    ...     model(torch.ones(1, 64)).square().sum().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> int(model[0].progress[1])  # merged at the first step, and when 2 + 1.2 had passed
    2
    >>> merges.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        gap: int = 100,
        growth: float = 1.2,
        iterations: int = 5,
    ) -> None:
        if gap < 1 or not growth >= 1.0 or iterations < 1:
            raise ValueError(
                f"gap={gap}, growth={growth} and iterations={iterations} must be at least 1"
            )
        self._layers = [m for m in model.modules() if isinstance(m, LoqtLinear)]
        if not self._layers:
            raise ValueError("the model has no LoQT layers; call attach_loqt(model) first")
        self._gap, self._growth, self._iterations = gap, growth, iterations
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            model.register_forward_pre_hook(self._before_forward),
        ]

    def close(self) -> None:
        """Merge no more."""
        for handle in self._handles:
            handle.remove()

    def _due(self, layer: LoqtLinear) -> bool:
        steps, merges = (int(x) for x in layer.progress)
        return merges == 0 or steps >= self._gap + self._growth**merges

    def _before_forward(self, model: nn.Module, *_: Any) -> None:
        # Asked at each pass, so that a state dict may be loaded at any time before.
        if model.training:
            for layer in self._layers:
                if self._due(layer):
                    layer.watch()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for layer in self._layers:
            if layer.has_basis:
                layer.merge(self._iterations)
                optimizer.state.pop(layer.factor, None)

    def _after_step(self, *_: Any) -> None:
        for layer in self._layers:
            layer.progress[0] += 1
